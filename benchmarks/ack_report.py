"""Tables, ratios and the plot of benchmarks/ack.py: pure, from what was measured."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ack_peers import CONTENDERS, sqlite_version

BEGIN, END = "<!-- ack -->", "<!-- /ack -->"
FLOOR = "floor: append 4 KB + fdatasync"
PEERS = [n for n, e in CONTENDERS.items() if e.durable and e.package is not None]
CALLERS = (1, 4, 16, 64)
COLORS = ("#d6336c", "#868e96", "#495057", "#1c7ed6", "#2f9e44", "#e8590c", "#7048e8", "#0c8599")


@dataclass(frozen=True, slots=True)
class Ratio:
    """One line of the comparison; at least or at most `must`."""

    what: str
    must: float
    aim: float
    found: float
    at_least: bool

    @property
    def ok(self) -> bool:
        """Whether it is met."""
        return self.found >= self.must if self.at_least else self.found <= self.must


def typical(found: dict[str, Any], cell: str, name: str, what: str) -> float:
    """Return the median over the rounds."""
    return float(median(one[what] for one in found["cells"][cell][name]))


def best_peer(found: dict[str, Any], cell: str) -> float:
    """Return the rate of the fastest peer that survives a power loss."""
    return max(typical(found, cell, n, "ops_s") for n in PEERS if n in found["cells"][cell])


def ratios(found: dict[str, Any]) -> list[Ratio]:
    """Return what is promised beside what was measured."""
    floor = typical(found, "threads 1", FLOOR, "p50_ms")
    lines = [
        Ratio("p50, 1 thread / floor", 1.15, 0.9,
              typical(found, "threads 1", "syncer", "p50_ms") / floor, False),
        Ratio("p50, 1 coroutine / floor", 1.5, 1.1,
              typical(found, "coroutines 1", "syncer", "p50_ms") / floor, False),
    ]  # fmt: skip
    for cell, must, aim in (
        ("threads 64", 3.5, 5.5),
        ("coroutines 64", 6.0, 9.0),
        ("threads 64 at a sync of 2 ms more", 15.0, 22.0),
        ("coroutines 64 at a sync of 2 ms more", 25.0, 33.0),
    ):
        if cell in found["cells"] and any(n in found["cells"][cell] for n in PEERS):
            rate = typical(found, cell, "syncer", "ops_s") / best_peer(found, cell)
            lines.append(Ratio(f"{cell} / best durable peer", must, aim, rate, True))
    for cell, must, aim in (("threads 64", 0.04, 0.025), ("coroutines 64", 0.025, 0.018)):
        if cell in found["syncs"]:
            syncs = found["syncs"][cell]["syncer"]
            lines.append(Ratio(f"syncs per op, {cell}", must, aim, syncs, False))
    beside = "threads 16 beside a CPU-bound thread"
    full, empty = found["queued"]["full"], found["queued"]["empty"]
    return [
        *lines,
        Ratio("p50 ms, 16 threads " + beside[11:], 30, 16,
              typical(found, beside, "syncer", "p50_ms"), False),
        Ratio(f"p50 with {found['queued']['count']:,} queued / empty", 1.2, 1.0,
              full["p50_ms"] / empty["p50_ms"], False),
        Ratio("sustained 10 s, last second / first", 0.8, 0.9,
              found["sustained"]["last"] / found["sustained"]["first"], True),
        Ratio("one column of a 200 KB row / of a 1 KB row", 1.3, 1.0,
              found["large_row"]["large_p50_ms"] / found["large_row"]["small_p50_ms"], False),
    ]  # fmt: skip


def report(found: dict[str, Any], folder: Path, *, write: bool) -> str:
    """Return the Markdown; with `write` put it into RESULTS.md, and a plot beside it."""
    text = "\n".join([_machine(folder), *_tables(found), *_lines(found), *_notes(found)])
    if write:
        results = Path(__file__).parent / "RESULTS.md"
        old = results.read_text()
        start, end = old.index(BEGIN) + len(BEGIN), old.index(END)
        results.write_text(f"{old[:start]}\n{text}\n{old[end:]}")
        results.with_name("ack.svg").write_text(plot(found))
    return text


def _machine(folder: Path) -> str:
    return (
        f"{datetime.now(UTC).date().isoformat()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, SQLite {sqlite_version()}, {_filesystem(folder)}"
    )


def _filesystem(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [m for m in mounts if str(folder).startswith(m[1])]
    return max(found, key=lambda m: len(m[1]))[2] if found else "unknown file system"


def _tables(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for cell, by_name in found["cells"].items():
        syncs = found["syncs"].get(cell, {})
        lines += [
            "",
            f"**{cell}**",
            "",
            "| | ops/s | p50 ms | p99 ms | syncs/op |",
            "|---|---|---|---|---|",
        ]
        order = sorted(by_name, key=lambda n: -typical(found, cell, n, "ops_s"))
        for name in order:
            numbers = [typical(found, cell, name, w) for w in ("ops_s", "p50_ms", "p99_ms")]
            counted = f"{syncs[name]:.3f}" if syncs.get(name) is not None else ""
            durable = "" if CONTENDERS[name].durable else " *(loses acknowledged rows)*"
            lines.append(
                f"| {name}{durable} | {numbers[0]:,.0f} | {numbers[1]:.2f} | {numbers[2]:.2f}"
                f" | {counted} |"
            )
    return lines


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "| | must | aim | measured | |", "|---|---|---|---|---|"]
    for ratio in ratios(found):
        sign = "≥" if ratio.at_least else "≤"
        lines.append(
            f"| {ratio.what} | {sign} {ratio.must:g} | {ratio.aim:g} | {ratio.found:.3g}"
            f" | {'met' if ratio.ok else 'missed'} |"
        )
    return lines


def _notes(found: dict[str, Any]) -> list[str]:
    queued = found["queued"]
    told = [
        "",
        f"{queued['count']:,} queued in {queued['filled_s']:.0f} s by 64 coroutines;"
        f" `pending` of 500: {queued['empty']['pending_ms']:.1f} ms on the near-empty buffer,"
        f" {queued['full']['pending_ms']:.1f} ms with all of them; resident memory"
        f" {queued['empty']['rss_mb']:.0f} and {queued['full']['rss_mb']:.0f} MB.",
    ]
    if found["missing"]:
        told.append(f"Not installed: pip install {' '.join(found['missing'])}.")
    return told


def plot(found: dict[str, Any]) -> str:
    """Return throughput by callers as an SVG: durable contenders, both scales logarithmic."""
    names = [n for n in found["cells"]["threads 1"] if CONTENDERS[n].durable]
    series = {n: [typical(found, f"threads {c}", n, "ops_s") for c in CALLERS] for n in names}
    series["syncer, coroutines"] = [
        typical(found, f"coroutines {c}", "syncer", "ops_s") for c in (1, 16, 64)
    ]
    top = max(value for values in series.values() for value in values)
    low = min(value for values in series.values() for value in values)

    def x(callers: int) -> float:
        return 60 + 380 * math.log(callers, 64)

    def y(rate: float) -> float:
        return 300 - 260 * math.log(rate / low) / math.log(top / low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 350" font-family="sans-serif"'
        ' font-size="11">',
        '<rect width="720" height="350" fill="#ffffff"/>',
        '<text x="60" y="20">durable writes acknowledged per second, by callers</text>',
    ]
    for callers in CALLERS:
        parts.append(f'<text x="{x(callers):.0f}" y="325">{callers}</text>')
    for power in range(2, 6):
        if low <= 10**power <= top:
            at = y(10**power)
            parts.append(f'<line x1="60" x2="440" y1="{at:.0f}" y2="{at:.0f}" stroke="#dee2e6"/>')
            parts.append(f'<text x="8" y="{at + 4:.0f}">{10**power:,}</text>')
    label_at = 0.0
    for number, (name, values) in enumerate(sorted(series.items(), key=lambda s: -s[1][-1])):
        callers = (1, 16, 64) if "coroutines" in name else CALLERS
        points = " ".join(f"{x(c):.0f},{y(v):.0f}" for c, v in zip(callers, values, strict=True))
        color = COLORS[number % len(COLORS)]
        width = 3 if name.startswith("syncer") else 1.5
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"/>'
        )
        label_at = max(y(values[-1]) + 4, label_at + 14)
        parts.append(f'<text x="450" y="{label_at:.0f}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
