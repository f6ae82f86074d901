"""What a child process of benchmarks/ack.py measures: a contender, or the buffer alone."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ack_executemany import ExecuteMany
from benchmarks.ack_peers import CONTENDERS, NOTES, Contender, Syncer, row
from benchmarks.ack_report import EXECUTEMANY

Latency = tuple[float, float]  # when it began, seconds it took


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie."""
    return values[min(len(values) - 1, int(len(values) * share))]


def measure(
    name: str, mode: str, callers: int, *, warm_s: float, slice_s: float, cpu: bool, folder: Path
) -> dict[str, Any]:
    """Let callers put rows for `warm_s` and then `slice_s`; returns rate, latencies and syncs.

    The same threads warm up and are measured: several peers open a connection for each thread,
    which is no part of a write.
    """
    contender = made(name, folder)
    contender.put(-1)
    done: list[Latency] = []
    stop = threading.Event()
    if cpu:
        threading.Thread(target=_spin, args=(stop,), daemon=True).start()
    measured_from = time.perf_counter() + warm_s
    end = measured_from + slice_s
    look = Look(measured_from, end)
    if mode == "threads":
        put_by_threads(contender.put, callers, end, done, look)
    else:
        asyncio.run(put_by_coroutines(contender, callers, end, done, look))
    stop.set()
    contender.close()
    _assert_held(name, folder, 1 + len(done))
    return summary(done, measured_from, end, look.syncs if has_shim() else None)


def made(name: str, folder: Path) -> Contender:
    """Open a contender by its name."""
    if name == EXECUTEMANY:
        return ExecuteMany(folder)
    return CONTENDERS[name].make(folder)


def summary(
    done: list[Latency], measured_from: float, end: float, syncs: int | None
) -> dict[str, Any]:
    """Return the rate of what finished between the two times, and the latencies.

    By when it finished: with 64 callers in a queue, the 64 that wait at the first moment were paid
    for within the window; leaving them out would halve the rate of whoever is slow. The latencies
    are also of those that finished after the end: the ones that waited longest are among them.
    """
    in_window = [one for one in done if measured_from <= sum(one) < end]
    latencies = sorted(took for began, took in done if began + took >= measured_from)
    writes = max(1, len(in_window))  # one slower than the window is slow, not a division by zero
    return {
        "ops_s": writes / (end - measured_from),
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "syncs_per_op": None if syncs is None else syncs / writes,
    }


def _assert_held(name: str, folder: Path, acknowledged: int) -> None:
    """Open it again and count: what was acknowledged is on the disk, not only in memory."""
    again = made(name, folder)
    held = again.held()
    again.close()
    if held != acknowledged:
        raise RuntimeError(f"{name} holds {held}, {acknowledged} were acknowledged")


class Look:
    """Counts the syncs made between two times (of time.perf_counter)."""

    def __init__(self, start: float, end: float) -> None:
        self._times, self._counts = (start, end), list[int]()

    def waits_s(self) -> Iterator[float]:
        """Yield how long to wait until the next time, and count when asked on."""
        for at in self._times:
            yield max(0.0, at - time.perf_counter())
            self._counts.append(synced())

    @property
    def syncs(self) -> int:
        """How many there were in between."""
        return self._counts[1] - self._counts[0]


def put_by_threads(
    put: Callable[[int], None], callers: int, end: float, done: list[Latency], look: Look
) -> None:
    """Put rows from so many threads until `end` (of time.perf_counter)."""

    def work(caller: int) -> None:
        number = caller * 10_000_000
        while (began := time.perf_counter()) < end:
            put(number)
            done.append((began, time.perf_counter() - began))
            number += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for wait_s in look.waits_s():
        time.sleep(wait_s)
    for thread in threads:
        thread.join()


async def put_by_coroutines(
    contender: Any, callers: int, end: float, done: list[Latency], look: Look
) -> None:
    """Put rows from so many coroutines; contenders without any get a pool with as many threads."""
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
                done.append((began, time.perf_counter() - began))
                number += 1

        async def watch() -> None:
            for wait_s in look.waits_s():
                await asyncio.sleep(wait_s)

        await asyncio.gather(watch(), *(work(n) for n in range(callers)))


def _spin(stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        for _ in range(10_000):
            number = (number * 31 + 7) % 1_000_003


def has_shim() -> bool:
    """Tell whether count_syncs.c is preloaded."""
    return "count_syncs" in os.environ.get("LD_PRELOAD", "")


def synced() -> int:
    """Return how often this process has synced a file; 0 without the shim."""
    return int(ctypes.CDLL(None).count_syncs()) if has_shim() else 0


# -- scenarios of the buffer alone -----------------------------------------------------------------


def queued(count: int, look_s: float, folder: Path) -> dict[str, Any]:
    """Measure one caller on an empty buffer, then with `count` queued; memory and reads too."""
    contender = Syncer(folder)

    def look() -> dict[str, float]:
        done: list[Latency] = []
        began = time.perf_counter()
        put_by_threads(contender.put, 1, began + look_s, done, Look(began, began + look_s))
        reads = [_timed_pending(contender) for _ in range(5)]
        latencies = sorted(took for _, took in done)
        return {
            "p50_ms": percentile(latencies, 0.5) * 1e3,
            "p99_ms": percentile(latencies, 0.99) * 1e3,
            "pending_ms": median(reads) * 1e3,
            "rss_mb": _rss_mb(),
        }

    for number in range(200):  # prepares the statements; a cold first look would flatter the second
        contender.put(-1 - number)
    empty = look()

    async def work(caller: int) -> None:
        for number in range(count // 64):
            await contender.put_async(caller * 10_000_000 + number)

    async def fill() -> None:
        await asyncio.gather(*(work(n) for n in range(64)))

    began = time.perf_counter()
    asyncio.run(fill())
    filled_s = time.perf_counter() - began
    full = look()
    held = contender.held()
    contender.close()
    return {"count": held, "filled_s": filled_s, "empty": empty, "full": full}


def _timed_pending(contender: Syncer) -> float:
    began = time.perf_counter()
    contender.store.pending(transactions_max=500, bytes_max=1 << 20)
    return time.perf_counter() - began


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def sustained(seconds: int, folder: Path) -> dict[str, float]:
    """Measure 64 coroutines: the last second against the first after a warm-up."""
    contender, done = Syncer(folder), list[Latency]()
    measured_from = time.perf_counter() + 0.3
    end = measured_from + seconds
    asyncio.run(put_by_coroutines(contender, 64, end, done, Look(measured_from, end)))
    contender.close()
    finished = [began + took - measured_from for began, took in done]
    return {
        "seconds": seconds,
        "first": sum(0 <= at < 1 for at in finished),
        "last": sum(seconds - 1 <= at < seconds for at in finished),
    }


def large_row(updates: int, folder: Path) -> dict[str, float]:
    """Measure an update of one small column of a row of 1 KB and of one of 200 KB, in turn."""
    from local_store import Insert, LocalStore, Update
    from local_store.clock import new_id

    found: dict[str, list[float]] = {"small": [], "large": []}
    with LocalStore.open(folder, tables=[NOTES]) as store:
        ids = {"small": new_id(), "large": new_id()}
        for kind, size in (("small", 1_000), ("large", 200_000)):
            values = {**row(0), "id": ids[kind], "text": "x" * size}
            store.write([Insert("notes", values)], user_id="u")
        for number in range(updates):
            for kind, row_id in ids.items():
                began = time.perf_counter()
                store.write([Update("notes", row_id, {"number": number + 1})], user_id="u")
                found[kind].append(time.perf_counter() - began)
    return {f"{kind}_p50_ms": median(values) * 1e3 for kind, values in found.items()}
