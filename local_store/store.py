"""The durable local store: acknowledge a write, read it back, hand it to the flusher.

One connection and one lock per process do every write and every checkpoint; a lock on the folder
keeps other processes out meanwhile. `write` is one SQLite transaction that holds the op-log row and
its effect on the rows, so there is never a row without its op or an op without its row.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from local_store import op_log, rows, schema
from local_store.buffer_file import BufferFile
from local_store.clock import Clock, SystemClock, isoformat, new_id
from local_store.door import Accepted, DoorLimits, accept, canonical_uuid, lookup_id
from local_store.errors import (
    BufferFull,
    InvalidWrite,
    TransactionIdReused,
)
from local_store.ops import (
    HeldRow,
    LogEntry,
    Op,
    Outcome,
    PendingTransaction,
    Receipt,
    Row,
    TableSpec,
    TransactionState,
    by_name,
    user_uuid,
)


@dataclass(frozen=True, slots=True)
class StoreLimits(DoorLimits):
    """Bounds on the whole buffer; reaching one refuses writes, it never drops any."""

    buffer_bytes_max: int = 2 * 1024**3  # ≥ 48 h of outage at ten 1 KB writes a second
    buffer_transactions_max: int = 2_000_000
    full_retry_after_s: float = 5.0  # about one flush interval: space comes from the drain


class LocalStore:
    """A folder that acknowledges writes durably and remembers what still has to be delivered.

    Thread-safe; several processes may share a folder. Open with `LocalStore.open`.
    """

    def __init__(
        self,
        folder: Path,
        tables: Mapping[str, TableSpec],
        limits: StoreLimits,
        clock: Clock,
        ids: Callable[[], str],
    ) -> None:
        self._tables = tables
        self._limits = limits
        self._clock = clock
        self._ids = ids
        self._file = BufferFile(folder, ids, limits.full_retry_after_s)
        self._on_write: Callable[[], None] | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        tables: Sequence[TableSpec],
        clock: Clock | None = None,
        ids: Callable[[], str] = new_id,
        **limits: Any,
    ) -> Self:
        """Open or create the store in `folder` (mode 0700, files 0600).

        `limits` are the fields of StoreLimits, in bytes, counts and seconds. Simultaneous first
        starts are safe. Raises StoreCorrupt when the file isn't a database, SchemaTooNew when newer
        code wrote it, DiskFailed or OSError when the disk refuses.
        """
        path = Path(folder)
        schema.make_folder(path)
        store = cls(path, by_name(tables), StoreLimits(**limits), clock or SystemClock(), ids)
        try:
            store._file.open()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Stop accepting and close the file; everything acknowledged is already durable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The registered tables by name."""
        return self._tables

    @property
    def log_id(self) -> str:
        """The identity of this buffer file's life."""
        with self._file.reading() as connection:
            return schema.read_log_id(connection)

    def on_write(self, nudge: Callable[[], None] | None) -> None:
        """Call `nudge` after each acknowledged write, to wake a flusher. It must not block."""
        self._on_write = nudge

    # -- the write half ---------------------------------------------------------------------------

    def write(self, ops: Sequence[Op], *, user_id: str, txn_id: str | None = None) -> Receipt:
        """Append one transaction and apply it to its rows; all of it or nothing.

        Durable against power loss when it returns (WAL, synchronous=FULL): durability `host`.
        The same `txn_id` with the same content returns the first receipt again.
        Raises InvalidWrite, VersionMismatch, TransactionIdReused, BufferFull, DiskFailed or
        StoreClosed: then nothing was written; CommitUnknown: repeat with the same txn_id.
        """
        author = user_uuid(user_id)
        accepted = accept(ops, self._tables, author, self._limits)
        txn = self._ids() if txn_id is None else canonical_uuid(txn_id)
        if txn is None:
            raise InvalidWrite("", "txn_id", "must be a UUID string")
        with self._file.transaction(txn) as connection:
            receipt = self._append(connection, accepted, author, txn)
        if self._on_write is not None:
            self._on_write()
        return receipt

    async def write_async(
        self, ops: Sequence[Op], *, user_id: str, txn_id: str | None = None
    ) -> Receipt:
        """Do what `write` does without blocking the event loop; a cancelled call may have happened.

        Give a `txn_id` to be able to repeat a cancelled call without a second effect.
        """
        return await asyncio.to_thread(self.write, ops, user_id=user_id, txn_id=txn_id)

    def _append(
        self, connection: sqlite3.Connection, accepted: Accepted, author: str, txn_id: str
    ) -> Receipt:
        known = op_log.find(connection, txn_id)
        if known is not None:
            seq, user_id, digest, accepted_at, _state = known
            if (user_id, digest) != (author, accepted.digest):
                raise TransactionIdReused(txn_id)
            return Receipt(txn_id, seq, "host", accepted_at)
        last_seq, counter, unsettled, unsettled_bytes = _totals(connection)
        self._check_space(unsettled, unsettled_bytes + len(accepted.encoded))
        seq, counter, accepted_at = last_seq + 1, counter + 1, isoformat(self._clock.now())
        before: list[Row | None] = []
        touched: list[tuple[str, str]] = []
        for op, expected in zip(accepted.ops, accepted.expected, strict=True):
            image, keys = rows.apply_op(
                connection, self._tables, op, author, expected, accepted_at, counter
            )
            before.append(image)
            touched += keys
        newest = max(self._tables[op.table].schema_version for op in accepted.ops)
        op_log.append(connection, seq, txn_id, author, accepted, accepted_at, before, newest)
        op_log.touch(connection, seq, touched)
        connection.execute(
            "UPDATE totals SET last_seq = ?, change_counter = ?, unsettled = unsettled + 1,"
            " unsettled_bytes = unsettled_bytes + ?",
            (seq, counter, len(accepted.encoded)),
        )
        return Receipt(txn_id, seq, "host", accepted_at)

    def _check_space(self, unsettled: int, bytes_after: int) -> None:
        limits = self._limits
        if unsettled >= limits.buffer_transactions_max:
            reason = f"buffer_transactions_max = {limits.buffer_transactions_max}"
            raise BufferFull(limits.full_retry_after_s, reason)
        if bytes_after > limits.buffer_bytes_max:
            reason = f"buffer_bytes_max = {limits.buffer_bytes_max}"
            raise BufferFull(limits.full_retry_after_s, reason)

    # -- the read half ----------------------------------------------------------------------------

    def get(self, table: str, id: str, *, user_id: str) -> Row | None:
        """Return the row with this user's own latest writes in it, or None.

        Somebody else's row is absent. Rows carry `_version` (int) and `_pending` (bool).
        """
        spec = self._spec(table)
        row_id = lookup_id(spec, id)
        with self._file.reading() as connection:
            return (
                None if row_id is None else rows.get(connection, spec, row_id, user_uuid(user_id))
            )

    def select(
        self,
        table: str,
        *,
        user_id: str,
        where: Mapping[str, Any] | None = None,
        order_by: str | None = None,
        limit: int = 100,
    ) -> list[Row]:
        """Return this user's rows that equal `where`, at most `limit`.

        `order_by` is a column, descending with a leading minus; ties go by id.
        """
        with self._file.reading() as connection:
            return rows.select(
                connection, self._spec(table), user_uuid(user_id), where or {}, order_by, limit
            )

    def is_held(self, table: str, id: str, *, user_id: str) -> bool:
        """Tell whether this user's row, or its deletion, is known here."""
        row_id = lookup_id(self._spec(table), id)
        with self._file.reading() as connection:
            return row_id is not None and rows.held(connection, table, row_id, user_uuid(user_id))

    def change_counter(self) -> int:
        """Return a number that grows with each local change; read it before asking the server."""
        with self._file.reading() as connection:
            return _totals(connection)[1]

    def refresh(
        self,
        table: str,
        server_rows: Sequence[Row],
        *,
        user_id: str,
        as_of: int,
        where: Mapping[str, Any],
    ) -> int:
        """Take the server's rows into the local copy; returns how many local rows changed.

        Only rows that are clean and unchanged since `as_of` are touched. Clean local rows that
        equal `where` and are missing from `server_rows` are dropped.
        """
        spec, author = self._spec(table), user_uuid(user_id)
        with self._file.transaction("a refresh") as connection:
            counter = _next_counter(connection)
            return rows.refresh(connection, spec, server_rows, author, as_of, where, counter)

    # -- the shipping half ------------------------------------------------------------------------

    def pending(self, *, transactions_max: int, bytes_max: int) -> list[PendingTransaction]:
        """Return the oldest undelivered transactions that are due, in seq order."""
        with self._file.reading() as connection:
            now_s = self._clock.now().timestamp()
            return op_log.pending(connection, self._tables, transactions_max, bytes_max, now_s)

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what the server said, all outcomes in one SQLite transaction.

        Recording twice is harmless: a settled transaction stays as it is.
        """
        now = self._clock.now()
        with self._file.transaction("a recorded reply") as connection:
            counter = _next_counter(connection)
            for outcome in outcomes:
                change = op_log.record(connection, outcome, isoformat(now), now.timestamp())
                if change is None:
                    continue
                rows.settle_versions(connection, outcome.versions, counter)
                connection.execute(
                    "UPDATE totals SET unsettled = unsettled + ?,"
                    " unsettled_bytes = unsettled_bytes + ?",
                    change,
                )

    def state(self, txn_id: str) -> TransactionState | None:
        """Return where a transaction stands; None when it was never accepted here."""
        with self._file.reading() as connection:
            return op_log.state_of(connection, canonical_uuid(txn_id) or "")

    def reply(self, txn_id: str) -> Any:
        """Return the server's evidence kept with a transaction that it didn't apply, or None."""
        with self._file.reading() as connection:
            return op_log.reply_of(connection, txn_id)

    def transactions_of(
        self, table: str, id: str, *, user_id: str
    ) -> list[tuple[str, int, TransactionState]]:
        """Return (txn_id, seq, state) of what isn't settled on a row or its children."""
        row_id = lookup_id(self._spec(table), id) or ""
        with self._file.reading() as connection:
            return op_log.unsettled_of(connection, table, row_id, user_uuid(user_id))

    def entries(self, *, after_seq: int = 0, limit: int = 5_000) -> list[LogEntry]:
        """Return the log without its ops, in seq order, for an audit."""
        with self._file.reading() as connection:
            return op_log.entries(connection, after_seq, limit)

    def clean_rows(self, *, after: int = 0, limit: int = 500) -> list[tuple[int, HeldRow]]:
        """Return (position, row) of rows without pending changes, for an audit of content."""
        with self._file.reading() as connection:
            return rows.clean_rows(connection, self._tables, after, limit)

    def stats(self) -> dict[str, Any]:
        """Return log_id, last_seq, pending, parked, bytes and oldest_age_s (None when empty)."""
        with self._file.reading() as connection:
            last_seq, _counter, unsettled, unsettled_bytes = _totals(connection)
            oldest = op_log.oldest_unsettled(connection)
            age_s = None
            if oldest is not None:
                age = self._clock.now() - datetime.fromisoformat(oldest)
                age_s = max(0.0, age.total_seconds())
            return {
                "log_id": schema.read_log_id(connection),
                "last_seq": last_seq,
                "pending": unsettled,
                "parked": op_log.count_parked(connection),
                "bytes": unsettled_bytes,
                "oldest_age_s": age_s,
            }

    def _spec(self, table: str) -> TableSpec:
        spec = self._tables.get(table)
        if spec is None:
            raise InvalidWrite(table, "table", "not a registered table")
        return spec


def _totals(connection: sqlite3.Connection) -> tuple[int, int, int, int]:
    found: tuple[int, int, int, int] = connection.execute(
        "SELECT last_seq, change_counter, unsettled, unsettled_bytes FROM totals"
    ).fetchone()
    return found


def _next_counter(connection: sqlite3.Connection) -> int:
    found = connection.execute(
        "UPDATE totals SET change_counter = change_counter + 1 WHERE only = 1"
        " RETURNING change_counter"
    ).fetchone()
    return int(found[0])
