"""The plot of benchmarks/ack.py: throughput by callers as an SVG, pure, from what was measured."""

from __future__ import annotations

import math
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

COLORS = ("#d6336c", "#868e96", "#212529", "#1c7ed6", "#2f9e44", "#e8590c", "#7048e8", "#0c8599")
PANELS = (("threads", 70), ("coroutines", 420))  # and where each begins, in pixels
PANEL_WIDTH, TOP, BOTTOM, LABELS_AT = 290, 55, 330, 725
Series = dict[str, dict[int, float]]  # contender -> callers -> writes per second


def series_of(found: dict[str, Any], mode: str, names: list[str]) -> Series:
    """Return what each contender reached at each number of callers, as the median of the rounds."""
    lines: Series = {name: {} for name in names}
    for cell, by_name in found["cells"].items():
        cell_mode, callers, *where = cell.split(" ", 2)
        if cell_mode != mode or where:
            continue
        for name in names:
            if name in by_name:
                lines[name][int(callers)] = float(median(one["ops_s"] for one in by_name[name]))
    return {name: line for name, line in lines.items() if line}


def plot(found: dict[str, Any], names: list[str]) -> str:
    """Return the SVG: a panel for threads and one for coroutines, both scales logarithmic.

    It has a ground of its own, so that it reads the same on a light and a dark page.
    """
    panels = {mode: series_of(found, mode, names) for mode, _ in PANELS}
    rates = [rate for lines in panels.values() for line in lines.values() for rate in line.values()]
    low = 10 ** math.floor(math.log10(min(rates)))
    high = 10 ** math.ceil(math.log10(max(rates) * 1.001))

    def y(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(rate / low) / math.log(high / low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 390" font-family="sans-serif"'
        ' font-size="12" fill="#212529" role="img">',
        "<title>Durable writes acknowledged per second, by callers</title>",
        '<rect width="920" height="390" fill="#ffffff"/>',
        '<text x="70" y="22" font-size="14">Durable writes acknowledged per second</text>',
        f'<text transform="translate(16 {(TOP + BOTTOM) // 2}) rotate(-90)"'
        ' text-anchor="middle">writes per second</text>',
    ]
    for mode, left in PANELS:
        parts += _panel(mode, left, panels[mode], names, y)
        parts += _scale(left, low, high, y)
    parts += _legend(panels["coroutines"] or panels["threads"], names, y)
    return "\n".join([*parts, "</svg>", ""])


def _x(left: int, callers: int) -> float:
    return left + 10 + (PANEL_WIDTH - 30) * math.log(callers, 64)


def _panel(mode: str, left: int, lines: Series, names: list[str], y: Any) -> list[str]:
    middle = left + PANEL_WIDTH // 2
    parts = [
        f'<text x="{left}" y="44" font-weight="bold">{mode}</text>',
        f'<text x="{middle}" y="372" text-anchor="middle">callers</text>',
    ]
    for callers in sorted({callers for line in lines.values() for callers in line}):
        at = _x(left, callers)
        parts.append(f'<text x="{at:.0f}" y="350" text-anchor="middle">{callers}</text>')
    for name, line in lines.items():
        points = " ".join(f"{_x(left, c):.0f},{y(rate):.0f}" for c, rate in sorted(line.items()))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{_color(name, names)}"'
            f' stroke-width="{3 if name == "syncer" else 1.5}"/>'
        )
    return parts


def _scale(left: int, low: float, high: float, y: Any) -> list[str]:
    parts = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10**power)
        parts.append(
            f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{at:.0f}" y2="{at:.0f}"'
            ' stroke="#ced4da"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{at + 4:.0f}" text-anchor="end">{10**power:,}</text>'
        )
    return parts


def _legend(lines: Series, names: list[str], y: Any) -> list[str]:
    """Name each line at its right end, one below the other."""
    parts, lowest = [], 0.0
    ends = {name: line[max(line)] for name, line in lines.items()}
    for name in sorted(ends, key=lambda n: -ends[n]):
        lowest = max(y(ends[name]) + 4, lowest + 15)
        color = _color(name, names)
        parts.append(f'<text x="{LABELS_AT}" y="{lowest:.0f}" fill="{color}">{escape(name)}</text>')
    return parts


def _color(name: str, names: list[str]) -> str:
    return COLORS[names.index(name) % len(COLORS)]
