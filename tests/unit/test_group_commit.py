"""Callers who wait together share one sync; each gets its own answer, whatever the others get."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from local_store import (
    BufferFull,
    CommitUnknown,
    Insert,
    LocalStore,
    StoreClosed,
    TransactionIdReused,
    Update,
    VersionMismatch,
)
from local_store.clock import SystemClock, new_id
from local_store.group_commit import GroupCommit
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting

DEADLINE_S = 30


class Gate(SystemClock):
    """A clock whose sleepers wait until the gate is opened: a sync as long as we like."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def sleep(self, seconds: float) -> None:
        self.entered.set()
        assert self.opened.wait(DEADLINE_S)


@dataclass
class Held:
    """A store whose next sync of the log is held until `gate.opened` is set."""

    store: LocalStore
    disk: DiskFaults
    gate: Gate

    def queued(self, count: int) -> None:
        """Wait until so many callers wait behind the one in the sync."""
        assert self.gate.entered.wait(DEADLINE_S)
        for _ in range(DEADLINE_S * 1_000):
            if len(self.store._group._waiting) >= count:
                return
            self.gate.opened.wait(0.001)
        pytest.fail(f"only {len(self.store._group._waiting)} callers wait")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    gate = Gate()
    with (
        DiskFaults(tmp_path, clock=gate) as disk,
        LocalStore.open(tmp_path, tables=TABLES) as store,
    ):
        add(store, text="before")
        disk.slow_sync(1, "-wal", times=1)
        yield Held(store, disk, gate)
        gate.opened.set()


def start(target: object, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=(n,)) for n in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    return threads


def finish(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_threads_that_wait_for_one_sync_share_the_next(held: Held):
    syncs = held.disk.count("sync", "-wal")
    threads = start(lambda n: add(held.store, text=str(n)), 40)
    held.queued(39)
    held.gate.opened.set()
    finish(threads)
    assert held.disk.count("sync", "-wal") == syncs + 2
    assert [txn.seq for txn in waiting(held.store)] == list(range(1, 42))


def test_coroutines_share_a_sync_and_the_event_loop_goes_on_meanwhile(held: Held):
    syncs, turns = held.disk.count("sync", "-wal"), 0

    async def write(n: int) -> int:
        receipt = await held.store.write_async([Insert("notes", {"number": n})], user_id=USER)
        return receipt.seq

    async def main() -> list[int]:
        nonlocal turns
        writes = [asyncio.create_task(write(n)) for n in range(40)]
        while not held.gate.entered.is_set():
            await asyncio.sleep(0)
        for _ in range(100):  # the disk is busy, the loop isn't
            await asyncio.sleep(0)
            turns += 1
        assert not any(task.done() for task in writes)
        held.gate.opened.set()
        return await asyncio.gather(*writes)

    assert sorted(asyncio.run(main())) == list(range(2, 42))
    assert turns == 100
    assert held.disk.count("sync", "-wal") <= syncs + 3


def test_a_cancelled_coroutine_takes_nobody_along(held: Held):
    async def write(txn_id: str) -> str:
        receipt = await held.store.write_async([Insert("notes", {})], user_id=USER, txn_id=txn_id)
        return receipt.txn_id

    async def main() -> None:
        ids = [new_id() for _ in range(5)]
        tasks = [asyncio.create_task(write(txn_id)) for txn_id in ids]
        while not held.gate.entered.is_set():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks[2].cancel()
        held.gate.opened.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[2], asyncio.CancelledError)
        assert [found for n, found in enumerate(done) if n != 2] == [*ids[:2], *ids[3:]]

    asyncio.run(main())
    assert len(waiting(held.store)) == 6  # the cancelled one may have happened, and did


def test_of_a_group_only_the_refused_fail_and_one_expected_version_wins_once(held: Held):
    (first,) = held.store.select("notes", user_id=USER)
    used, outcomes = new_id(), []

    def write(n: int) -> None:
        change = Update("notes", first["id"], {"number": n}, expected_version=1)
        clash = [Insert("notes", {"number": n})]
        try:
            if n < 5:
                held.store.write([change], user_id=USER)
            elif n < 8:
                held.store.write(clash, user_id=USER, txn_id=used)
            else:
                held.store.write(clash, user_id=USER)
            outcomes.append("ok" if n >= 8 else n // 5)
        except (VersionMismatch, TransactionIdReused) as error:
            outcomes.append(type(error).__name__)

    leader = start(lambda _: add(held.store), 1)
    assert held.gate.entered.wait(DEADLINE_S)
    threads = start(write, 20)
    held.queued(20)
    held.gate.opened.set()
    finish(leader + threads)
    assert outcomes.count("VersionMismatch") == 4
    assert outcomes.count("TransactionIdReused") == 2
    assert (outcomes.count(0), outcomes.count(1), outcomes.count("ok")) == (1, 1, 12)
    assert [txn.seq for txn in waiting(held.store)] == list(range(1, 17))


def test_a_failed_sync_is_told_to_each_with_its_own_id(tmp_path: Path):
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        ids, told = [new_id() for _ in range(8)], []
        disk.fail_sync("-wal", times=1)

        async def write(txn_id: str) -> None:
            try:
                await store.write_async([Insert("notes", {})], user_id=USER, txn_id=txn_id)
            except CommitUnknown as error:
                told.append((txn_id, error.txn_id))

        async def main() -> None:
            await asyncio.gather(*(write(txn_id) for txn_id in ids))
            assert told
            assert all(mine == theirs for mine, theirs in told)
            await asyncio.gather(*(write(txn_id) for txn_id in ids))  # each repeats its own

        asyncio.run(main())
        assert len(waiting(store)) == 9


def test_a_full_buffer_refuses_the_rest_of_a_group(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, buffer_transactions_max=3) as store:

        async def main() -> list[object]:
            writes = [store.write_async([Insert("notes", {})], user_id=USER) for _ in range(8)]
            return await asyncio.gather(*writes, return_exceptions=True)

        found = asyncio.run(main())
        assert sum(isinstance(one, BufferFull) for one in found) == 5
        assert store.stats()["pending"] == 3


def test_closing_waits_for_those_who_were_admitted_and_refuses_the_next(held: Held):
    threads = start(lambda n: add(held.store, text=str(n)), 10)
    held.queued(9)
    closing = start(lambda _: held.store.close(), 1)
    while not held.store._group._closed:
        held.gate.opened.wait(0.001)
    with pytest.raises(StoreClosed):
        add(held.store)
    held.gate.opened.set()
    finish(threads + closing)


def test_a_group_is_bounded_in_number_and_in_bytes():
    sizes: list[list[int]] = []
    go = threading.Event()

    @dataclass
    class Item:
        size_bytes: int

    def commit(items: Sequence[Item]) -> list[int]:
        assert go.wait(DEADLINE_S)
        sizes.append([item.size_bytes for item in items])
        return [0] * len(items)

    front: GroupCommit[Item, int] = GroupCommit(commit, lambda: None, SystemClock().monotonic)
    weights = [1] + [3 * 1024 * 1024] * 3 + [1] * 300

    async def main() -> None:
        tasks = [asyncio.create_task(front.submit_async(Item(weight))) for weight in weights]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    front.close()
    assert sum(len(group) for group in sizes) == len(weights)
    assert max(len(group) for group in sizes) <= 256
    assert all(len(group) == 1 or sum(group) <= 4 * 1024 * 1024 for group in sizes)


def test_what_fails_behind_a_group_is_nobodys_loss():
    def after() -> None:
        raise RuntimeError("behind")

    @dataclass
    class Item:
        size_bytes: int = 1

    front: GroupCommit[Item, int] = GroupCommit(lambda items: [1] * len(items), after, lambda: 0.0)
    assert [front.submit(Item()) for _ in range(3)] == [1, 1, 1]

    async def main() -> None:
        assert await asyncio.gather(*(front.submit_async(Item()) for _ in range(3))) == [1, 1, 1]

    asyncio.run(main())
    front.close()


def test_listing_behind_a_write_leaves_the_next_commit_synced(tmp_path: Path):
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        before = disk.count("sync", "-wal")
        assert len(waiting(store)) == 1  # lists, without a sync
        assert disk.count("sync", "-wal") == before
        add(store)
        assert disk.count("sync", "-wal") == before + 1


def test_a_leader_waits_a_little_for_those_who_were_in_the_last_group():
    """Callers in step: without the wait the first of each round would have a commit of its own."""

    @dataclass
    class Item:
        size_bytes: int = 1

    sizes: list[int] = []
    moments = iter(range(0, 1_000_000, 3_600))  # each commit takes an hour: patience at its limit
    first = threading.Event()

    def commit(items: Sequence[Item]) -> list[int]:
        sizes.append(len(items))
        if len(sizes) == 1:
            assert first.wait(DEADLINE_S)
        return [1] * len(items)

    front: GroupCommit[Item, int] = GroupCommit(
        commit, lambda: None, lambda: next(moments), patience_max_s=DEADLINE_S
    )
    together = threading.Barrier(8)
    leader = start(lambda _: front.submit(Item()), 1)
    while not sizes:
        first.wait(0.001)

    def work(_: int) -> None:
        for _ in range(5):
            together.wait(DEADLINE_S)
            front.submit(Item())

    threads = start(work, 8)
    while len(front._waiting) < 8:
        first.wait(0.001)
    first.set()
    finish(leader + threads)
    front.close()
    assert sizes == [1, 8, 8, 8, 8, 8]


def test_a_signal_between_two_lines_of_the_leader_keeps_nobody_waiting_for_ever():
    """Ctrl-C may strike anywhere: after the group was taken, before it was committed."""
    looks = iter([KeyboardInterrupt()])

    def monotonic() -> float:
        error = next(looks, None)
        if error is not None:
            raise error
        return 0.0

    group: GroupCommit[Plain, str] = GroupCommit(
        lambda items: [item.name for item in items], lambda: None, monotonic
    )
    with pytest.raises(KeyboardInterrupt):
        group.submit(Plain("first"))
    assert group.submit(Plain("second")) == "second"
    group.close()


@dataclass
class Plain:
    name: str
    size_bytes: int = 1
