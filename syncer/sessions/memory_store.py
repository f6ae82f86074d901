"""Sessions in memory: for tests, and for trying things out without a folder or a project.

The same semantics as the other stores and no durability: what is written ends with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from local_store import Op, Row, TransactionIdReused, user_uuid
from local_store.clock import Clock, new_id
from local_store.door import Accepted, DoorLimits, accept
from local_store.ops import WireOp, by_name
from syncer.sessions.aggregate import PARTS, SessionRows, assemble, snapshot_of
from syncer.sessions.cursor import after_cursor, cut
from syncer.sessions.models import SessionStatus
from syncer.sessions.row_store import RowSessionStore, Traces
from syncer.sessions.store_api import RequestKey, SessionPage
from syncer.sessions.tables import SESSION_TABLES, SESSIONS

Family = Mapping[tuple[str, str], Row]
"""A session's row and its children's, by (table, id). Replaced as a whole, never changed."""


class MemoryRows:
    """The rows of all users, as one server would hold them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, Family] = {}
        self._deleted: dict[str, str] = {}
        self._transactions: dict[str, tuple[str, str]] = {}

    def commit(
        self, session_id: str, accepted: Accepted, author: str, txn_id: str, now: str
    ) -> bool:
        """Take one session's transaction whole; False when a row isn't as it was expected.

        The same `txn_id` with the same content changes nothing again; with other content it raises
        TransactionIdReused.
        """
        with self._lock:
            known = self._transactions.get(txn_id)
            if known is not None:
                if known != (author, accepted.digest):
                    raise TransactionIdReused(txn_id)
                return True
            makes_it = (accepted.ops[0].table, accepted.ops[0].kind) == (SESSIONS, "insert")
            if not makes_it and self._owner(session_id) != author:
                return False
            family = self._families.get(session_id, {})
            for op, expected in zip(accepted.ops, accepted.expected, strict=True):
                row = family.get((op.table, op.id))
                if not _fits(op, row, expected):
                    return False
                family = _with(family, op, author, now)
            self._transactions[txn_id] = (author, accepted.digest)
            self._keep(session_id, family, author)
            return True

    def session(self, session_id: str, author: str) -> SessionRows | None:
        """Return one session with its children, all of one moment."""
        family = self._families.get(session_id, {})
        row = family.get((SESSIONS, session_id))
        if row is None or row["user_id"] != author:
            return None
        children = {
            part.table: [child for (table, _id), child in family.items() if table == part.table]
            for part in PARTS
        }
        return SessionRows(row, children)

    def sessions(self, author: str) -> list[Row]:
        """Return the author's session rows, without their children."""
        with self._lock:
            rows = [family[SESSIONS, row_id] for row_id, family in self._families.items()]
        return [row for row in rows if row["user_id"] == author]

    def knows(self, txn_id: str) -> bool:
        """Tell whether a transaction of this id was taken."""
        return txn_id in self._transactions

    def was_here(self, session_id: str, author: str) -> bool:
        """Tell whether the author has the session, or had it and deleted it."""
        return self._owner(session_id) == author or self._deleted.get(session_id) == author

    def _owner(self, session_id: str) -> str | None:
        row = self._families.get(session_id, {}).get((SESSIONS, session_id))
        return None if row is None else str(row["user_id"])

    def _keep(self, session_id: str, family: Family, author: str) -> None:
        if family:
            self._families[session_id] = family
            self._deleted.pop(session_id, None)
        else:
            del self._families[session_id]
            self._deleted[session_id] = author


class InMemorySessionStore(RowSessionStore):
    """One user's sessions in memory. Stores that are given the same `rows` share them."""

    def __init__(
        self,
        user_id: str,
        rows: MemoryRows | None = None,
        *,
        clock: Clock | None = None,
        ids: Callable[[], str] = new_id,
    ) -> None:
        super().__init__(user_id, clock, ids)
        self._author = user_uuid(user_id)
        self._tables = by_name(SESSION_TABLES)
        self._rows = rows or MemoryRows()

    def knows(self, request: RequestKey) -> bool:
        """Tell whether the key was used before, for whatever."""
        return self._rows.knows(request.txn_id)

    def _found(self, session_id: str) -> SessionRows | None:
        return self._rows.session(session_id, self._author)

    def _commit(
        self, ops: Sequence[Op], current: SessionRows | None, request: RequestKey | None
    ) -> bool:
        accepted = accept(ops, self._tables, self._author, DoorLimits())
        # Without rows to start from it is the creation or the deletion of a session.
        session_id = accepted.ops[0].id if current is None else current.session["id"]
        txn_id = self._ids() if request is None else request.txn_id
        return self._rows.commit(session_id, accepted, self._author, txn_id, self._now())

    def _traces(self, request: RequestKey, session_id: str) -> Traces:
        known = self.knows(request)
        return Traces(known, was_here=self._rows.was_here(session_id, self._author))

    def _list(
        self, status: SessionStatus | None, limit: int | None, cursor: str | None
    ) -> SessionPage:
        page = cut(self._rows.sessions(self._author), status, limit, after_cursor(cursor))
        found = [self._found(row["id"]) for row in page.rows]
        sessions = [assemble(r.session["id"], snapshot_of(r)) for r in found if r is not None]
        return SessionPage(sessions, complete=True, next=page.next)


def _fits(op: WireOp, row: Row | None, expected: int | None) -> bool:
    if op.kind == "insert":
        return row is None
    return row is not None and expected in (None, row["_version"])


def _with(family: Family, op: WireOp, author: str, now: str) -> Family:
    if op.kind == "delete":
        gone = (op.table, op.id)
        return {} if op.table == SESSIONS else {k: row for k, row in family.items() if k != gone}
    new: Row = {"id": op.id, "user_id": author, "created_at": now, "_version": 0}
    row = family.get((op.table, op.id), new)
    version = row["_version"] + 1
    return {**family, (op.table, op.id): {**row, **op.values, "_version": version}}
