"""A small server for the session tests: it answers reads, or really raises that it can't."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from typing import Any

from local_store import LocalStore, Row, user_uuid
from local_store.ops import Outcome
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.remote import TableRead
from tests.simulation.model_rows import answered_all


class ReadServer:
    """Holds rows per table; answers reads as a user, counts them, can be down or slow.

    No time passes: who would have given up before `takes_s` is told that it did.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Row]] = {}
        self.is_down = False
        self.takes_s = 0.0
        self.calls = 0
        self._ticks = 0

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        self.calls += 1
        if self.is_down:
            raise RemoteUnavailable("down for the test")
        if timeout_s is not None and timeout_s < self.takes_s:
            raise ReplyTimedOut("slow for the test")
        return copy.deepcopy(answered_all(lambda table: self._rows_of(table, user_id), reads))

    def _rows_of(self, table: str, user_id: str) -> list[Row]:
        return [row for row in self.rows.get(table, {}).values() if row["user_id"] == user_id]

    def stamp(self) -> str:
        """Return the next version, as the server writes it: without trailing zeros."""
        self._ticks += 1
        return f"2031-02-01T00:{self._ticks // 60:02d}:{self._ticks % 60:02d}+00:00"

    def put(self, table: str, user_id: str, **values: Any) -> Row:
        """Store a row as somebody else's write would have."""
        stamp = self.stamp()
        row = {"created_at": stamp, "metadata": {}, "client": {}, **values}
        row.update(user_id=user_uuid(user_id), updated_at=stamp)
        row.setdefault("id", str(uuid.UUID(int=self._ticks)))
        self.rows.setdefault(table, {})[row["id"]] = row
        return row

    def change(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row as somebody else would."""
        self.rows[table][row_id].update(values, updated_at=self.stamp())

    def remove(self, session_id: str) -> None:
        """Delete a session and its children as somebody else would."""
        for rows in self.rows.values():
            for row in list(rows.values()):
                if session_id in (row["id"], row.get("session_id")):
                    del rows[row["id"]]

    def deliver(self, store: LocalStore) -> None:
        """Take everything that is pending, as a flush that succeeds does."""
        for transaction in store.pending(transactions_max=1_000, bytes_max=10**9):
            versions: dict[str, str | None] = {}
            for op in transaction.ops:
                table = self.rows.setdefault(op.table, {})
                if op.kind == "delete":
                    self.remove(op.id)
                    versions[f"{op.table}/{op.id}"] = None
                    continue
                old = table.get(op.id, {"id": op.id, "created_at": transaction.accepted_at})
                stamp = self.stamp()
                row = {**old, **op.values, "user_id": transaction.user_id, "updated_at": stamp}
                table[op.id] = row
                versions[f"{op.table}/{op.id}"] = stamp
            store.record([Outcome(transaction.txn_id, "applied", versions)])
