"""Histories one after another in one process, with an eye on its memory and its descriptors.

    SOAK_S=3600 python -m tests.simulation.soak

A history that fails is told with its seed, and the next one follows. Exit 1 when one failed, or
when memory or open descriptors at the end are above what they were after the first sixth of the
time: what is kept on purpose (10,000 versions of rows as they were read) is there by then.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

from local_store.clock import SystemClock
from tests.simulation.histories import run
from tests.simulation.plans import LONG

CLOCK = SystemClock()
SOAK_S = float(os.environ.get("SOAK_S", "3600"))
FIRST_SEED = int(os.environ.get("SIMULATION_SEED", "1000000"))
LONG_EVERY = 4  # by seeds: some faults need many actions
GROWTH_BYTES_MAX = 16 * 1024 * 1024  # allocators keep some; a leak of 1 KB a history is 100 MB


def resident_bytes() -> int:
    """Return the memory that this process holds; what only its allocator keeps goes back first."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    """Run until the time is over."""
    began, seed, settled = CLOCK.monotonic(), FIRST_SEED, None
    said, failed = began, list[int]()
    while (now := CLOCK.monotonic()) < began + SOAK_S:
        actions = None if seed % LONG_EVERY else LONG
        report = run(seed, actions=actions)
        if report.findings:
            failed.append(seed)
            print(f"seed {seed}, actions {actions}: {report.findings[0]}", flush=True)
        seed += 1
        if settled is None and now > began + SOAK_S / 6:
            settled = resident_bytes(), descriptors()
        if now > said + 60:
            said = now
            told = f"{resident_bytes() / 2**20:.1f} MiB, {descriptors()} descriptors"
            print(f"{seed - FIRST_SEED} histories in {now - began:.0f} s; {told}", flush=True)
    assert settled is not None
    memory, files = resident_bytes(), descriptors()
    print(
        f"{seed - FIRST_SEED} histories, seeds from {FIRST_SEED}; memory {settled[0] / 2**20:.1f}"
        f" → {memory / 2**20:.1f} MiB, descriptors {settled[1]} → {files};"
        f" {len(failed)} failed{': ' if failed else ''}{', '.join(map(str, failed))}"
    )
    sys.exit(bool(failed) or memory > settled[0] + GROWTH_BYTES_MAX or files > settled[1])


if __name__ == "__main__":
    main()
