"""Tables, ratios and the plot of benchmarks/ack.py: pure, from what was measured."""

from __future__ import annotations

import os
import platform
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ack_peers import CONTENDERS
from benchmarks.ack_plot import plot

BEGIN, END = "<!-- ack -->", "<!-- /ack -->"
FLOOR = "floor: append 4 KB + fdatasync"
PEERS = [n for n, e in CONTENDERS.items() if e.durable and e.package is not None]
EXECUTEMANY = "the same front with executemany"
CPU_BOUND = "beside a CPU-bound thread"
SLOW = "at a sync of 2 ms more"
DRAWN = [n for n, e in CONTENDERS.items() if e.durable and "as shipped" not in n]


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


def is_durable(name: str) -> bool:
    """Tell whether a contender's acknowledgement survives a power loss."""
    return name == EXECUTEMANY or CONTENDERS[name].durable


def typical(found: dict[str, Any], cell: str, name: str, what: str) -> float:
    """Return the median over the rounds."""
    return float(median(one[what] for one in found["cells"][cell][name]))


def best_peer(found: dict[str, Any], cell: str) -> str | None:
    """Return the fastest peer that survives a power loss, by its median; None if none was here."""
    present = [n for n in PEERS if n in found["cells"].get(cell, {})]
    return max(present, key=lambda n: typical(found, cell, n, "ops_s"), default=None)


def against(found: dict[str, Any], cell: str, other_cell: str, other: str, what: str) -> float:
    """Return the median over the rounds of syncer against another in the same round.

    Pairs, since the disk changes more between two rounds than within one.
    """
    pairs = zip(found["cells"][cell]["syncer"], found["cells"][other_cell][other], strict=True)
    return float(median(one[what] / another[what] for one, another in pairs))


def ratios(found: dict[str, Any]) -> list[Ratio]:
    """Return what is promised beside what was measured."""
    lines = [
        Ratio(f"p50, 1 {mode.rstrip('s')} / floor", must, aim,
              against(found, f"{mode} 1", "threads 1", FLOOR, "p50_ms"), False)
        for mode, must, aim in (("threads", 1.15, 0.9), ("coroutines", 1.5, 1.1))
    ]  # fmt: skip
    for cell, must, aim in (
        ("threads 64", 3.5, 5.5),
        ("coroutines 64", 6.0, 9.0),
        (f"threads 64 {SLOW}", 15.0, 22.0),
        (f"coroutines 64 {SLOW}", 25.0, 33.0),
    ):
        peer = best_peer(found, cell)
        if peer is not None:
            rate = against(found, cell, cell, peer, "ops_s")
            lines.append(Ratio(f"{cell} / best durable peer ({peer})", must, aim, rate, True))
    for cell, must, aim in (("threads 64", 0.04, 0.025), ("coroutines 64", 0.025, 0.018)):
        if found["counted"]:
            syncs = typical(found, cell, "syncer", "syncs_per_op")
            lines.append(Ratio(f"syncs per op, {cell}", must, aim, syncs, False))
    beside, seconds = f"threads 16 {CPU_BOUND}", found["sustained"]["seconds"]
    full, empty = found["queued"]["full"], found["queued"]["empty"]
    return [
        *lines,
        Ratio(f"p50 ms, 16 threads {CPU_BOUND}", 30, 16,
              typical(found, beside, "syncer", "p50_ms"), False),
        Ratio(f"p50 with executemany / syncer, 16 threads {CPU_BOUND}", 5, 5,
              1 / against(found, beside, beside, EXECUTEMANY, "p50_ms"), True),
        Ratio(f"p50 with {found['queued']['count']:,} queued / empty", 1.2, 1.0,
              full["p50_ms"] / empty["p50_ms"], False),
        Ratio(f"sustained {seconds} s, last second / first", 0.8, 0.9,
              found["sustained"]["last"] / found["sustained"]["first"], True),
        Ratio("one column of a 200 KB row / of a 1 KB row", 1.3, 1.0,
              found["large_row"]["large_p50_ms"] / found["large_row"]["small_p50_ms"], False),
    ]  # fmt: skip


def report(found: dict[str, Any], folder: Path, *, write: bool) -> str:
    """Return the Markdown; with `write` put it into RESULTS.md, and a plot beside it."""
    text = "\n".join([_machine(folder), *_tables(found), *_lines(found), *_notes(found)])
    if write:
        results = Path(__file__).parent / "RESULTS.md"
        results.write_text(replaced(results.read_text(), text))
        results.with_name("ack.svg").write_text(plot(found, DRAWN))
    return text


def replaced(old: str, text: str) -> str:
    """Return RESULTS.md with another text between its markers."""
    start, end = old.index(BEGIN) + len(BEGIN), old.index(END)
    return f"{old[:start]}\n{text}\n{old[end:]}"


def _machine(folder: Path) -> str:
    return (
        f"{datetime.now(UTC).date().isoformat()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"{_filesystem(folder)}"
    )


def _filesystem(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [m for m in mounts if str(folder).startswith(m[1])]
    return max(found, key=lambda m: len(m[1]))[2] if found else "unknown file system"


def _tables(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for cell, by_name in found["cells"].items():
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
            syncs = typical(found, cell, name, "syncs_per_op") if found["counted"] else None
            counted = "" if syncs is None else f"{syncs:.3f}"
            durable = "" if is_durable(name) else " *(loses acknowledged rows)*"
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
        told += ["", f"Not installed: pip install {' '.join(found['missing'])}."]
    if not found["counted"]:
        told += ["", "No C compiler here: syncs not counted, no slower disk played."]
    return told
