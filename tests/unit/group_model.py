"""What groups of transactions should do, in plain dicts, and how Hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from local_store import (
    BufferFull,
    Delete,
    Insert,
    InvalidWrite,
    RowNotFound,
    TransactionIdReused,
    Update,
    VersionMismatch,
)
from local_store.clock import new_id
from tests.unit.buffer_tables import OTHER, USER

TRANSACTIONS_MAX = 12
LEVELS = ("notes", "comments", "replies")
PARENT = {"comments": "note_id", "replies": "comment_id"}
IDS = {table: [new_id() for _ in range(3)] for table in LEVELS}

Key = tuple[str, str]
Op = Insert | Update | Delete


@dataclass(frozen=True)
class Transaction:
    """What one caller asks for."""

    txn_id: str
    user: str
    ops: tuple[Op, ...]

    @property
    def content(self) -> object:
        """What makes it the same transaction again; the expectation isn't part of it."""
        return self.user, [
            op if isinstance(op, Insert) else replace(op, expected_version=None) for op in self.ops
        ]


@dataclass(frozen=True)
class Known:
    """A row as the model has it; `text` is None in `values` of a row that was deleted."""

    user: str
    version: int
    values: dict[str, Any] | None


class Model:
    """What the store should hold and answer, one transaction at a time."""

    def __init__(self) -> None:
        self.rows: dict[Key, Known] = {}
        self.log: dict[str, Transaction] = {}
        self.undelivered = 0

    def apply(self, txn: Transaction) -> int | type[Exception]:
        """Return the seq that the transaction gets, or got before, or what refuses it."""
        if txn.txn_id in self.log:
            if self.log[txn.txn_id].content != txn.content:
                return TransactionIdReused
            return list(self.log).index(txn.txn_id) + 1
        if self.undelivered >= TRANSACTIONS_MAX:
            return BufferFull
        before = dict(self.rows)
        for op in txn.ops:
            refusal = self._op(op, txn.user)
            if refusal is not None:
                self.rows = before
                return refusal
        self.log[txn.txn_id] = txn
        self.undelivered += 1
        return len(self.log)

    def _op(self, op: Op, user: str) -> type[Exception] | None:
        if isinstance(op, Insert):
            return self._insert((op.table, op.values["id"]), op, user)
        key = (op.table, op.id)
        known = self.rows.get(key)
        if known is None or known.values is None or known.user != user:
            return RowNotFound
        if op.expected_version not in (None, known.version):
            return VersionMismatch
        if isinstance(op, Delete):
            self._delete(key)
        else:
            values = {**known.values, **op.changes}
            self.rows[key] = Known(user, known.version + 1, values)
        return None

    def _insert(self, key: Key, op: Insert, user: str) -> type[Exception] | None:
        known = self.rows.get(key)
        if known is not None and (known.values is not None or known.user != user):
            return InvalidWrite
        if op.table in PARENT:
            above = LEVELS[LEVELS.index(op.table) - 1]
            parent = self.rows.get((above, op.values[PARENT[op.table]]))
            if parent is not None and parent.values is None and parent.user == user:
                return InvalidWrite
        self.rows[key] = Known(user, known.version + 1 if known else 1, dict(op.values))
        return None

    def _delete(self, key: Key) -> None:
        gone = self.rows[key]
        self.rows[key] = Known(gone.user, gone.version + 1, None)
        for other, row in list(self.rows.items()):
            column = PARENT.get(other[0])
            hangs_on = (
                column is not None and LEVELS.index(other[0]) == LEVELS.index(key[0]) + 1
            ) and (row.values or {}).get(column) == key[1]
            if hangs_on and row.user == gone.user:
                self._delete(other)


users = st.sampled_from([USER, OTHER])
texts = st.sampled_from(["a", "b", None, "é'🙂"])
versions = st.one_of(st.none(), st.integers(1, 4))
numbers = st.integers(0, 2)


@st.composite
def an_op(draw: Any) -> Op:
    table, row_id = draw(st.sampled_from(LEVELS)), None
    row_id = IDS[table][draw(numbers)]
    kind = draw(st.sampled_from(["insert", "insert", "update", "update", "delete"]))
    if kind == "insert":
        values = {"id": row_id, "text": draw(texts)}
        if table in PARENT:
            values[PARENT[table]] = IDS[LEVELS[LEVELS.index(table) - 1]][draw(numbers)]
        return Insert(table, values)
    if kind == "update":
        return Update(table, row_id, {"text": draw(texts)}, draw(versions))
    return Delete(table, row_id, draw(versions))


@st.composite
def a_transaction(draw: Any) -> tuple[str, int, str, tuple[Op, ...]]:
    """Draw what becomes a fresh transaction, a repeat of an earlier one, or the use of its id."""
    how = draw(st.sampled_from(["fresh"] * 6 + ["repeat", "reuse"]))
    ops = draw(st.lists(an_op(), min_size=1, max_size=3))
    return how, draw(st.integers(0, 50)), draw(users), tuple(ops)


compositions = st.lists(a_transaction(), min_size=1, max_size=9)
