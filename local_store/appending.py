"""What a group of transactions adds to the file: their records, the touches, and who is refused.

Everything that needs no disk was done in the callers' time. Here each transaction meets the rows as
the ones before it left them, gets its place in the log and its checksum; then the group goes to
SQLite as one statement for the records and one for the touches.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from local_store import rows, views
from local_store.decoding import encode_schemas
from local_store.errors import (
    BufferFull,
    InvalidWrite,
    LocalStoreError,
    RowNotFound,
    TransactionIdReused,
    VersionMismatch,
)
from local_store.listing import list_new, unlisted
from local_store.memory import Memory, Proposal, Tail
from local_store.op_log import Marks, touched_by
from local_store.ops import Receipt, Row, TableSpec, WireOp
from local_store.schema import crc_of
from local_store.views import Key, View

ROWS_PER_INSERT = 64  # each size up to it has a prepared statement of its own

_INSERT = (
    "INSERT INTO op_log (position, log, seq, user_id, txn_id, digest, accepted_at, size_bytes,"
    " total_bytes, content_crc, schemas, ops, before, children) VALUES "
)
COLUMNS = 14
_PLACES = "(" + ",".join("?" * COLUMNS) + ")"
_NOTHING = "[null]"  # what most single ops replaced and took along


def _json(values: Sequence[Any]) -> str:
    return _NOTHING if len(values) == 1 and values[0] is None else orjson.dumps(values).decode()


class Group:
    """One group on its way into the file, inside its SQLite transaction."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        tables: Mapping[str, TableSpec],
        memory: Memory,
        marks: Marks,
        accepted_at: str,
        undelivered_max: int,
        undelivered_bytes_max: int,
        full_retry_after_s: float,
    ) -> None:
        self._connection = connection
        self._tables = tables
        self._memory = memory
        self._accepted_at = accepted_at
        self._undelivered_max = undelivered_max
        self._undelivered_bytes_max = undelivered_bytes_max
        self._full_retry_after_s = full_retry_after_s
        self.loaded: dict[Key, View | None] = {}
        self._values: list[Any] = []
        self.tail = memory.tail or Tail()
        self.changed: dict[Key, View] = {}
        self._known_marks = marks
        # Plain numbers: a new value object for each transaction would cost as much as its checksum.
        self._position, self._seq, self._total_bytes = marks.position, marks.seq, marks.total_bytes

    @property
    def marks(self) -> Marks:
        """How far the file has come with this group."""
        known = self._known_marks  # spelled out: `replace` costs as much as the checksum
        return Marks(
            self._position,
            known.log,
            self._seq,
            self._total_bytes,
            known.closed,
            known.closed_bytes,
            known.listed,
            known.change_counter,
        )

    def add(self, proposals: Sequence[Proposal]) -> list[Receipt | BaseException]:
        """Give each transaction its place, or its own refusal."""
        self._list_if_needed(proposals)
        known = self._known([item.txn_id for item in proposals if item.is_given])
        self._load(proposals)
        outcomes: list[Receipt | BaseException] = []
        for proposal in proposals:
            try:
                repeated = self._repeated(proposal, known) if proposal.is_given else None
                outcomes.append(repeated or self._append(proposal))
            except LocalStoreError as refusal:
                outcomes.append(refusal)
        return outcomes

    def write(self) -> bool:
        """Put the records into the file, durably; False when there are none.

        One statement is a transaction by itself; only a large group, or one that had to list the
        tail, needs more of them.
        """
        step = ROWS_PER_INSERT * COLUMNS
        if len(self._values) > step and not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        for start in range(0, len(self._values), step):
            part = self._values[start : start + step]
            places = ",".join([_PLACES] * (len(part) // COLUMNS))
            self._connection.execute(_INSERT + places, part)
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")
        return bool(self._values)

    def _known(self, txn_ids: Sequence[str]) -> dict[str, tuple[str, str, Receipt]]:
        if not txn_ids:
            return {}
        found = self._connection.execute(
            "SELECT l.txn_id, l.user_id, l.digest, l.seq, l.accepted_at FROM json_each(?) k"
            " CROSS JOIN names n ON n.txn_id = k.value"
            " CROSS JOIN op_log l ON l.position = n.position",
            (orjson.dumps(txn_ids).decode(),),
        )
        return {
            txn_id: (user_id, digest, Receipt(txn_id, seq, "host", accepted_at))
            for txn_id, user_id, digest, seq, accepted_at in found
        }

    def _repeated(
        self, proposal: Proposal, known: Mapping[str, tuple[str, str, Receipt]]
    ) -> Receipt | None:
        """Return the first receipt of a txn_id that was accepted before, with the same content."""
        found = self.tail.receipts.get(proposal.txn_id) or known.get(proposal.txn_id)
        if found is None:
            return None
        if found[:2] != (proposal.author, proposal.accepted.digest):
            raise TransactionIdReused(proposal.txn_id)
        return found[2]

    def _list_if_needed(self, proposals: Sequence[Proposal]) -> None:
        """Make the tail findable where this group can't do with what is remembered of it."""
        known = self._memory.tail
        if known is None:  # somebody else's tail, or one that a failure left behind
            if unlisted(self._connection):
                self._connection.execute("BEGIN IMMEDIATE")
                list_new(self._connection, self._tables)
        elif known.touches and any(item.deletes for item in proposals):
            self._connection.execute("BEGIN IMMEDIATE")
            list_new(self._connection, self._tables, known.touches)
        else:
            return
        self.tail = Tail()

    def _load(self, proposals: Sequence[Proposal]) -> None:
        """Read at once what the group's ops will ask for and isn't remembered."""
        keys: set[Key] = set()
        for proposal in proposals:
            accepted = proposal.accepted
            for op, fresh in zip(accepted.ops, accepted.fresh, strict=True):
                if not fresh:
                    keys.add((op.table, op.id))
                keys.update(self._parent_key(op))
        missing = [key for key in keys if self._memory.view(key) is None]
        if missing:
            self.loaded = rows.views(self._connection, self._tables, missing)

    def _parent_key(self, op: WireOp) -> list[Key]:
        parent = self._tables[op.table].parent
        parent_id = op.values.get(parent[0]) if parent else None
        return [(parent[1], parent_id)] if parent and parent_id is not None else []

    def _append(self, proposal: Proposal) -> Receipt:
        accepted, tail = proposal.accepted, self.tail
        self._check_space(proposal)
        staged = _Staged(self, proposal.author, self._accepted_at)
        before = [
            staged.apply(op, expected, is_fresh)
            for op, expected, is_fresh in zip(
                accepted.ops, accepted.expected, accepted.fresh, strict=True
            )
        ]
        self._position += 1
        self._seq += 1
        self._total_bytes += proposal.size_bytes
        self._record(proposal, _json(before), _json(staged.children))
        touched = touched_by(self._tables, accepted.ops, staged.children)
        for (table, row_id), parent_id in touched.items():
            tail.touches.append((table, row_id, self._position, parent_id))
        self.changed.update(staged.changed)
        tail.views.update(staged.changed)
        tail.size_bytes += proposal.size_bytes
        receipt = Receipt(proposal.txn_id, self._seq, "host", self._accepted_at)
        tail.receipts[proposal.txn_id] = (proposal.author, accepted.digest, receipt)
        return receipt

    def _record(self, proposal: Proposal, before: str, children: str) -> None:
        accepted, at = proposal.accepted, self._accepted_at
        position, log, seq = self._position, self._known_marks.log, self._seq
        size_bytes, total_bytes = proposal.size_bytes, self._total_bytes
        schemas = encode_schemas(accepted.ops, self._tables)
        # In the order of schema.CONTENT, with the marks that `seal` puts between.
        content = crc_of(
            f"{position}\x1f{log}\x1f{seq}\x1f{proposal.txn_id}\x1f{proposal.author}"
            f"\x1f{accepted.digest}\x1f{at}\x1f".encode(),
            accepted.encoded,
            f"\x1f{before}\x1f{children}\x1f[]\x1f{schemas}\x1f{size_bytes}\x1f{total_bytes}".encode(),
        )
        self._values += (
            position,
            log,
            seq,
            proposal.author,
            proposal.txn_id,
            accepted.digest,
            at,
            size_bytes,
            total_bytes,
            content,
            schemas,
            accepted.encoded.decode(),
            before,
            children,
        )

    def _check_space(self, proposal: Proposal) -> None:
        known = self._known_marks
        if self._position - known.closed >= self._undelivered_max:
            reason = f"buffer_transactions_max = {self._undelivered_max}"
            raise BufferFull(self._full_retry_after_s, reason)
        undelivered_bytes = self._total_bytes - known.closed_bytes
        if undelivered_bytes + proposal.size_bytes > self._undelivered_bytes_max:
            reason = f"buffer_bytes_max = {self._undelivered_bytes_max}"
            raise BufferFull(self._full_retry_after_s, reason)

    # -- what a transaction on its way asks -------------------------------------------------------

    def view(self, key: Key) -> View | None:
        """Return a row as the group so far leaves it."""
        if key in self.changed:
            return self.changed[key]
        remembered = self._memory.view(key)
        return remembered if remembered is not None else self.loaded.get(key)

    def children_of(self, key: Key) -> list[Key]:
        """Return the rows that may hang on one, the group's own included."""
        found = rows.children(self._connection, self._tables, key)
        for other in self.changed:
            parent = self._tables[other[0]].parent
            if parent is not None and parent[1] == key[0] and other not in found:
                found.append(other)
        missing = [child for child in found if self.view(child) is None]
        self.loaded |= rows.views(self._connection, self._tables, missing)
        return found

    def is_pending(self, key: Key) -> bool:
        """Tell whether something unconfirmed changes a row."""
        return key in self.changed or bool(rows.pending_among(self._connection, [key]))

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The registered tables."""
        return self._tables


class _Staged:
    """One transaction's changes, kept apart until it is certain that it isn't refused."""

    __slots__ = ("_at", "_author", "_group", "changed", "children")

    def __init__(self, group: Group, author: str, at: str) -> None:
        self._group = group
        self._author = author
        self._at = at
        self.changed: dict[Key, View] = {}
        self.children: list[dict[str, str | None] | None] = []

    def _view(self, key: Key) -> View | None:
        return self.changed[key] if key in self.changed else self._group.view(key)

    def apply(self, op: WireOp, expected: int | None, is_fresh: bool) -> Row | None:
        """Apply one op; returns what it replaced. Raises what refuses the transaction."""
        spec, key = self._group.tables[op.table], (op.table, op.id)
        seen = None if is_fresh else self._view(key)
        if op.kind == "insert":
            if seen is not None and (seen.body is not None or seen.user_id != self._author):
                raise InvalidWrite(spec.name, spec.key, f"{op.id} is taken; use a fresh id")
            if spec.parent is not None:
                self._check_parent(spec, spec.parent, op)
            self.changed[key] = views.inserted(spec, seen, op, self._author, self._at)
            self.children.append(None)
            return None
        if seen is None or seen.body is None or seen.user_id != self._author:
            raise RowNotFound(op.table, op.id)
        if expected is not None and seen.version != expected:
            raise VersionMismatch(op.table, op.id, expected, seen.version)
        if op.kind == "delete":
            taken_along: dict[str, str | None] = {}
            self._delete(key, seen, taken_along)
            self.children.append(taken_along)
            return seen.body
        if spec.parent is not None:
            self._check_parent(spec, spec.parent, op)
        self.changed[key] = views.updated(seen, op, self._at)
        self.children.append(None)
        # A column that is missing here was left to the server's default: nobody here knows it yet.
        return {column: seen.body[column] for column in op.values if column in seen.body}

    def _check_parent(self, spec: TableSpec, parent: tuple[str, str], op: WireOp) -> None:
        """Refuse a parent that its author deleted; an unknown or foreign one is the server's."""
        column, table = parent
        parent_id = op.values.get(column)
        seen = None if parent_id is None else self._view((table, parent_id))
        if seen is not None and seen.body is None and seen.user_id == self._author:
            reason = f"the parent {parent_id} was deleted here"
            raise InvalidWrite(spec.name, column, reason)

    def _delete(self, key: Key, seen: View, known: dict[str, str | None]) -> None:
        """Mark a row and its author's children of it deleted, as the server's cascade will.

        `known` is told each child and its version, None while a change of it is under way. Somebody
        else's row that names this parent stays: the server decides about it.
        """
        self.changed[key] = views.deleted(seen, self._at)
        for child in self._children(key):
            below = self._view(child)
            spec = self._group.tables[child[0]]
            if below is None or below.body is None or below.user_id != self._author:
                continue
            if below.parent_id(spec) != key[1]:
                continue
            under_way = child in self.changed or self._group.is_pending(child)
            known[f"{child[0]}/{child[1]}"] = None if under_way else below.base
            self._delete(child, below, known)

    def _children(self, key: Key) -> Iterable[Key]:
        own = [
            other
            for other in self.changed
            if (parent := self._group.tables[other[0]].parent) and parent[1] == key[0]
        ]
        return dict.fromkeys([*self._group.children_of(key), *own])
