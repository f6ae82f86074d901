"""How fast a durable write is acknowledged, against what else there is: `python -m benchmarks.ack`.

Each measurement is a process of its own on a fresh folder; contenders take turns, so that a slow
minute of the machine meets all of them. Syncs are counted by a preloaded shim (count_syncs.c, needs
a C compiler; a count and a look at the environment beside each sync), which also stands in for a
disk whose sync takes 2 ms longer.

Threads and coroutines, 1, 4, 16 and 64 of them, are measured alone, beside a thread that computes,
and on the slower disk. What a ratio is made of is measured in every round, the rest in the first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from benchmarks.ack_measure import large_row, measure, percentile, queued, sustained
from benchmarks.ack_peers import CONTENDERS, is_installed
from benchmarks.ack_report import CPU_BOUND, EXECUTEMANY, SLOW, report

__all__ = ["main", "percentile"]

HERE = Path(__file__).parent
MODES = [(mode, n) for mode in ("threads", "coroutines") for n in (1, 4, 16, 64)]


@dataclass(frozen=True, slots=True)
class Size:
    """How long a run lasts."""

    rounds: int
    warm_s: float
    slice_s: float
    modes: list[tuple[str, int]]
    queued: int
    sustained_s: int
    updates: int


FULL = Size(3, 0.3, 0.8, MODES, 100_000, 10, 600)
QUICK = Size(1, 0.1, 0.15, [m for m in MODES if m[1] in (1, 64)], 10_000, 2, 100)
COMPARED = {("threads", 16, CPU_BOUND), ("threads", 64, SLOW), ("coroutines", 64, SLOW)}


def run_child(arguments: dict[str, Any], folder: Path, environment: dict[str, str]) -> Any:
    """Run one measurement in a fresh process and folder."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        asked = orjson.dumps({**arguments, "folder": str(place)}).decode()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ack", "--child", asked],
            cwd=HERE.parent,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
            timeout=1_800,
        )
        return orjson.loads(done.stdout)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def child(asked: dict[str, Any]) -> Any:
    """Do what the parent asked for."""
    what, folder = asked.pop("what"), Path(asked.pop("folder"))
    does: dict[str, Callable[..., Any]] = {
        "queued": queued,
        "sustained": sustained,
        "large_row": large_row,
        "measure": measure,
    }
    return does[what](**asked, folder=folder)


def build_shim(folder: Path) -> Path | None:
    """Compile the shim; None without a compiler."""
    target = folder / "count_syncs.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source = str(HERE / "count_syncs.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", target, source, "-ldl"], check=True)
    return target


class Run:
    """One run: asks for each measurement and keeps what was found."""

    def __init__(self, folder: Path, size: Size) -> None:
        shim = build_shim(folder)
        self._folder, self._size = folder, size
        self._preload = {"LD_PRELOAD": str(shim)} if shim else {}
        self._names = [name for name, entry in CONTENDERS.items() if is_installed(entry)]
        self.cells: dict[str, dict[str, list[Any]]] = {}

    def whole(self) -> dict[str, Any]:
        """Measure everything; returns what `report` turns into tables."""
        size, folder = self._size, self._folder
        for number in range(size.rounds):
            self._round(number)
        return {
            "cells": self.cells,
            "counted": bool(self._preload),
            "queued": run_child(
                {"what": "queued", "count": size.queued, "look_s": 2 * size.slice_s}, folder, {}
            ),
            "sustained": run_child({"what": "sustained", "seconds": size.sustained_s}, folder, {}),
            "large_row": run_child({"what": "large_row", "updates": size.updates}, folder, {}),
            "missing": sorted(
                {e.package for e in CONTENDERS.values() if e.package and not is_installed(e)}
            ),
        }

    def turn(self, number: int) -> list[str]:
        """Return the order of a round: each begins with another contender."""
        first = number * len(self._names) // self._size.rounds
        return self._names[first:] + self._names[:first]

    def plan(self, number: int) -> list[tuple[str, int, str]]:
        """Return what is measured in a round: mode, callers, and under which condition."""
        modes = self._size.modes
        beside = {(*mode, CPU_BOUND): None for mode in modes} | {("threads", 16, CPU_BOUND): None}
        slower = [(*mode, SLOW) for mode in modes] if self._preload else []
        harder = [*beside, *slower]
        return [
            *((*mode, "") for mode in modes),
            *(one for one in harder if number == 0 or one in COMPARED),
        ]

    def _round(self, number: int) -> None:
        """Let every contender have its slice in every cell."""
        for mode, callers, where in self.plan(number):
            names = self.turn(number)
            if (mode, callers, where) == ("threads", 16, CPU_BOUND):
                names = [*names, EXECUTEMANY]
            for name in names:
                if where == SLOW and not CONTENDERS[name].durable:
                    continue  # it hardly syncs: the disk's delay says nothing about it
                found = self._measure(name, mode, callers, where)
                cell = self.cells.setdefault(f"{mode} {callers} {where}".strip(), {})
                cell.setdefault(name, []).append(found)
            print(f"round {number + 1}: {mode} {callers} {where}", file=sys.stderr, flush=True)

    def _measure(self, name: str, mode: str, callers: int, where: str) -> Any:
        shim = {**self._preload, "SYNC_DELAY_US": "2000"} if where == SLOW else self._preload
        asked = {"what": "measure", "name": name, "mode": mode, "callers": callers,
                 "warm_s": self._size.warm_s, "slice_s": self._size.slice_s,
                 "cpu": where == CPU_BOUND}  # fmt: skip
        return run_child(asked, self._folder, shim)


def workplace(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a folder inside: what is removed at the end is never somebody's."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder.absolute())


def main(arguments: list[str] | None = None) -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one short round, fewer callers")
    parser.add_argument("--million", action="store_true", help="1,000,000 queued, not 100,000")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md, with a plot")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="on the disk measured")
    asked = parser.parse_args(arguments)
    if asked.child:
        sys.stdout.write(orjson.dumps(child(orjson.loads(asked.child))).decode())
        return
    size = QUICK if asked.quick else FULL
    if asked.million:
        size = replace(size, queued=1_000_000)
    with workplace(asked.folder) as place:
        found = Run(Path(place), size).whole()
        if asked.json:
            sys.stdout.write(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        if asked.write or not asked.json:
            text = report(found, Path(place), write=asked.write)
            print(text, file=sys.stderr if asked.json else sys.stdout)


if __name__ == "__main__":
    main()
