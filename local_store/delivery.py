"""The shipping half of the store: what is handed to the flusher, and what its replies change here.

It meets the half that accepts writes only in the op log. `LocalStore` is both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from local_store import chains as chains_
from local_store import due, op_log, reopening, rows, schema
from local_store.buffer_file import BufferFile
from local_store.clock import Clock, isoformat
from local_store.door import canonical_uuid, lookup_id
from local_store.errors import InvalidWrite
from local_store.ops import (
    UNSETTLED,
    Chains,
    HeldRow,
    LogEntry,
    Outcome,
    PendingTransaction,
    Rewritten,
    Row,
    Selection,
    TableSpec,
    TransactionState,
    user_uuid,
)


@dataclass(frozen=True, slots=True)
class Totals:
    """The running counts of a buffer file."""

    last_position: int
    log: int
    last_seq: int
    change_counter: int
    unsettled: int
    unsettled_bytes: int


def read_totals(connection: sqlite3.Connection) -> Totals:
    """Return the running counts."""
    found = connection.execute(
        "SELECT last_position, log, last_seq, change_counter, unsettled, unsettled_bytes"
        " FROM totals"
    ).fetchone()
    return Totals(*found)


def next_counter(connection: sqlite3.Connection) -> int:
    """Advance the change counter in the open transaction and return it."""
    found = connection.execute(
        "UPDATE totals SET change_counter = change_counter + 1 WHERE only = 1"
        " RETURNING change_counter"
    ).fetchone()
    return int(found[0])


RECORD_MAX = 100  # outcomes at once: writers wait for about 10 ms meanwhile


class Delivery:
    """What a flusher, a replay or an audit asks of the buffer."""

    _tables: Mapping[str, TableSpec]
    _clock: Clock
    _ids: Callable[[], str]
    _file: BufferFile

    def flushing(self) -> AbstractContextManager[bool]:
        """Be the folder's one flusher for the length of a block; yields False when another is."""
        return self._file.flushing()

    def pending(
        self,
        *,
        transactions_max: int,
        bytes_max: int,
        selection: Selection | None = None,
        after_user: str = "",
    ) -> list[PendingTransaction]:
        """Return undelivered transactions that are due, of one log, by position.

        The oldest log goes first. Authors take turns from after `after_user` on, at most 50 of
        them; each one's are in order. Where room is left, parked transactions that are due to be
        asked about follow. At least one is returned when any is due: one that is larger than
        `bytes_max` goes alone.
        """
        with self._file.reading() as connection:
            now_s = self._clock.now().timestamp()
            asked = due.Due(connection, now_s, selection, transactions_max, bytes_max)
            return due.pending(connection, self._tables, asked, after_user)

    def undelivered(
        self, selection: Selection | None = None, *, limit: int = 500
    ) -> list[PendingTransaction]:
        """Return the oldest undelivered transactions of all logs, due or not, for a person."""
        with self._file.reading() as connection:
            return due.undelivered(connection, self._tables, selection, limit)

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what the server said, in order, at most 100 outcomes to a SQLite transaction.

        Recording twice is harmless: a settled transaction stays as it is. So is an end in the
        middle: what isn't recorded is sent again and comes back as a duplicate.
        """
        if not outcomes:
            with self._file.reading():
                return  # no fsync for nothing, but a closed store says so
        for start in range(0, len(outcomes), RECORD_MAX):
            self._record(outcomes[start : start + RECORD_MAX])

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        now = self._clock.now()
        with self._file.transaction("a recorded reply") as connection:
            counter = next_counter(connection)
            for outcome in outcomes:
                change = op_log.record(connection, outcome, isoformat(now), now.timestamp())
                if change is None:
                    continue
                versions = outcome.versions
                if outcome.state == "applied":
                    versions = reopening.remember(connection, outcome)
                rows.settle_versions(connection, versions, counter)
                self._learn(connection, outcome)
                for name, row in outcome.rows.items():
                    table, _, row_id = name.partition("/")
                    chains_.rebuild(connection, self._tables, (table, row_id), row, counter)
                _count(connection, *change)

    def _learn(self, connection: sqlite3.Connection, outcome: Outcome) -> None:
        """Fill in columns that were left to the server: later merges must know their values."""
        for name, row in outcome.learned.items():
            table, _, row_id = name.partition("/")
            spec = self._tables.get(table)
            if spec is None or row is None:
                continue
            # A whole row tells of defaults only while it is at the version this one left.
            if row.get(spec.version) in (None, outcome.versions.get(name)):
                chains_.learn(connection, spec, row_id, row)

    def recheck(self, txn_ids: Iterable[str]) -> None:
        """Ask about these parked transactions in the next pass: something was decided."""
        with self._file.transaction("a recheck") as connection:
            op_log.recheck(connection, txn_ids)

    def parked_among(self, txn_ids: Sequence[str]) -> set[str]:
        """Return which of these transactions the server keeps parked, as far as is known here."""
        with self._file.reading() as connection:
            return op_log.parked_among(connection, txn_ids)

    def chains(self, keys: Iterable[tuple[str, str]], *, user_id: str) -> Chains:
        """Return every unsettled transaction of a user that touches one of the rows, in order."""
        with self._file.reading() as connection:
            token = read_totals(connection).change_counter
            return chains_.load(connection, keys, user_uuid(user_id), token)

    def rebase(
        self, chains: Chains, rewritten: Sequence[Rewritten], rows: Mapping[str, Row | None]
    ) -> bool:
        """Replace transactions and rebuild rows on the server's, in one SQLite transaction.

        `rows` maps `table/id` to the server's row, None when it is gone there. Returns False, and
        changes nothing, when one of the rows was written to since `chains` were read, or one of the
        transactions settled or was parked: then read again.
        """
        with self._file.transaction("a rebase") as connection:
            counter = next_counter(connection)
            change = chains_.rebase(connection, self._tables, chains, rewritten, rows, counter)
            if change is not None:
                _count(connection, 0, change)
            return change is not None

    def start_new_log(self, txn_ids: Sequence[str] = ()) -> str:
        """Start a new log in this file and return its id: the server knows the old one as forked.

        The given undelivered transactions, and the later ones of their logs, move there in order.
        """
        log_id = self._ids()
        with self._file.transaction("a new log") as connection:
            ordinal = schema.start_log(connection, log_id)
            if txn_ids:
                moved = op_log.renumber(connection, txn_ids, ordinal)
                connection.execute("UPDATE totals SET last_seq = ?", (moved,))
        return log_id

    def reopen(self, selection: Selection) -> int:
        """Make applied transactions pending again; returns how many.

        For a server that was restored from an older backup: what it forgot is applied again, what
        it knows comes back as a duplicate. Local rows keep their content meanwhile.
        """
        with self._file.transaction("a reopening") as connection:
            count, size_bytes = reopening.reopen(connection, selection)
            _count(connection, count, size_bytes)
        return count

    def count(
        self,
        selection: Selection | None = None,
        states: Sequence[TransactionState] = UNSETTLED,
    ) -> int:
        """Return how many transactions in these states are selected; parked ones don't count."""
        with self._file.reading() as connection:
            return op_log.count(connection, selection, states)

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

    def entries(
        self, *, log_id: str | None = None, after_seq: int = 0, limit: int = 5_000
    ) -> list[LogEntry]:
        """Return a log (None: the newest) without its ops, in seq order, for an audit."""
        with self._file.reading() as connection:
            return op_log.entries(connection, log_id, after_seq, limit)

    def clean_rows(self, *, after: int = 0, limit: int = 500) -> list[tuple[int, HeldRow]]:
        """Return (position, row) of rows without pending changes, for an audit of content."""
        with self._file.reading() as connection:
            return rows.clean_rows(connection, self._tables, after, limit)

    def logs(self) -> list[dict[str, Any]]:
        """Return log_id, last_seq, pending, parked, bytes, oldest_age_s of each log, newest last.

        A file that was copied or restored from elsewhere has more than one.
        """
        with self._file.reading() as connection:
            found = op_log.logs(connection)
        return [{**log, "oldest_age_s": self._age_s(log.pop("oldest"))} for log in found]

    def stats(self) -> dict[str, Any]:
        """Return log_id, last_seq, pending, parked, bytes and oldest_age_s (None when empty).

        log_id and last_seq are the newest log's, the counts are of the whole file.
        """
        with self._file.reading() as connection:
            totals = read_totals(connection)
            return {
                "log_id": schema.read_log_id(connection),
                "last_seq": totals.last_seq,
                "pending": totals.unsettled,
                "parked": sum(op_log.count_parked(connection).values()),
                "bytes": totals.unsettled_bytes,
                "oldest_age_s": self._age_s(op_log.oldest_undelivered(connection)),
            }

    def _age_s(self, accepted_at: str | None) -> float | None:
        if accepted_at is None:
            return None
        age = self._clock.now() - datetime.fromisoformat(accepted_at)
        return max(0.0, age.total_seconds())

    def _spec(self, table: str) -> TableSpec:
        spec = self._tables.get(table)
        if spec is None:
            raise InvalidWrite(table, "table", "not a registered table")
        return spec


def _count(connection: sqlite3.Connection, transactions: int, size_bytes: int) -> None:
    connection.execute(
        "UPDATE totals SET unsettled = unsettled + ?, unsettled_bytes = unsettled_bytes + ?",
        (transactions, size_bytes),
    )
