"""How fast a durable write is acknowledged, against what else there is: `python -m benchmarks.ack`.

Each measurement is a process of its own on a fresh folder; contenders take turns, so that a slow
minute of the machine meets all of them. Syncs are counted in processes apart, by a preloaded shim
(count_syncs.c, needs a C compiler), which also stands in for a disk whose sync takes 2 ms longer.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmarks.ack_peers import CONTENDERS, NOTES, Syncer, is_installed, row
from benchmarks.ack_report import report

HERE = Path(__file__).parent
WARM_UP_S = 0.3  # the first statements of each size are prepared, the first pages allocated
CPU_BOUND = "beside a CPU-bound thread"
MODES = [("threads", n) for n in (1, 4, 16, 64)] + [("coroutines", n) for n in (1, 16, 64)]


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie."""
    return values[min(len(values) - 1, int(len(values) * share))]


# -- one measurement, in a process of its own ------------------------------------------------------


def measure(name: str, mode: str, callers: int, seconds: float, folder: Path, cpu: bool) -> Any:
    """Let callers put rows for so long; returns rates, latencies and syncs."""
    contender = CONTENDERS[name].make(folder)
    contender.put(-1)  # the first opens connections and prepares statements
    warm = list[float]()
    if mode == "threads":
        _threads(contender.put, callers, time.perf_counter() + WARM_UP_S, warm)
    else:
        asyncio.run(_coroutines(contender, callers, time.perf_counter() + WARM_UP_S, warm))
    counted, latencies = _syncs(), list[float]()
    stop = threading.Event()
    if cpu:
        threading.Thread(target=_spin, args=(stop,), daemon=True).start()
    started = time.perf_counter()
    end = started + seconds
    if mode == "threads":
        _threads(contender.put, callers, end, latencies)
    else:
        asyncio.run(_coroutines(contender, callers, end, latencies))
    elapsed = time.perf_counter() - started
    stop.set()
    syncs = _syncs() - counted
    held = contender.held()
    acknowledged = 1 + len(warm) + len(latencies)
    assert held == acknowledged, f"{name} holds {held}, {acknowledged} acknowledged"
    contender.close()
    latencies.sort()
    return {
        "ops_s": len(latencies) / elapsed,
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "syncs_per_op": syncs / len(latencies) if _has_shim() else None,
    }


def _threads(put: Callable[[int], None], callers: int, end: float, latencies: list[float]) -> None:
    def work(caller: int) -> None:
        number = caller * 10_000_000
        while (began := time.perf_counter()) < end:
            put(number)
            latencies.append(time.perf_counter() - began)
            number += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _coroutines(contender: Any, callers: int, end: float, latencies: list[float]) -> None:
    """Contenders without coroutines get a pool with a thread for each caller."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(callers) as pool:

        async def put(number: int) -> None:
            if isinstance(contender, Syncer):
                await contender.put_async(number)
            else:
                await loop.run_in_executor(pool, contender.put, number)

        async def work(caller: int) -> None:
            number = caller * 10_000_000
            while (began := time.perf_counter()) < end:
                await put(number)
                latencies.append(time.perf_counter() - began)
                number += 1

        await asyncio.gather(*(work(n) for n in range(callers)))


def _spin(stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        for _ in range(10_000):
            number = (number * 31 + 7) % 1_000_003


def _has_shim() -> bool:
    return "count_syncs" in os.environ.get("LD_PRELOAD", "")


def _syncs() -> int:
    return int(ctypes.CDLL(None).count_syncs()) if _has_shim() else 0


# -- scenarios of the buffer alone -----------------------------------------------------------------


def queued(count: int, folder: Path) -> dict[str, Any]:
    """Measure one caller on an empty buffer, then with `count` queued; memory and reads too."""
    contender = Syncer(folder)
    store = contender.store

    def look() -> dict[str, float]:
        latencies: list[float] = []
        _threads(contender.put, 1, time.perf_counter() + 2, latencies)
        latencies.sort()
        reads = []
        for _ in range(5):
            began = time.perf_counter()
            store.pending(transactions_max=500, bytes_max=1 << 22)
            reads.append(time.perf_counter() - began)
        return {
            "p50_ms": percentile(latencies, 0.5) * 1e3,
            "pending_ms": median(reads) * 1e3,
            "rss_mb": _rss_mb(),
        }

    contender.put(-1)
    empty = look()

    async def fill() -> None:
        async def work(caller: int) -> None:
            for number in range(count // 64):
                await contender.put_async(caller * 10_000_000 + number)

        await asyncio.gather(*(work(n) for n in range(64)))

    began = time.perf_counter()
    asyncio.run(fill())
    filled_s = time.perf_counter() - began
    full = look()
    held = contender.held()
    contender.close()
    return {"count": held, "filled_s": filled_s, "empty": empty, "full": full}


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def sustained(seconds: float, folder: Path) -> dict[str, float]:
    """Measure 64 coroutines: the last second against the first."""
    contender, counts = Syncer(folder), [0] * (int(seconds) + 2)

    async def main() -> None:
        started = time.perf_counter()

        async def work(caller: int) -> None:
            number = caller * 10_000_000
            while (at := time.perf_counter() - started) < seconds:
                await contender.put_async(number)
                counts[int(at)] += 1
                number += 1

        await asyncio.gather(*(work(n) for n in range(64)))

    asyncio.run(main())
    contender.close()
    return {"first": counts[0], "last": counts[int(seconds) - 1]}


def large_row(folder: Path) -> dict[str, float]:
    """Measure an update of one small column of a row of 1 KB and of one of 200 KB, in turn."""
    from local_store import Insert, LocalStore, Update
    from local_store.clock import new_id

    found: dict[str, list[float]] = {"small": [], "large": []}
    with LocalStore.open(folder, tables=[NOTES]) as store:
        ids = {"small": new_id(), "large": new_id()}
        for kind, size in (("small", 1_000), ("large", 200_000)):
            values = {**row(0), "id": ids[kind], "text": "x" * size}
            store.write([Insert("notes", values)], user_id="u")
        for number in range(600):
            for kind, row_id in ids.items():
                began = time.perf_counter()
                store.write([Update("notes", row_id, {"number": number})], user_id="u")
                found[kind].append(time.perf_counter() - began)
    return {f"{kind}_p50_ms": median(values) * 1e3 for kind, values in found.items()}


# -- the whole run ---------------------------------------------------------------------------------


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
    folder = Path(asked["folder"])
    match asked["what"]:
        case "measure":
            return measure(
                asked["name"], asked["mode"], asked["callers"], asked["seconds"], folder,
                asked.get("cpu", False),
            )  # fmt: skip
        case "queued":
            return queued(asked["count"], folder)
        case "sustained":
            return sustained(asked["seconds"], folder)
        case _:
            return large_row(folder)


def build_shim(folder: Path) -> Path | None:
    """Compile the shim; None without a compiler."""
    target = folder / "count_syncs.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source = str(HERE / "count_syncs.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", target, source, "-ldl"], check=True)
    return target


def whole_run(folder: Path, *, rounds: int, seconds: float, count: int) -> dict[str, Any]:
    """Measure everything; returns what `report` turns into tables."""
    shim = build_shim(folder)
    preload = {"LD_PRELOAD": str(shim)} if shim else {}
    names = [name for name, entry in CONTENDERS.items() if is_installed(entry)]
    cells: dict[str, Any] = {}
    plan = [(mode, callers, "") for mode, callers in MODES]
    plan += [("threads", 16, CPU_BOUND)]
    if shim:
        plan += [(mode, 64, "at a sync of 2 ms more") for mode in ("threads", "coroutines")]
    for number in range(rounds):
        for mode, callers, where in plan:
            turn = names[number % len(names) :] + names[: number % len(names)]
            for name in turn:
                asked = {"what": "measure", "name": name, "mode": mode, "callers": callers,
                         "seconds": seconds, "cpu": where == CPU_BOUND}  # fmt: skip
                slow = {**preload, "SYNC_DELAY_US": "2000"} if where.startswith("at a") else {}
                found = run_child(asked, folder, slow)
                cells.setdefault(f"{mode} {callers} {where}".strip(), {}).setdefault(
                    name, []
                ).append(found)
            print(f"round {number + 1}: {mode} {callers} {where}", file=sys.stderr, flush=True)
    counted = {
        f"{mode} 64": {
            name: run_child(
                {"what": "measure", "name": name, "mode": mode, "callers": 64, "seconds": seconds},
                folder,
                preload,
            )["syncs_per_op"]
            for name in names
        }
        for mode in ("threads", "coroutines")
        if shim
    }
    return {
        "cells": cells,
        "syncs": counted,
        "queued": run_child({"what": "queued", "count": count}, folder, {}),
        "sustained": run_child({"what": "sustained", "seconds": 10}, folder, {}),
        "large_row": run_child({"what": "large_row"}, folder, {}),
        "missing": sorted({e.package for e in CONTENDERS.values() if not is_installed(e)} - {None}),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one short round, 50,000 queued")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md, with a plot")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="on the disk measured")
    asked = parser.parse_args(arguments)
    if asked.child:
        sys.stdout.write(orjson.dumps(child(orjson.loads(asked.child))).decode())
        return
    folder: Path = asked.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rounds, seconds, count = (1, 0.5, 50_000) if asked.quick else (3, 1.0, 1_000_000)
        found = whole_run(folder, rounds=rounds, seconds=seconds, count=count)
        if asked.json:
            sys.stdout.write(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        else:
            print(report(found, folder, write=asked.write))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
