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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from local_store import op_log, rows, schema
from local_store.buffer_file import BufferFile
from local_store.clock import Clock, SystemClock, isoformat, new_id
from local_store.delivery import Delivery, next_counter, read_totals
from local_store.door import Accepted, DoorLimits, accept, canonical_uuid, lookup_id
from local_store.errors import (
    BufferFull,
    InvalidWrite,
    TransactionIdReused,
)
from local_store.ops import (
    Op,
    Receipt,
    Row,
    TableSpec,
    by_name,
    user_uuid,
)


@dataclass(frozen=True, slots=True)
class StoreLimits(DoorLimits):
    """Bounds on the whole buffer; reaching one refuses writes, it never drops any."""

    buffer_bytes_max: int = 2 * 1024**3  # ≥ 48 h of outage at ten 1 KB writes a second
    buffer_transactions_max: int = 2_000_000
    full_retry_after_s: float = 5.0  # about one flush interval: space comes from the drain


class LocalStore(Delivery):
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
        totals = read_totals(connection)
        self._check_space(totals.unsettled, totals.unsettled_bytes + len(accepted.encoded))
        place = op_log.Place(totals.last_position + 1, totals.log, totals.last_seq + 1)
        counter, accepted_at = totals.change_counter + 1, isoformat(self._clock.now())
        before: list[Row | None] = []
        children: list[Mapping[str, str | None] | None] = []
        touched: list[tuple[str, str]] = []
        for op, expected in zip(accepted.ops, accepted.expected, strict=True):
            done = rows.apply_op(
                connection, self._tables, op, author, expected, accepted_at, counter
            )
            before.append(done.before)
            children.append(done.children)
            touched += done.touched
        newest = max(self._tables[op.table].schema_version for op in accepted.ops)
        op_log.append(
            connection, place, txn_id, author, accepted, accepted_at, before, children, newest
        )
        op_log.touch(connection, place.position, touched)
        connection.execute(
            "UPDATE totals SET last_position = ?, last_seq = ?, change_counter = ?,"
            " unsettled = unsettled + 1, unsettled_bytes = unsettled_bytes + ?",
            (place.position, place.seq, counter, len(accepted.encoded)),
        )
        return Receipt(txn_id, place.seq, "host", accepted_at)

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
            return read_totals(connection).change_counter

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
            counter = next_counter(connection)
            return rows.refresh(connection, spec, server_rows, author, as_of, where, counter)
