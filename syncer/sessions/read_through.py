"""Fresher rows from the server, when it can be asked within a short budget.

Rows go into the local copy only together with their whole session, children first: a session row
that is held here promises that its children are held too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from local_store import LocalStore, Row, user_uuid
from local_store.clock import Clock, SystemClock
from syncer.core.breaker import Breaker
from syncer.errors import RemoteUnavailable, SyncError
from syncer.remote import TableRead
from syncer.sessions.aggregate import PARTS
from syncer.sessions.tables import SESSIONS

ROWS_MAX = 1_000  # one read returns no more; the hosted API caps there too
SESSIONS_PER_READ = 100  # three reads each: a few hundred small selects in one call
_DERIVED = ("current_ir",)  # repeats a draft's content; not worth keeping twice


class Reads(Protocol):
    """The part of a Remote that reads."""

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read tables as `user_id`; one list of rows per read. Raises SyncError."""
        ...


class GuardedReads:
    """A remote's reads with a breaker of their own, shared by all requests of a process.

    An outage must not cost every reader the whole budget, nor a struggling project more than one
    probe per `interval_s`. `watch` hears when the server answers and when reads stop asking it.
    """

    def __init__(
        self,
        remote: Reads | None,
        *,
        allowed: Callable[[], bool] = lambda: True,
        watch: Callable[[bool], None] = lambda answered: None,
        interval_s: float = 5.0,
        clock: Clock | None = None,
    ) -> None:
        self._remote = remote
        self._allowed = allowed
        self._watch = watch
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._breaker = Breaker(interval_s=interval_s)

    def usable(self) -> bool:
        """Tell whether a read may go out now."""
        return (
            self._remote is not None
            and self._allowed()
            and self._breaker.allows(self._clock.monotonic())
        )

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Pass the read on, unless the last one failed within the interval."""
        if self._remote is None or not self._claim():
            raise RemoteUnavailable("Supabase can't be asked now", hint="try again later")
        try:
            answer = self._remote.read(user_id, reads, timeout_s=timeout_s)
        except SyncError:
            with self._lock:
                self._breaker = self._breaker.after_failure(self._clock.monotonic(), 0.0)
                is_open = self._is_open()
            if is_open:
                self._watch(False)
            raise
        with self._lock:
            self._breaker = self._breaker.after_success()
        self._watch(True)
        return answer

    def _claim(self) -> bool:
        with self._lock:
            now = self._clock.monotonic()
            if not self._breaker.allows(now):
                return False
            if self._is_open():
                # The one probe of this interval; the others wait for what it finds.
                self._breaker = self._breaker.after_failure(now, 0.0)
            return True

    def _is_open(self) -> bool:
        return self._breaker.failures >= self._breaker.failures_max


@dataclass(frozen=True, slots=True)
class Listing:
    """The server's session rows of one user, newest first; `is_whole` when these are all.

    `as_of` is the local change counter before the question, `end` when the budget is spent.
    """

    rows: list[Row]
    is_whole: bool
    as_of: int
    end: float


class ReadThrough:
    """Brings one user's sessions up to date in the local copy."""

    def __init__(
        self, store: LocalStore, user_id: str, remote: Reads, budget_s: float, clock: Clock
    ) -> None:
        self._store = store
        self._user_id = user_uuid(user_id)
        self._remote = remote
        self._budget_s = budget_s
        self._clock = clock

    def session(self, session_id: str) -> None:
        """Refresh one session, or drop it here when the server has none.

        Raises RemoteUnavailable when the server can't be asked in time.
        """
        as_of = self._store.change_counter()
        sessions, *children = self._ask(whole_session(session_id), self._budget_s)
        tables = {part.table: rows for part, rows in zip(PARTS, children, strict=True)}
        check_whole(children)
        self._take(sessions, [session_id], tables, as_of)

    def listed(self) -> Listing:
        """Ask for the user's newest session rows, without their children and changing nothing.

        Raises RemoteUnavailable as `session` does.
        """
        as_of = self._store.change_counter()
        end = self._clock.monotonic() + self._budget_s
        [rows] = self._ask([newest_sessions({})], self._budget_s)
        return Listing(rows, len(rows) < ROWS_MAX, as_of, end)

    def take(self, listing: Listing, session_ids: Sequence[str]) -> None:
        """Refresh some of the listed sessions, and drop what the server no longer has.

        Spends what is left of the listing's budget. Raises RemoteUnavailable.
        """
        tables: dict[str, list[Row]] = {part.table: [] for part in PARTS}
        for start in range(0, len(session_ids), SESSIONS_PER_READ):
            ids = session_ids[start : start + SESSIONS_PER_READ]
            reads = [read for session_id in ids for read in children_of(session_id)]
            found = self._ask(reads, max(0.001, listing.end - self._clock.monotonic()))
            check_whole(found)
            for asked, rows in zip(reads, found, strict=True):
                tables[asked.table] += rows
        wanted, known = set(session_ids), {str(row["id"]) for row in listing.rows}
        rows = [row for row in listing.rows if str(row["id"]) in wanted]
        missing = [i for i in self._clean_sessions() if i not in known] if listing.is_whole else []
        gone = [session_id for session_id in missing if self._is_clean(session_id)]
        self._take(rows, [*session_ids, *gone], tables, listing.as_of)

    def _ask(self, reads: Sequence[TableRead], timeout_s: float) -> list[list[Row]]:
        try:
            return self._remote.read(self._user_id, reads, timeout_s=timeout_s)
        except RemoteUnavailable:
            raise
        except SyncError as error:
            # Whatever kept it from answering, the row is unknown and not absent.
            raise RemoteUnavailable(
                f"Supabase didn't answer a read ({type(error).__name__})", hint="try again later"
            ) from error

    def _take(
        self,
        sessions: Sequence[Row],
        asked: Sequence[str],
        children: dict[str, list[Row]],
        as_of: int,
    ) -> None:
        for table, rows in children.items():
            vanished = [i for i in asked if self._lacks(table, "session_id", i, rows)]
            self._refresh(table, rows, "session_id", vanished, as_of)
        present = {str(row["id"]) for row in sessions}
        slim = [{k: v for k, v in row.items() if k not in _DERIVED} for row in sessions]
        self._refresh(SESSIONS, slim, "id", [i for i in asked if i not in present], as_of)

    def _refresh(
        self, table: str, rows: list[Row], column: str, vanished: Sequence[str], as_of: int
    ) -> None:
        """Take what differs; most reads bring nothing new and must not cost an fsync."""
        news = [row for row in rows if self._is_news(table, row)]
        if news:
            # Equality with a row that is present drops nothing.
            where: dict[str, Any] = {"id": news[0]["id"]}
            self._store.refresh(table, news, user_id=self._user_id, as_of=as_of, where=where)
        for value in vanished:
            kept = [row for row in rows if str(row.get(column)) == value]
            self._store.refresh(
                table, kept, user_id=self._user_id, as_of=as_of, where={column: value}
            )

    def _is_news(self, table: str, row: Row) -> bool:
        here = self._store.get(table, str(row["id"]), user_id=self._user_id)
        return here is None or here["updated_at"] != row["updated_at"]

    def _lacks(self, table: str, column: str, value: str, rows: Sequence[Row]) -> bool:
        """Tell whether a row is held here that the server's answer doesn't have."""
        there = {str(row["id"]) for row in rows}
        here = self._store.select(table, user_id=self._user_id, where={column: value}, limit=-1)
        return any(row["id"] not in there for row in here)

    def _clean_sessions(self) -> list[str]:
        rows = self._store.select(SESSIONS, user_id=self._user_id, limit=-1)
        return [row["id"] for row in rows if not row["_pending"]]

    def _is_clean(self, session_id: str) -> bool:
        return not self._store.transactions_of(SESSIONS, session_id, user_id=self._user_id)


def newest_sessions(where: Row) -> TableRead:
    """Return the read of the newest session rows that equal `where`."""
    return TableRead(SESSIONS, where, order_by="created_at", descending=True, limit=ROWS_MAX)


def whole_session(session_id: str) -> list[TableRead]:
    """Return the reads of one session: its row, then its children by part.

    In this order, so that a draft that the session names is among the drafts read after it.
    """
    return [TableRead(SESSIONS, {"id": session_id}, limit=1), *children_of(session_id)]


def children_of(session_id: str) -> list[TableRead]:
    """Return the reads of a session's children, one per part."""
    return [
        TableRead(part.table, {"session_id": session_id}, order_by="created_at", limit=ROWS_MAX)
        for part in PARTS
    ]


def check_whole(children: Sequence[Sequence[Row]]) -> None:
    """Raise RemoteUnavailable for a list of children that may have been cut."""
    if any(len(rows) >= ROWS_MAX for rows in children):
        # A cut list would look as if the rest had been deleted.
        raise RemoteUnavailable(
            f"a session has {ROWS_MAX} children or more, which one read can't return",
            hint="it is readable where it was written",
        )
