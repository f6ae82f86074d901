"""What is looked at after every step, so that a promise broken on the way is seen there.

A look costs a few reads of the buffer that the step was about: it must stay cheap beside the step.
It has dice of its own, so that looking changes nothing in the world.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from local_store import BufferFull, CommitUnknown, DiskFailed, Receipt, StoreClosed, user_uuid
from syncer.errors import SyncError
from syncer.flusher import FlushLimits, FlushReport
from tests.simulation.machine import Container
from tests.simulation.model_people import OperatedModel
from tests.unit.history_world import TABLES, USERS

FOREIGN_LOOKS = 0.4  # of the steps: two reads, where the other looks are one each
NOT_ACCEPTED = (BufferFull, CommitUnknown, DiskFailed, StoreClosed, SyncError)
"""What no write may answer while the disk is in order, whatever the server does."""


class Watch:
    """Compares what buffers say with what was acknowledged and with what the server has."""

    def __init__(self, server: OperatedModel, seed: int) -> None:
        self._server, self._dice = server, Random(seed)
        self._acknowledged: dict[Path, list[str]] = {}  # a lost disk's are no longer on its own
        self._opened: dict[int, float] = {}
        self.wrong: list[str] = []

    def acknowledged(self, container: Container, receipt: Receipt) -> None:
        """Remember what a client was told."""
        self._acknowledged.setdefault(container.folder, []).append(receipt.txn_id)

    def passed(self, container: Container, sent: int, at: float, report: FlushReport) -> None:
        """Judge a pass of the flusher that began `at` a moment and made so many calls."""
        opened = self._opened.pop(id(container.flusher), None)
        if sent and opened is not None and at < opened + FlushLimits().breaker_interval_s:
            self.wrong.append("P6: a second probe within one interval of the breaker")
        if report.breaker == "open":
            self._opened[id(container.flusher)] = at if opened is None or sent else opened
        if report.pending != container.store.backlog():
            self.wrong.append(f"P12: a pass reports {report.pending} pending")

    def look(self, container: Container) -> None:
        """Judge the container that something just happened to."""
        self.wrong += self._uncounted(container)
        self.wrong += self._misplaced(container)
        if self._dice.random() < FOREIGN_LOOKS:
            self.wrong += self._foreign(container)

    def risen(self, container: Container) -> None:
        """Judge a container that was just started on what a dead process left."""
        found = container.store.damage()
        if any(found.values()):
            self.wrong.append(f"P10: a crash left damage: {found}")
        self.look(container)

    def _uncounted(self, container: Container) -> Iterator[str]:
        """What only this buffer can know of must be counted as undelivered: P1, P12."""
        mine = self._acknowledged.get(container.folder, ())
        known = self._server.ledger.keys() | self._server.parked.keys()
        alone, counted = sum(txn_id not in known for txn_id in mine), container.store.backlog()
        if counted < alone:
            yield f"P12: {alone} are undelivered, {counted} are counted"

    def _misplaced(self, container: Container) -> Iterator[str]:
        """A sampled transaction is in exactly one state, and the server agrees to it: P1, P12."""
        mine = self._acknowledged.get(container.folder)
        if not mine:
            return
        txn_id = self._dice.choice(mine)
        state = container.store.state(txn_id)
        final, parked = self._server.ledger.get(txn_id), self._server.parked.get(txn_id)
        if final is not None and parked is not None and not self._refused_twin(txn_id):
            yield f"P1: {txn_id} is in the ledger and parked"
        there = (final and final.verdict) or (parked and parked.state)
        if state is None and there is None:
            yield f"P1: {txn_id} was acknowledged and is in no state"
        if state in ("applied", "discarded", "superseded") and state != there:
            yield f"P12: {txn_id} counts as {state}, the server has it as {there}"
        if state in ("dead", "conflict") and there is None:
            yield f"P12: {txn_id} counts as {state}, the server doesn't know it"

    def _refused_twin(self, txn_id: str) -> bool:
        return self._server.ledger[txn_id].digest != self._server.parked[txn_id].item["digest"]

    def _foreign(self, container: Container) -> Iterator[str]:
        """Nobody reads, or hears of, a row of somebody else: P4."""
        user, spec = self._dice.choice(USERS), self._dice.choice(TABLES)
        for row in container.store.select(spec.name, user_id=user, limit=3):
            if row["user_id"] != user_uuid(user):
                yield f"P4: {user} was shown {spec.name}/{row['id']}"
        there = [key for key, row in self._server.rows.items() if row.user_id != user_uuid(user)]
        if there:
            table, row_id = self._dice.choice(there)
            if container.store.get(table, row_id, user_id=user) is not None:
                yield f"P4: {user} was given {table}/{row_id}"
