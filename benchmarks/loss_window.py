"""What a container's loss costs in mode `local`: how many acknowledged writes only its disk holds.

Steady writes, a real local Supabase, the flusher as in the API; the undelivered are counted every
few milliseconds. With Supabase slowed by the proxy, too.

    python -m benchmarks.loss_window [--seconds 20]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from benchmarks.drain import Writer
from local_store import LocalStore
from local_store.clock import SystemClock
from syncer.flusher import Flusher
from syncer.remote import SupabaseRemote
from syncer.service.scheduler import FlushScheduler
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Delay
from syncer.testkit.local_supabase import LocalSupabase

CLOCK = SystemClock()
SAMPLE_S = 0.005
CASES = ((10, 0.0), (100, 0.0), (100, 0.05), (100, 0.3))


def main() -> None:
    """Print a table: writes a second, Supabase's delay, undelivered writes and the oldest's age."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    print("| writes/s | Supabase | at risk p50 / p99 / max | oldest p99, ms |")
    print("|---|---|---|---|")
    with LocalSupabase.start() as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        with FaultProxy.start(host, int(port)) as proxy:
            for per_s, delay_s in CASES:
                proxy.clear()
                if delay_s:
                    proxy.set(Delay(delay_s))
                with tempfile.TemporaryDirectory() as folder:
                    counts, ages = measure(stack, proxy, Path(folder), per_s, given.seconds)
                told = "as it is" if not delay_s else f"{delay_s * 1000:.0f} ms slower"
                print(
                    f"| {per_s} | {told} | {at(counts, 0.5):.0f} / {at(counts, 0.99):.0f} /"
                    f" {max(counts):.0f} | {at(ages, 0.99) * 1000:.0f} |",
                    flush=True,
                )


def measure(
    stack: LocalSupabase, proxy: FaultProxy, folder: Path, per_s: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Return the samples: how many writes are undelivered, and how old the oldest is."""
    remote = SupabaseRemote(proxy.url, stack.secret_key)
    with LocalStore.open(folder, tables=SESSION_TABLES) as store:
        scheduler = FlushScheduler(store, Flusher(store, remote), interval_s=2.0)
        scheduler.start()
        writer, stopping = Writer(store, 20), threading.Event()

        def write() -> None:
            while not stopping.wait(1 / per_s):
                writer.write()

        thread = threading.Thread(target=write)
        thread.start()
        counts, ages = [], []
        end = CLOCK.monotonic() + seconds
        while CLOCK.monotonic() < end:
            counts.append(float(store.stats()["pending"]))
            ages.append(store.oldest_age_s() or 0.0)
            CLOCK.sleep(SAMPLE_S)
        stopping.set()
        thread.join()
        scheduler.stop()
    remote.close()
    return counts, ages


def at(samples: list[float], share: float) -> float:
    """Return a percentile."""
    ordered = sorted(samples)
    return ordered[int(len(ordered) * share)]


if __name__ == "__main__":
    main()
