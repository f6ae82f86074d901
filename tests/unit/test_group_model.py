"""Groups against plain dicts: whoever shares a commit, each transaction fares as if it were alone.

Hypothesis chooses who is in a group, who in it is refused, when a sync fails and when the process
dies. The clock, which the front asks before each commit, holds the first caller there until the
others of the next group have queued; no timing decides who is in it.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from local_store import (
    CommitUnknown,
    Insert,
    LocalStore,
    Receipt,
    opening,
)
from local_store.clock import ManualClock, new_id
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import OTHER, TABLES, USER, settle_all, waiting
from tests.unit.group_model import (
    LEVELS,
    PARENT,
    TRANSACTIONS_MAX,
    Model,
    Op,
    Transaction,
    compositions,
)

DEADLINE_S = 30


class Gate(ManualClock):
    """A clock that can hold the next group before its commit, and tells of a sync under way.

    The wall time moves with each look, so that one `accepted_at` means one group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.taken, self.opened = False, threading.Event(), threading.Event()
        self.in_sync: Any = None

    def monotonic(self) -> float:
        if self.armed:
            self.armed = False
            self.taken.set()
            assert self.opened.wait(DEADLINE_S)
        return super().monotonic()

    def now(self) -> datetime:
        super().advance(0.001)
        return super().now()

    def sleep(self, seconds: float) -> None:
        self.in_sync()

    def arm(self) -> None:
        self.taken.clear()
        self.opened.clear()
        self.armed = True


class GroupMachine(RuleBasedStateMachine):
    """Each rule commits groups, or does to the store what happens between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Gate()
        self.disk = DiskFaults(self.folder, clock=self.clock)
        self.disk.__enter__()
        self.model = Model()
        self.asked: list[Transaction] = []
        self.store = self.open()

    def open(self) -> LocalStore:
        return LocalStore.open(
            self.folder,
            tables=TABLES,
            clock=self.clock,
            buffer_transactions_max=TRANSACTIONS_MAX,
        )

    def named(self, drawn: list[tuple[str, int, str, tuple[Op, ...]]]) -> list[Transaction]:
        """Give what was drawn its ids; repeats may be of one in the same group."""
        first = len(self.asked)
        for how, nth, user, ops in drawn:
            earlier = self.asked[nth % len(self.asked)] if self.asked else None
            if how == "repeat" and earlier is not None:
                self.asked.append(earlier)
            elif how == "reuse" and earlier is not None:
                self.asked.append(Transaction(earlier.txn_id, user, ops))
            else:
                self.asked.append(Transaction(new_id(), user, ops))
        return self.asked[first:]

    def together(self, txns: list[Transaction]) -> list[Any]:
        """Commit the first alone and all others in one group; returns what each was told."""
        told: list[Any] = [None] * len(txns)

        def lead() -> None:
            told[0] = attempt(self.store, txns[0])

        async def follow() -> None:
            calls = [
                self.store.write_async(list(txn.ops), user_id=txn.user, txn_id=txn.txn_id)
                for txn in txns[1:]
            ]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)  # each runs up to its wait, in this order
            self.clock.opened.set()
            told[1:] = await asyncio.gather(*tasks, return_exceptions=True)

        self.clock.arm()
        leader = threading.Thread(target=lead)
        leader.start()
        assert self.clock.taken.wait(DEADLINE_S)
        asyncio.run(follow())
        leader.join(DEADLINE_S)
        return told

    def compare(self, txns: list[Transaction], told: list[Any]) -> None:
        """Hold each answer to the model's; the fresh receipts of a group bear one moment."""
        moments: list[set[str]] = [set(), set()]
        for number, (txn, answer) in enumerate(zip(txns, told, strict=True)):
            before = len(self.model.log)
            expected = self.model.apply(txn)
            if isinstance(expected, int):
                assert isinstance(answer, Receipt), (txn, answer)
                assert (answer.txn_id, answer.seq) == (txn.txn_id, expected)
                if len(self.model.log) > before:
                    moments[number > 0].add(answer.accepted_at)
            else:
                assert type(answer) is expected, (txn, answer)
        assert max(len(found) for found in moments) <= 1
        assert not moments[0] & moments[1]

    @rule(drawn=compositions)
    def groups(self, drawn: Any) -> None:
        txns = self.named(drawn)
        self.compare(txns, self.together(txns))

    @rule(drawn=compositions)
    def a_group_meets_a_failing_sync(self, drawn: Any) -> None:
        leader, txns = self.ahead(), self.named(drawn)
        fault = self.disk.fail_sync("-wal", nth=2)
        told = self.together([leader, *txns])
        fault.release()
        if fault.fired:
            self.compare([leader], told[:1])
            for txn, answer in zip(txns, told[1:], strict=True):
                assert isinstance(answer, CommitUnknown)
                assert answer.txn_id == txn.txn_id
            self.repeat(txns)
        else:  # nothing was left to commit: all were refused, or repeats
            self.compare([leader, *txns], told)

    @rule(drawn=compositions)
    def the_process_dies_in_a_sync(self, drawn: Any) -> None:
        leader, txns = self.ahead(), self.named(drawn)
        images: list[dict[str, bytes]] = []
        self.clock.in_sync = lambda: images.append(self.image())
        fault = self.disk.slow_sync(1, "-wal", times=2)
        told = self.together([leader, *txns])
        fault.release()
        self.compare([leader], told[:1])
        if len(images) < 2:
            self.compare(txns, told[1:])
        else:
            self.live_again(images[1])
            self.repeat(txns)

    def ahead(self) -> Transaction:
        """Make room for a group, and return what goes ahead of it and isn't refused.

        Something is written before: a fresh write-ahead log has a sync of its own for its head.
        """
        self.drain()
        first, leader = (
            Transaction(new_id(), USER, (Insert("notes", {"id": new_id(), "text": text}),))
            for text in ("first", "ahead")
        )
        self.compare([first], [attempt(self.store, first)])
        return leader

    def repeat(self, txns: list[Transaction]) -> None:
        """Repeat a group without an answer: the file holds all of it, or none."""
        found = {entry.txn_id for entry in self.store.entries()}
        if found - self.model.log.keys():
            for txn in txns:
                self.model.apply(txn)
        assert found == self.model.log.keys()
        self.compare(txns, self.together(txns))

    def image(self) -> dict[str, bytes]:
        """Return what a process leaves that dies now."""
        paths = [path for path in self.folder.iterdir() if not path.name.endswith("-shm")]
        return {path.name: path.read_bytes() for path in paths}

    def live_again(self, image: dict[str, bytes]) -> None:
        """Start a process on an image; in place, since a copy would be a log of its own."""
        self.store.close()
        for name in ("buffer.db-wal", "buffer.db-shm"):
            (self.folder / name).unlink(missing_ok=True)
        for name, content in image.items():
            (self.folder / name).write_bytes(content)
        self.store = self.open()

    @rule()
    def the_process_dies_between_groups(self) -> None:
        with open(self.folder / opening.LOCK_NAME) as lock, opening.folder_lock(lock.fileno()):
            image = self.image()  # nobody lists or checkpoints meanwhile
        self.live_again(image)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.open()

    @rule()
    def drain(self) -> None:
        settle_all(self.store)
        self.model.undelivered = 0

    @invariant()
    def rows_agree(self) -> None:
        for user in (USER, OTHER):
            for table in LEVELS:
                found = {
                    row["id"]: (row["_version"], row["text"], row.get(PARENT.get(table)))
                    for row in self.store.select(table, user_id=user, limit=1_000)
                }
                assert found == {
                    key[1]: (row.version, row.values["text"], row.values.get(PARENT.get(table)))
                    for key, row in self.model.rows.items()
                    if key[0] == table and row.user == user and row.values is not None
                }

    @invariant()
    def log_agrees(self) -> None:
        entries = self.store.entries()
        assert [entry.txn_id for entry in entries] == list(self.model.log)
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        assert len(waiting(self.store)) == self.model.undelivered

    def teardown(self) -> None:
        with suppress(Exception):
            self.store.close()
        self.disk.__exit__(None, None, None)
        shutil.rmtree(self.folder)


def attempt(store: LocalStore, txn: Transaction) -> Any:
    """Return what the caller is told, the receipt or the error."""
    try:
        return store.write(list(txn.ops), user_id=txn.user, txn_id=txn.txn_id)
    except Exception as error:
        return error


GroupMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestGroupsAgainstPlainDicts = GroupMachine.TestCase
