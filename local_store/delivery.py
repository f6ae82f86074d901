"""The shipping half of the store: what is handed to the flusher, and what its replies change here.

It meets the half that accepts writes only in the op log. `LocalStore` is both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from local_store import (
    aggregates,
    due,
    figures,
    housekeeping,
    integrity,
    op_log,
    reopening,
    rows,
    schema,
)
from local_store import chains as chains_
from local_store.buffer_file import BufferFile
from local_store.clock import Clock, isoformat
from local_store.decoding import RecordDamaged
from local_store.door import canonical_uuid, lookup_id
from local_store.errors import InvalidWrite
from local_store.limits import StoreLimits
from local_store.ops import (
    SETTLED,
    UNSETTLED,
    Chains,
    DueWork,
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
from local_store.views import split_name

RECORD_MAX = 5  # outcomes at once: writers wait for about 2 ms meanwhile


class Delivery:
    """What a flusher, a replay or an audit asks of the buffer."""

    _tables: Mapping[str, TableSpec]
    _limits: StoreLimits
    _clock: Clock
    _ids: Callable[[], str]
    _file: BufferFile
    _compared = 0  # the position up to which turns were compared with the log

    def flushing(self) -> AbstractContextManager[bool]:
        """Be the folder's one flusher for the length of a block; yields False when another is."""
        return self._file.flushing()

    def due(
        self,
        *,
        transactions_max: int,
        bytes_max: int,
        selection: Selection | None = None,
        after_user: str = "",
    ) -> DueWork:
        """Return undelivered transactions that are due, of one log, by position.

        The oldest log goes first. Authors take turns from after `after_user` on, at most 50 of
        them; each one's are in order. Where room is left, parked transactions that are due to be
        asked about follow. At least one is returned when any is due: one that is larger than
        `bytes_max` goes alone.
        """
        now_s = self._clock.now().timestamp()

        def ask(connection: sqlite3.Connection) -> DueWork:
            asked = due.Due(connection, now_s, selection, transactions_max, bytes_max)
            found = due.work(connection, self._tables, asked, after_user)
            if not found.transactions:
                compared = integrity.next_misplaced(connection, self._compared)
                if compared is None or not integrity.is_consistent(connection):
                    raise RecordDamaged  # something is undelivered and can't be found
                self._compared = compared
            return found

        return self._file.read(ask)

    def pending(
        self,
        *,
        transactions_max: int,
        bytes_max: int,
        selection: Selection | None = None,
        after_user: str = "",
    ) -> list[PendingTransaction]:
        """Return the transactions of `due` alone."""
        found = self.due(
            transactions_max=transactions_max,
            bytes_max=bytes_max,
            selection=selection,
            after_user=after_user,
        )
        return list(found.transactions)

    def undelivered(
        self, selection: Selection | None = None, *, limit: int = 500
    ) -> list[PendingTransaction]:
        """Return the oldest undelivered transactions of all logs, due or not, for a person."""
        return self._file.read(lambda c: due.undelivered(c, self._tables, selection, limit))

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what the server said, in order, at most 5 outcomes to a SQLite transaction.

        Recording twice is harmless: a settled transaction stays as it is. So is an end in the
        middle, or a power loss that forgets it: what isn't recorded is sent again and comes back as
        a duplicate. That is why nothing waits for a sync here.
        """
        if not outcomes:
            self._file.read(schema.read_log_id)  # no sync for nothing; a closed store says so
        for start in range(0, len(outcomes), RECORD_MAX):
            some = outcomes[start : start + RECORD_MAX]
            self._file.change("a recorded reply", partial(self._record, some), synced=False)

    def _record(self, outcomes: Sequence[Outcome], connection: sqlite3.Connection) -> None:
        counter = op_log.next_counter(connection)
        for outcome in outcomes:
            found = op_log.open_transaction(connection, outcome.txn_id)
            if found is not None:  # a late copy of an older reply can't reopen what is settled
                self._settle(connection, found, outcome, counter)

    def _settle(
        self, connection: sqlite3.Connection, found: op_log.Found, outcome: Outcome, counter: int
    ) -> None:
        now, tables = self._clock.now(), self._tables
        came_to_nothing = outcome.state in SETTLED and outcome.state != "applied"
        changed = {split_name(name) for name in (*outcome.rows, *outcome.doubted)}
        if came_to_nothing:
            changed |= chains_.touched(connection, found.position)
        before = rows.views(connection, tables, changed)
        kept, versions = None, outcome.versions
        if outcome.state == "applied":
            kept, versions = reopening.applied(connection, found.position, outcome)
        op_log.record(connection, found, outcome, kept, isoformat(now), now.timestamp())
        if outcome.state == "applied":
            rows.settle(connection, tables, found.position, counter)
        elif came_to_nothing:
            chains_.give_back(connection, tables, found.position)
            rows.drop(connection, tables, found.position, counter)
            for key in rows.pending_among(connection, changed):
                rows.doubt(connection, key, counter)  # until it has met the server's row
        # Null where a person decided against the author: the row is there, as others made it.
        known = {n: v for n, v in versions.items() if v is not None or n not in outcome.doubted}
        rows.note_versions(connection, known, counter)
        self._doubt(connection, outcome, counter)
        self._learn(connection, outcome)
        for name, row in outcome.rows.items():
            chains_.rebuild(connection, tables, split_name(name), row, counter)
        chains_.number(connection, tables, before, counter)

    def _doubt(self, connection: sqlite3.Connection, outcome: Outcome, counter: int) -> None:
        """Believe no version of rows that were merged elsewhere; a clean one is taken over."""
        for name in outcome.doubted:
            key = split_name(name)
            if rows.pending_among(connection, [key]):
                rows.doubt(connection, key, counter)
            elif name in outcome.learned and key[0] in self._tables:
                chains_.rebuild(connection, self._tables, key, outcome.learned[name], counter)

    def _learn(self, connection: sqlite3.Connection, outcome: Outcome) -> None:
        """Fill in columns that were left to the server: later merges must know their values."""
        for name in (*outcome.learned, *outcome.defaults):
            table, _, row_id = name.partition("/")
            spec, row = self._tables.get(table), outcome.learned.get(name)
            if spec is None:
                continue
            # A whole row tells of defaults only while it is at the version this one left.
            if row is None or row.get(spec.version) not in (None, outcome.versions.get(name)):
                row = outcome.defaults.get(name)
            if row is not None:
                chains_.learn(connection, self._tables, spec, row_id, row)

    def tidy(self) -> int:
        """Let go of settled transactions past their time and of clean rows above the limit.

        At most 200 of each; returns how many went. For the end of each pass of a flusher.
        """
        limits = self._limits
        before = isoformat(self._clock.now() - timedelta(seconds=limits.settled_retention_s))
        if not self._file.read(
            lambda c: housekeeping.is_due(c, before, limits.cache_bytes_max, limits.file_bytes_max)
        ):
            return 0  # no sync for nothing

        def change(connection: sqlite3.Connection) -> int:
            compacted = housekeeping.compact(connection, before, limits.file_bytes_max)
            return compacted + housekeeping.evict(connection, limits.cache_bytes_max)

        return self._file.change("housekeeping", change)

    def damage(self) -> dict[str, Any]:
        """Return what this buffer lost, as far as it knows: all zero and empty in good order.

        `quarantined` records failed their checksum; `lost` were acknowledged and are missing at
        the end of a log; `files` names what lies in the folder's quarantine.
        """
        found = self._file.read(integrity.damage)
        return {**found, "files": self._file.quarantined_files()}

    def backup(self, target: str | Path) -> None:
        """Write a consistent copy of the buffer, taken while writes go on, to a new file.

        Durable when it returns; mode 0600. Opened as the buffer.db of a folder it starts a log of
        its own. Raises FileExistsError, OSError; StoreCorrupt when the copy isn't sound.
        """
        self._file.backup(Path(target))

    def recheck(self, txn_ids: Iterable[str]) -> None:
        """Ask about these parked transactions in the next pass: something was decided."""
        self._file.change("a recheck", lambda c: op_log.recheck(c, list(txn_ids)))

    def hurry(self) -> None:
        """Let everything that is held be sent in the next pass: what it waits for may be there."""
        self._file.change("a hurry", op_log.hurry, synced=False)

    def parked_among(self, txn_ids: Sequence[str]) -> set[str]:
        """Return which of these transactions the server keeps parked, as far as is known here."""
        return self._file.read(lambda c: op_log.parked_among(c, txn_ids))

    def chains(self, keys: Iterable[tuple[str, str]], *, user_id: str) -> Chains:
        """Return every unsettled transaction of a user that touches one of the rows, in order."""
        asked, author = list(keys), user_uuid(user_id)

        def load(connection: sqlite3.Connection) -> Chains:
            token = op_log.read_marks(connection).change_counter
            return chains_.load(connection, self._tables, asked, author, token)

        return self._file.read(load)

    def rebase(
        self, chains: Chains, rewritten: Sequence[Rewritten], rows: Mapping[str, Row | None]
    ) -> bool:
        """Replace transactions and rebuild rows on the server's, in one SQLite transaction.

        `rows` maps `table/id` to the server's row, None when it is gone there. Returns False, and
        changes nothing, when one of the rows was written to since `chains` were read, or one of the
        transactions settled or was parked: then read again.
        """

        def change(connection: sqlite3.Connection) -> bool:
            counter = op_log.next_counter(connection)
            more = chains_.rebase(connection, self._tables, chains, rewritten, rows, counter)
            if more is not None:
                op_log.close(connection, 0, -more)
            return more is not None

        return self._file.change("a rebase", change)

    def start_new_log(self, txn_ids: Sequence[str] = ()) -> str:
        """Start a new log in this file and return its id: the server knows the old one as forked.

        The given undelivered transactions, and the later ones of their logs, move there in order.
        """
        log_id, moving = self._ids(), list(txn_ids)

        def change(connection: sqlite3.Connection) -> str:
            ordinal = schema.start_log(connection, log_id)
            if moving:
                moved = op_log.renumber(connection, moving, ordinal)
                connection.execute("UPDATE totals SET last_seq = ?", (moved,))
            return log_id

        return self._file.change("a new log", change)

    def reopen(self, selection: Selection) -> int:
        """Make applied transactions pending again; returns how many.

        For a server that was restored from an older backup: what it forgot is applied again, what
        it knows comes back as a duplicate. Local rows keep their content meanwhile.
        """

        def change(connection: sqlite3.Connection) -> int:
            count, size_bytes = reopening.reopen(connection, self._tables, selection)
            op_log.close(connection, -count, -size_bytes)
            return count

        return self._file.change("a reopening", change)

    def count(
        self,
        selection: Selection | None = None,
        states: Sequence[TransactionState] = UNSETTLED,
    ) -> int:
        """Return how many transactions in these states are selected; parked ones don't count."""
        return self._file.read(lambda c: op_log.count(c, selection, states))

    def state(self, txn_id: str) -> TransactionState | None:
        """Return where a transaction stands; None when it was never accepted here."""
        return self._file.read(lambda c: op_log.state_of(c, canonical_uuid(txn_id) or ""))

    def reply(self, txn_id: str) -> Any:
        """Return the server's evidence kept with a transaction that it didn't apply, or None."""
        return self._file.read(lambda c: op_log.reply_of(c, txn_id))

    def transactions_of(
        self, table: str, id: str, *, user_id: str
    ) -> list[tuple[str, int, TransactionState]]:
        """Return (txn_id, seq, state) of what isn't settled on a row or its children."""
        return self.transactions_among(table, [id], user_id=user_id)[id]

    def transactions_among(
        self, table: str, ids: Sequence[str], *, user_id: str
    ) -> dict[str, list[tuple[str, int, TransactionState]]]:
        """Return by id what `transactions_of` does, for many rows at once."""
        spec, author = self._spec(table), user_uuid(user_id)
        known = {id: lookup_id(spec, id) or "" for id in ids}
        rows_asked = sorted(set(known.values()))
        found = self._file.read(lambda c: aggregates.unsettled_of(c, table, rows_asked, author))
        return {id: found[row_id] for id, row_id in known.items()}

    def entries(
        self, *, log_id: str | None = None, after_seq: int = 0, limit: int = 5_000
    ) -> list[LogEntry]:
        """Return a log (None: the newest) without its ops, in seq order, for an audit."""
        return self._file.read(lambda c: op_log.entries(c, log_id, after_seq, limit))

    def clean_rows(self, *, after: int = 0, limit: int = 500) -> list[tuple[int, HeldRow]]:
        """Return (position, row) of rows without pending changes, for an audit of content."""
        return self._file.read(lambda c: rows.clean_rows(c, self._tables, after, limit))

    def logs(self) -> list[dict[str, Any]]:
        """Return log_id, last_seq, pending, parked, bytes, oldest_age_s of each log, newest last.

        A file that was copied or restored from elsewhere has more than one.
        """
        found = self._file.read(figures.logs)
        return [{**log, "oldest_age_s": self._age_s(log.pop("oldest"))} for log in found]

    def parked_states(self) -> dict[str, int]:
        """Return how many parked transactions are in each state: dead, conflict or held."""
        return self._file.read(figures.count_parked_states)

    def stats(self) -> dict[str, Any]:
        """Return log_id, last_seq, pending, parked, bytes and oldest_age_s (None when empty).

        log_id and last_seq are the newest log's, the counts are of the whole file.
        """
        return self._file.read(self._stats)

    def _stats(self, connection: sqlite3.Connection) -> dict[str, Any]:
        marks = op_log.read_marks(connection)
        return {
            "log_id": schema.read_log_id(connection),
            "last_seq": marks.seq,
            "pending": marks.undelivered,
            "parked": sum(figures.count_parked(connection).values()),
            "bytes": marks.undelivered_bytes,
            "oldest_age_s": self._age_s(figures.oldest_undelivered(connection)),
        }

    def backlog(self) -> int:
        """Return how many transactions are undelivered; cheaper than all of `stats`."""
        return self._file.read(op_log.read_marks).undelivered

    def oldest_age_s(self) -> float | None:
        """Return the age of the oldest undelivered transaction, None when there is none."""
        return self._age_s(self._file.read(figures.oldest_undelivered))

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
