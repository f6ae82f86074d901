"""The durable local store: acknowledge a write, read it back, hand it to the flusher.

A write is checked and encoded in its caller's time, joins the group of those that wait at the same
moment, and is acknowledged when the group's one commit is on the disk. A row that is read is made
then, from the server's row and what is pending on it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from local_store import (
    aggregates,
    forks,
    integrity,
    op_log,
    opening,
    rows,
    schema,
    schemas,
    selecting,
)
from local_store.aggregates import Aggregate, Stamp
from local_store.appending import Group
from local_store.buffer_file import BufferFile
from local_store.clock import Clock, SystemClock, isoformat, new_id
from local_store.comparing import Question
from local_store.delivery import Delivery
from local_store.door import accept, canonical_uuid, lookup_id
from local_store.errors import CommitUnknown, InvalidWrite
from local_store.file_life import Upkeep
from local_store.group_commit import GroupCommit
from local_store.limits import StoreLimits
from local_store.listing import LISTED_AT_ONCE, LISTED_BYTES_MAX, list_new
from local_store.memory import Memory, Proposal
from local_store.ops import Op, Receipt, Row, TableSpec, by_name, user_uuid
from local_store.sealing import Sealing


class LocalStore(Delivery, Sealing, forks.Forkable):
    """A folder that acknowledges writes durably and remembers what still has to be delivered.

    Thread-safe; several processes may share a folder. After a fork both sides go on using it, each
    by itself: the fork waits until nobody uses the file. Open with `LocalStore.open`.
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
        self._file = BufferFile(
            folder,
            ids,
            limits.full_retry_after_s,
            limits.free_bytes_min,
            limits.fork_wait_s,
            Upkeep(self._list_new, self._mend, self._relist, self._adopt, self._now),
        )
        self._memory = Memory(limits.views_bytes_max)
        self._group = GroupCommit(self._commit, self._behind, clock.monotonic)
        self._on_write: Callable[[], None] | None = None
        forks.register(self)

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
        opening.make_folder(path)
        store = cls(path, by_name(tables), StoreLimits(**limits), clock or SystemClock(), ids)
        try:
            store._file.open()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Stop accepting and close the file; everything acknowledged is already durable."""
        self._group.close()
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
        return self._file.read(schema.read_log_id)

    def on_write(self, nudge: Callable[[], None] | None) -> None:
        """Call `nudge` after each acknowledged write, to wake a flusher. It must not block."""
        self._on_write = nudge

    def after_fork_in_child(self) -> None:
        """Wake nobody from here: the flusher that it woke is the parent's."""
        self._on_write = None

    # -- the write half ---------------------------------------------------------------------------

    def write(self, ops: Sequence[Op], *, user_id: str, txn_id: str | None = None) -> Receipt:
        """Append one transaction; all of it or nothing, and readable at once.

        Durable against power loss when it returns (WAL, synchronous=FULL): durability `host`.
        The same `txn_id` with the same content returns the first receipt again.
        Raises InvalidWrite, VersionMismatch, TransactionIdReused, BufferFull, DiskFailed or
        StoreClosed: then nothing was written; CommitUnknown: repeat with the same txn_id.
        """
        receipt = self._group.submit(self._proposal(ops, user_id, txn_id))
        if self._on_write is not None:
            self._on_write()
        return receipt

    async def write_async(
        self, ops: Sequence[Op], *, user_id: str, txn_id: str | None = None
    ) -> Receipt:
        """Do what `write` does without blocking the event loop; a cancelled call may have happened.

        Give a `txn_id` to be able to repeat a cancelled call without a second effect.
        """
        receipt = await self._group.submit_async(self._proposal(ops, user_id, txn_id))
        if self._on_write is not None:
            self._on_write()
        return receipt

    def _proposal(self, ops: Sequence[Op], user_id: str, txn_id: str | None) -> Proposal:
        author = user_uuid(user_id)
        accepted = accept(ops, self._tables, author, self._limits)
        txn = self._ids() if txn_id is None else canonical_uuid(txn_id)
        if txn is None:
            raise InvalidWrite("", "txn_id", "must be a UUID string")
        return Proposal(txn, txn_id is not None, author, accepted, len(accepted.encoded))

    def _commit(self, proposals: Sequence[Proposal]) -> Sequence[Receipt | BaseException]:
        """Append a group; each of its transactions is told by itself what became of it."""
        try:
            return self._append(proposals)
        except CommitUnknown as error:
            return [CommitUnknown(item.txn_id, error.cause) for item in proposals]

    def _append(self, proposals: Sequence[Proposal]) -> list[Receipt | BaseException]:
        memory, limits = self._memory, self._limits

        def body(connection: sqlite3.Connection) -> list[Receipt | BaseException]:
            if memory.generation != self._file.generation:
                memory.forget(self._file.generation)
            if memory.marks is None:
                memory.marks = op_log.read_marks(connection)
                memory.log_id = schema.read_log_id(connection)
            group = Group(
                connection,
                self._tables,
                memory,
                memory.marks,
                isoformat(self._clock.now()),
                limits.buffer_transactions_max,
                limits.buffer_bytes_max,
                limits.full_retry_after_s,
            )
            try:
                outcomes = group.add(proposals)
                group.write()
            except BaseException:
                memory.forget(-1)
                raise
            memory.keep(group.marks, group.tail, group.changed, group.loaded)
            return outcomes

        return self._file.append(body, sum(item.size_bytes for item in proposals))

    def _behind(self) -> None:
        """Do behind a group what its callers needn't wait for."""
        tail, marks = self._memory.tail, self._memory.marks
        if marks is not None:
            self._file.acknowledged(self._memory.log_id, marks.seq)
        if tail is not None and (
            len(tail.receipts) >= LISTED_AT_ONCE or tail.size_bytes >= LISTED_BYTES_MAX
        ):
            self._file.list_behind()
        self._file.checkpoint()

    def _list_new(self, connection: sqlite3.Connection) -> None:
        """Make the tail of the log findable; by what is remembered of it, if that is certain."""
        memory = self._memory
        known = memory.tail if memory.generation == self._file.generation else None
        memory.tail = None  # until the commit is seen: the next group looks
        list_new(connection, self._tables, known.touches if known is not None else None)

    # -- the read half ----------------------------------------------------------------------------

    def get(self, table: str, id: str, *, user_id: str) -> Row | None:
        """Return the row with this user's own latest writes in it, or None.

        Somebody else's row is absent. Rows carry `_version` (int) and `_pending` (bool).
        """
        spec, author = self._spec(table), user_uuid(user_id)
        row_id = lookup_id(spec, id)
        if row_id is None:
            return None
        return self._file.read(lambda c: rows.get(c, self._tables, spec, row_id, author))

    def select(
        self,
        table: str,
        *,
        user_id: str,
        where: Mapping[str, Any] | None = None,
        order_by: str | None = None,
        limit: int = 100,
        columns: Sequence[str] | None = None,
        after: tuple[Any, str] | None = None,
    ) -> list[Row]:
        """Return this user's rows that equal `where`, at most `limit` (-1: all).

        A list in `where` stands for any of its values. `order_by` is a column, descending with a
        leading minus; ties go by id; `after`, that column's value and the id of a row, begins
        behind it. With `columns`, rows carry these, key, version and marks only.
        """
        spec, author = self._spec(table), user_uuid(user_id)
        question = Question(spec, author, where or {}, order_by, limit, columns, after)
        return self._file.read(lambda c: selecting.select(c, self._tables, question))

    def candidates(
        self,
        table: str,
        *,
        user_id: str,
        where: Mapping[str, Any] | None = None,
        order_by: str | None = None,
        limit: int = 100,
        after: tuple[Any, str] | None = None,
    ) -> tuple[list[str], list[str]]:
        """Return the ids among which `select` would find its rows, without reading any.

        First those of at most `limit` unchanged rows that fit, in order; then those of every row
        with changes on it, which may fit or not. For who looks at the rows anyway.
        """
        spec, author = self._spec(table), user_uuid(user_id)
        question = Question(spec, author, where or {}, order_by, limit, None, after)
        return self._file.read(lambda c: selecting.candidates(c, question))

    def aggregates(
        self,
        table: str,
        ids: Sequence[str],
        *,
        user_id: str,
        known: Mapping[str, Stamp] | None = None,
    ) -> dict[str, Aggregate]:
        """Return by id this user's rows with all their children, of one moment.

        Ids are as rows have them. What is `known` by its stamp comes without rows; an id that
        isn't the user's has none.
        """
        spec, author, asked = self._spec(table), user_uuid(user_id), list(dict.fromkeys(ids))
        return self._file.read(
            lambda c: aggregates.read(c, self._tables, spec, asked, author, known or {})
        )

    def is_held(self, table: str, id: str, *, user_id: str) -> bool:
        """Tell whether this user's row, or its deletion, is known here."""
        row_id, author = lookup_id(self._spec(table), id), user_uuid(user_id)
        if row_id is None:
            return False
        return self._file.read(lambda c: rows.held(c, self._tables, (table, row_id), author))

    def change_counter(self) -> int:
        """Return a number to hand to `refresh`; read it before asking the server."""
        return self._file.read(op_log.read_marks).change_counter

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

        def change(connection: sqlite3.Connection) -> int:
            counter = op_log.next_counter(connection)
            return selecting.refresh(
                connection, self._tables, spec, server_rows, author, as_of, where, counter
            )

        return self._file.change("a refresh", change)

    # -- upkeep of the file -----------------------------------------------------------------------

    def _now(self) -> str:
        return isoformat(self._clock.now())

    def _mend(self, connection: sqlite3.Connection) -> None:
        self._memory.forget(-1)
        integrity.quarantine(connection, self._now())
        integrity.relist(connection, self._tables)

    def _relist(self, connection: sqlite3.Connection) -> None:
        integrity.relist(connection, self._tables)

    def _adopt(self, connection: sqlite3.Connection) -> None:
        schemas.adopt(connection, self._tables)
