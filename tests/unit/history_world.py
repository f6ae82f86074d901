"""Several buffers before one modelled server, and the record of what their clients were told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_store import Column, Insert, LocalStore, TableSpec
from local_store.clock import ManualClock, new_id
from local_store.errors import LocalStoreError
from local_store.ops import Op, Outcome, Receipt, user_uuid
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.flusher import Flusher, drain
from syncer.remote import TableRead
from syncer.testkit.history import (
    History,
    LedgerRow,
    Observation,
    ParkedRecord,
    SeenRow,
    Visible,
    joined,
    observe_store,
)
from tests.simulation.remote_model import RemoteModel

USERS = ANN, BOB = "github:ann", "github:bob"
OWN = {"id": Column("uuid"), "user_id": Column("uuid"), "updated_at": Column("timestamp")}
NOTES = TableSpec(
    "notes", {**OWN, "text": Column("text"), "title": Column("text"), "due": Column("timestamp")}
)
COMMENTS = TableSpec(
    "comments",
    {**OWN, "text": Column("text"), "note_id": Column("uuid")},
    parent=("note_id", "notes"),
)
TABLES = [NOTES, COMMENTS]


@contextmanager
def opened(folder: Path, stores: int, kind: type[RemoteModel] = RemoteModel) -> Iterator[World]:
    """Give a world with so many buffers and close them at the end."""
    world = World(folder, kind)
    try:
        for number in range(stores):
            world.open(number)
        yield world
    finally:
        world.close()


@dataclass
class World:
    """Several buffers before one modelled server, and the record of what clients were told."""

    folder: Path
    kind: type[RemoteModel] = RemoteModel
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.server = self.kind({spec.name: spec for spec in TABLES})
        self.history = History(self.clock)
        self.stores: list[LocalStore] = []
        self.flushers: list[Flusher] = []
        self.repeatable: list[tuple[str, str, list[Op]]] = []

    def open(self, number: int) -> int:
        store = LocalStore.open(self.folder / str(number), tables=TABLES, clock=self.clock)
        flusher = Flusher(store, self.server, clock=self.clock, jitter=lambda: 0.5)
        self.stores[number : number + 1] = [store]
        self.flushers[number : number + 1] = [flusher]
        return number

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def restart(self, number: int) -> None:
        self.stores[number].close()
        self.open(number)

    def write(self, number: int, user: str, *ops: Op, txn_id: str | None = None) -> Receipt:
        self.clock.advance(1)
        return self.history.write(self.stores[number], ops, user_id=user, txn_id=txn_id)

    def write_untold(self, number: int, user: str, *ops: Op, happens: bool) -> str:
        """Make a call whose reply the client never got."""
        self.clock.advance(1)
        txn_id = new_id()
        self.repeatable.append((txn_id, user, list(ops)))
        with suppress(LocalStoreError), self.history.call(user, ops, txn_id) as call:
            call.unknown()
            if happens:
                self.stores[number].write(ops, user_id=user, txn_id=txn_id)
        return txn_id

    def flush(self, number: int, fault: str = "") -> None:
        self.clock.advance(60)
        left = [1]

        def fail_once(error: Exception) -> Callable[[], None]:
            def fail() -> None:
                if left[0]:
                    left[0] = 0
                    raise error

            return fail

        if fault == "lost reply":
            self.server.after_commit = fail_once(ReplyTimedOut("cut"))
        elif fault == "down":
            self.server.before_call = fail_once(RemoteUnavailable("down"))
        drain(self.flushers[number], self.clock, budget_s=5)
        self.server.before_call = self.server.after_commit = lambda: None

    def read(self, number: int, user: str) -> None:
        """Take the server's rows over, as a read through does, and record what was learned."""
        self.clock.advance(1)
        store = self.stores[number]
        as_of = store.change_counter()
        for spec in TABLES:
            [rows] = self.server.read(user_uuid(user), [TableRead(spec.name, {})])
            store.refresh(spec.name, rows, user_id=user, as_of=as_of, where={})
            for row in rows:
                held = store.get(spec.name, row["id"], user_id=user)
                if held and not held["_pending"] and held["updated_at"] == row["updated_at"]:
                    self.history.saw(store.log_id, spec.name, row["id"], row["updated_at"])
        self.clock.advance(1)

    def edit(self, row_id: str, *, versioned: bool = True, **values: Any) -> None:
        self.clock.advance(1)
        self.server.edit("notes", row_id, **values)
        version = self.server.version("notes", row_id) if versioned else None
        self.history.outside_edit("notes", row_id, values, version=version)

    def strike(self, row_id: str) -> None:
        """Delete a note and its comments as somebody with SQL would."""
        self.clock.advance(1)
        self.server.delete_row(("notes", row_id))
        self.history.outside_delete("notes", row_id)

    def discard(self, number: int, txn_id: str) -> None:
        self.stores[number].record([Outcome(txn_id, "discarded")])
        self.history.person(txn_id, "discard")

    def settle(self) -> Observation:
        for _ in range(3):
            for number in range(len(self.stores)):
                self.flush(number)
        return joined(*map(observe_store, self.stores), observe_model(self.server))


def observe_model(server: RemoteModel) -> Observation:
    rows = {
        key: SeenRow(row.user_id, dict(row.values), row.version) for key, row in server.rows.items()
    }
    ledger = [
        LedgerRow(txn_id, e.log_id, e.seq, e.user_id, e.digest, e.verdict, dict(e.versions), number)
        for number, (txn_id, e) in enumerate(server.ledger.items())
    ]
    visible = [Visible(row.user_id, row.user_id, *key) for key, row in server.rows.items()]
    parked = [
        ParkedRecord(txn_id, entry.state, log_id=entry.log_id, seq=entry.item["seq"])
        for txn_id, entry in server.parked.items()
    ]
    for (txn_id, table, row_id, outcome), record in (*server.records.items(), *server.decided):
        columns = frozenset(column.partition(".")[0] for column in record["columns"])
        key = frozenset({(table, row_id)})
        parked.append(ParkedRecord(txn_id, "conflict", key, columns or None, outcome))
    return Observation(rows, tuple(ledger), visible=tuple(visible), records=tuple(parked))


def comment(note: str, text: str) -> Insert:
    return Insert("comments", {"id": new_id(), "note_id": note, "text": text})
