"""The store against plain dicts: any sequence of writes, refusals, answers and restarts."""

from __future__ import annotations

import shutil
import tempfile
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from local_store import (
    Delete,
    Insert,
    InvalidWrite,
    LocalStore,
    Outcome,
    RowNotFound,
    Update,
    VersionMismatch,
)
from local_store.clock import ManualClock, new_id
from local_store.ops import Selection
from tests.unit.buffer_tables import OTHER, TABLES, USER, waiting

USERS = st.sampled_from([USER, OTHER])
TEXTS = st.sampled_from(["", "a", "b", None, "é'🙂"])
PARENT = {"comments": ("note_id", "notes"), "replies": ("comment_id", "comments")}
CHILD = {"notes": "comments", "comments": "replies"}
ROW_TABLES = st.sampled_from(["notes", "comments", "replies"])


class Model:
    """What the store should hold, in the simplest words."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.versions: dict[tuple[str, str], int] = {}
        self.owners: dict[tuple[str, str], str] = {}
        self.log: dict[str, tuple[str, set[tuple[str, str]]]] = {}  # txn_id → state, rows
        self.changes: dict[str, tuple[Any, set[tuple[str, str]]]] = {}  # txn_id → op, rows
        self.confirmed: set[str] = set()

    def replay(self) -> None:
        """Make the rows anew from all that wasn't discarded; what changes by it is a change."""
        before, self.rows = self.rows, {}
        for txn_id, (op, keys) in self.changes.items():
            if self.log[txn_id][0] == "discarded":
                continue
            key = (op.table, op.values["id"] if isinstance(op, Insert) else op.id)
            if isinstance(op, Insert):
                self.rows[key] = {name: v for name, v in op.values.items() if name != "id"}
            elif isinstance(op, Update) and key in self.rows:
                self.rows[key] = {**self.rows[key], **op.changes}
            elif isinstance(op, Delete):
                self.rows = {other: row for other, row in self.rows.items() if other not in keys}
        for key in before.keys() | self.rows.keys():
            self.versions[key] += before.get(key) != self.rows.get(key)

    def delete(self, key: tuple[str, str]) -> set[tuple[str, str]]:
        touched = {key}
        del self.rows[key]
        self.versions[key] += 1
        child = CHILD.get(key[0])
        for other, row in list(self.rows.items()):
            same_owner = self.owners[other] == self.owners[key]
            if other[0] == child and row[PARENT[child][0]] == key[1] and same_owner:
                touched |= self.delete(other)
        return touched

    def pending(self, key: tuple[str, str]) -> bool:
        final = ("applied", "discarded")
        return any(state not in final and key in keys for state, keys in self.log.values())


class StoreMachine(RuleBasedStateMachine):
    """Each rule does one thing to the store and to the model; the invariants compare them."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.clock = ManualClock()
        self.model = Model()
        self.stamped: dict[Any, Any] = {}
        self.store = self.open()

    def open(self) -> LocalStore:
        return LocalStore.open(self.folder, tables=TABLES, clock=self.clock)

    def write(self, user: str, ops: list[Any], touched: set[tuple[str, str]]) -> None:
        receipt = self.store.write(ops, user_id=user)
        assert receipt.seq == len(self.model.log) + 1
        self.model.log[receipt.txn_id] = ("pending", touched)
        self.model.changes[receipt.txn_id] = (ops[0], touched)

    @rule(target=keys, user=USERS, text=TEXTS)
    def insert_note(self, user: str, text: str | None) -> Any:
        key = ("notes", new_id())
        self.write(user, [Insert("notes", {"id": key[1], "text": text})], {key})
        self.model.rows[key] = {"text": text}
        self.model.versions[key], self.model.owners[key] = 1, user
        return key

    @rule(target=keys, parent=keys, text=TEXTS)
    def insert_child(self, parent: tuple[str, str], text: str | None) -> Any:
        table = CHILD.get(parent[0])
        if table is None:
            return multiple()
        key, column, user = (table, new_id()), PARENT[table][0], self.model.owners[parent]
        op = Insert(table, {"id": key[1], "text": text, column: parent[1]})
        if parent not in self.model.rows:
            with pytest.raises(InvalidWrite, match="deleted"):
                self.store.write([op], user_id=user)
            return multiple()
        self.write(user, [op], {key})
        self.model.rows[key] = {"text": text, column: parent[1]}
        self.model.versions[key], self.model.owners[key] = 1, user
        return key

    @rule(key=keys, user=USERS, text=TEXTS, guess=st.integers(0, 2))
    def update(self, key: tuple[str, str], user: str, text: str | None, guess: int) -> None:
        expected = None if guess == 0 else self.model.versions[key] + guess - 1
        op = Update(*key, {"text": text}, expected_version=expected)
        if key not in self.model.rows or self.model.owners[key] != user:
            with pytest.raises(RowNotFound):
                self.store.write([op], user_id=user)
        elif guess == 2:
            with pytest.raises(VersionMismatch):
                self.store.write([op], user_id=user)
        else:
            self.write(user, [op], {key})
            self.model.rows[key]["text"] = text
            self.model.versions[key] += 1

    @rule(key=keys)
    def delete(self, key: tuple[str, str]) -> None:
        user = self.model.owners[key]
        if key not in self.model.rows:
            with pytest.raises(RowNotFound):
                self.store.write([Delete(*key)], user_id=user)
            return
        touched = self.model.delete(key)
        self.write(user, [Delete(*key)], touched)

    @rule(key=keys, text=TEXTS)
    def insert_again(self, key: tuple[str, str], text: str | None) -> None:
        if key[0] != "notes":
            return
        op, user = Insert("notes", {"id": key[1], "text": text}), self.model.owners[key]
        if key in self.model.rows:
            with pytest.raises(InvalidWrite, match="taken"):
                self.store.write([op], user_id=user)
            return
        self.write(user, [op], {key})
        self.model.rows[key] = {"text": text}
        self.model.versions[key] += 1

    @rule(first=keys, second=keys, text=TEXTS)
    def refused_transaction(self, first: Any, second: Any, text: str | None) -> None:
        ops = [Insert("notes", {"text": text}), Update(*first, {"text": "x"}), Delete(*second)]
        before = deepcopy(self.store.stats())
        with pytest.raises((InvalidWrite, VersionMismatch)):
            self.store.write([*ops, Update("notes", new_id(), {"text": "x"})], user_id=USER)
        assert self.store.stats() == before

    @rule(
        nth=st.integers(0, 20),
        state=st.sampled_from(["applied", "applied", "held", "conflict", "dead", "discarded"]),
    )
    def record(self, nth: int, state: Any) -> None:
        if nth >= len(self.model.log):
            return
        txn_id = list(self.model.log)[nth]
        known, keys = self.model.log[txn_id]
        inserts = isinstance(self.model.changes[txn_id][0], Insert)
        if state == "discarded" and (inserts or txn_id in self.model.confirmed):
            return  # then the server says what became of the row
        for _ in range(2):  # the second is a duplicate
            self.store.record([Outcome(txn_id, state, retry_after_s=5.0)])
        if known not in ("applied", "discarded"):
            self.model.log[txn_id] = (state, keys)
            if state == "applied":
                self.model.confirmed.add(txn_id)
            if state == "discarded":
                self.model.replay()
        self.clock.advance(1)

    @rule()
    def reopen(self) -> None:
        applied = [txn for txn, (state, _) in self.model.log.items() if state == "applied"]
        assert self.store.reopen(Selection()) == len(applied)
        for txn_id in applied:
            self.model.log[txn_id] = ("pending", self.model.log[txn_id][1])

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.open()

    @invariant()
    def rows_agree(self) -> None:
        for user in (USER, OTHER):
            for table in ("notes", "comments", "replies"):
                found = {
                    (table, row["id"]): (row["text"], row["_version"], row["_pending"])
                    for row in self.store.select(table, user_id=user, limit=1_000)
                }
                assert found == {
                    key: (row["text"], self.model.versions[key], self.model.pending(key))
                    for key, row in self.model.rows.items()
                    if key[0] == table and self.model.owners[key] == user
                }

    @invariant()
    def a_stamp_stands_for_one_state(self) -> None:
        for user in (USER, OTHER):
            for table, child in CHILD.items():
                ids = [row_id for name, row_id in self.model.versions if name == table]
                found = self.store.aggregates(table, ids, user_id=user)
                known = {row_id: aggregate.stamp for row_id, aggregate in found.items()}
                for row_id, aggregate in found.items():
                    place = (user, table, row_id, aggregate.stamp)
                    assert self.stamped.setdefault(place, aggregate.rows) == aggregate.rows
                    where = {PARENT[child][0]: row_id}
                    assert aggregate.rows == {
                        table: self.store.select(table, user_id=user, where={"id": row_id}),
                        child: self.store.select(child, user_id=user, where=where),
                    }
                again = self.store.aggregates(table, ids, user_id=user, known=known)
                assert all(aggregate.rows is None for aggregate in again.values())

    @invariant()
    def log_agrees(self) -> None:
        entries = self.store.entries()
        assert [(entry.txn_id, entry.state) for entry in entries] == [
            (txn_id, state) for txn_id, (state, _) in self.model.log.items()
        ]
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        states = [state for state, _ in self.model.log.values()]
        stats = self.store.stats()
        assert stats["pending"] == sum(state in ("pending", "held") for state in states)
        assert stats["parked"] == sum(state in ("conflict", "dead") for state in states)
        for txn in waiting(self.store):
            expected = ("conflict", "dead") if txn.parked else ("pending", "held")
            assert self.model.log[txn.txn_id][0] in expected

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreAgainstPlainDicts = StoreMachine.TestCase
