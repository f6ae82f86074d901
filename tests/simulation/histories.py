"""Run histories by seed, on two cores; make a failing one short; print how to run it again.

python -m tests.simulation.histories --histories 5000 [--first 1] [--jobs 2] [--actions 68]
python -m tests.simulation.histories --first 17 [--actions 68] --only 3,7,9
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path

from local_store import LocalStore
from local_store.clock import SystemClock
from tests.simulation.files import Handles, Image, image_of, restore
from tests.simulation.machine import Report
from tests.simulation.plans import VOLUME_EVERY, plan_of
from tests.simulation.world import TABLES, World

CLOCK = SystemClock()
CONTAINERS, SPARES = 2, 2


def run(seed: int, only: Sequence[int] | None = None, *, actions: int | None = None) -> Report:
    """Run one history from its seed, or some of its actions; the same ones give the same trace.

    `actions` is how many are planned, where the seed isn't to choose that.
    """
    folders = _folders()
    disks = list(folders)
    for folder in disks if seed % VOLUME_EVERY == 0 else disks[:CONTAINERS]:  # none is lost there
        restore(folder, folders[folder])
    with tempfile.TemporaryDirectory(dir=disks[0].parent) as root:
        given = disks[:CONTAINERS], disks[CONTAINERS:], Path(root)
        return World(plan_of(seed, actions), _handles(), *given).run(only)


@cache
def _handles() -> Handles:
    """Return what this process's histories hand down from one to the next."""
    return Handles()


@cache
def _folders() -> dict[Path, Image]:
    """Make this process's folders, and an image of each as it is when nothing was written yet.

    The same files serve every history: opening a fresh one costs more than a history may. What
    was imported by now stays: the collector needn't look at it again and again.
    """
    gc.freeze()
    gc.set_threshold(50_000)  # a history leaves little behind, and is short
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    made = {}
    for number in range(CONTAINERS + SPARES):
        folder = root / str(number)
        ids = (f"0199a0c4-0000-7000-{number:04x}-{n:012x}" for n in count())
        LocalStore.open(folder, tables=TABLES, ids=partial(next, ids)).close()
        made[folder] = image_of(folder)
    return made


def shortened(seed: int, actions: int | None = None) -> tuple[int, ...]:
    """Return as few of the steps as still fail in the same way, left out part by part."""
    kinds = {finding.partition(":")[0] for finding in run(seed, actions=actions).findings}
    kept = list(plan_of(seed, actions).actions)
    width = len(kept) // 2
    while width:
        start = 0
        while start < len(kept):
            tried = kept[:start] + kept[start + width :]
            found = {
                finding.partition(":")[0] for finding in run(seed, tried, actions=actions).findings
            }
            if found & kinds:
                kept = tried
            else:
                start += width
        width //= 2
    return tuple(kept)


def how_to_replay(seed: int, actions: int | None = None) -> str:
    """Return the one command that runs what is left of a failing history."""
    only = ",".join(map(str, shortened(seed, actions)))
    planned = "" if actions is None else f" --actions {actions}"
    return f"python -m tests.simulation.histories --first {seed}{planned} --only {only}"


def run_all(seeds: Sequence[int], jobs: int, actions: int | None = None) -> Iterator[Report]:
    """Run histories in processes; in any order."""
    one = partial(run, actions=actions)
    if jobs == 1:
        yield from map(one, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(one, seeds, chunksize=5)


def main() -> None:
    """Run, report, and exit with 1 when a history failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--actions", type=int, help="planned in each, else by the seed")
    parser.add_argument("--only", help="the numbers of the steps to take, from a shortened history")
    given = parser.parse_args()
    if given.only is not None:
        report = run(
            given.first, [int(number) for number in given.only.split(",")], actions=given.actions
        )
        print("\n".join([report.trace, *report.findings]))
        sys.exit(bool(report.findings))
    began, reports = CLOCK.monotonic(), []
    seeds = range(given.first, given.first + given.histories)
    for report in run_all(seeds, given.jobs, given.actions):
        reports.append(report)
        if len(reports) % 500 == 0:
            print(f"  {len(reports)} histories", flush=True)
    took = CLOCK.monotonic() - began
    count = len(reports)
    print(
        f"{count} histories in {took:.1f} s ({count / took:.0f}/s);"
        f" mean {sum(r.steps for r in reports) / count:.0f} steps,"
        f" {sum(r.crashes for r in reports) / count:.1f} crashes"
        f" (at least {min(r.crashes for r in reports)}),"
        f" {sum(r.conflicts for r in reports) / count:.1f} conflicts"
        f" ({sum(r.conflicts == 0 for r in reports)} without)"
    )
    failed = sorted((r for r in reports if r.findings), key=lambda r: r.seed)
    for report in failed[:5]:
        print(f"seed {report.seed} fails: {report.findings[0]}")
        print(f"  {how_to_replay(report.seed, given.actions)}")
    if failed:
        print(f"{len(failed)} failed: {[report.seed for report in failed[:50]]}")
        sys.exit(1)


if __name__ == "__main__":
    main()
