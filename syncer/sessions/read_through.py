"""Fresher rows from the server, when it can be asked within a short budget.

The budget is for what is held here: late, the copy is shown instead. What isn't held has no copy,
so that its reader waits for up to 2 s.

Rows go into the local copy only together with their whole session, children first: a session row
that is held here promises that its children are held too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from local_store import LocalStore, Row, user_uuid
from local_store.clock import Clock
from syncer.errors import RemoteUnavailable, SyncError
from syncer.remote import TableRead
from syncer.sessions.aggregate import PARTS, SessionRows
from syncer.sessions.cursor import Position
from syncer.sessions.models import SessionStatus
from syncer.sessions.server_reads import (
    LISTED,
    Ask,
    Reads,
    Stretch,
    Versions,
    as_stretch,
    digests_of,
    page_of,
    stretch_of,
    told_versions,
    versions_in,
    versions_of,
    whole_sessions,
)
from syncer.sessions.store_api import RowVersions
from syncer.sessions.tables import SESSIONS

FETCH_S = 2.0  # where there is nothing to show instead; far above what a slow server takes
_DERIVED = ("current_ir",)  # repeats a draft's content; not worth keeping twice


@dataclass(frozen=True, slots=True)
class Listing:
    """A stretch of the user's list as the server has it, without the sessions' children.

    `guessed` are the versions here of sessions that were expected in it, `versions` the server's.
    `as_of` is the local change counter before the question, `end` when the budget is spent.
    """

    stretch: Stretch
    guessed: Versions
    versions: Versions
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

    def refresh(self, session_id: str, here: RowVersions | None) -> bool:
        """Refresh one session, or drop it here when the server has none; tells whether it had to.

        `here` are its rows' versions; None while they have changes. Raises RemoteUnavailable when
        the server can't be asked in time.
        """
        return self._one(session_id, here, self.end_of_budget())

    def fetch(self, session_id: str) -> None:
        """Take a session that isn't held here, if the server has it; raises as `refresh` does."""
        self._one(session_id, None, self.end_of_fetch())

    def _one(self, session_id: str, here: RowVersions | None, end: float) -> bool:
        as_of = self._store.change_counter()
        found = whole_sessions(self._asking(end), [session_id])
        if here is not None and [versions_in(rows) for rows in found] == [here]:
            return False
        self._take(found, [session_id], as_of)
        return True

    def end_of_budget(self) -> float:
        """Return until when, on the monotonic clock, a reader waits who has the local copy."""
        return self._clock.monotonic() + self._budget_s

    def end_of_fetch(self) -> float:
        """Return until when a reader waits who has none."""
        return self._clock.monotonic() + max(self._budget_s, FETCH_S)

    def digests(
        self,
        status: SessionStatus | None,
        limit: int | None,
        after: Position | None,
        but: Sequence[str],
        end: float,
    ) -> list[list[Row]]:
        """Ask what `is_digest_of` compares with the versions of a page and of one session more.

        Both leave out the sessions `but`. Raises RemoteUnavailable as `refresh` does.
        """
        return self._asking(end)(digests_of(status, limit, after, but))

    def listed(
        self,
        status: SessionStatus | None,
        limit: int | None,
        after: Position | None,
        guessed: Versions,
        end: float,
    ) -> Listing:
        """Ask for a page of the list and for the versions of the sessions guessed to be on it.

        Changes nothing here. Raises RemoteUnavailable as `refresh` does.
        """
        as_of = self._store.change_counter()
        ask, ids = self._asking(end), list(guessed)
        if limit is None:
            stretch = stretch_of(ask, status, None, after, LISTED)
            answers = [rows for reads in versions_of(ids) for rows in ask(reads)]
        else:
            chunks = versions_of(ids)
            reads = [page_of(status, limit, after, LISTED), *(r for chunk in chunks for r in chunk)]
            rows, *answers = ask(reads)
            stretch = as_stretch(rows, limit)
        return Listing(stretch, guessed, told_versions(ask, ids, answers), as_of, end)

    def take(self, listing: Listing, session_ids: Sequence[str]) -> None:
        """Refresh those of the sessions that the server has otherwise, drop those it hasn't.

        Spends what is left of the listing's budget. Raises RemoteUnavailable.
        """
        differing = [
            row_id
            for row_id in session_ids
            if row_id not in listing.guessed
            or listing.guessed[row_id] != listing.versions.get(row_id)
        ]
        if differing:
            found = whole_sessions(self._asking(listing.end), differing)
            self._take(found, differing, listing.as_of)

    def _asking(self, end: float) -> Ask:
        """Return the way to ask until the budget is spent."""

        def ask(reads: Sequence[TableRead]) -> list[list[Row]]:
            left = max(0.001, end - self._clock.monotonic())
            try:
                return self._remote.read(self._user_id, reads, timeout_s=left)
            except RemoteUnavailable:
                raise
            except SyncError as error:
                # Whatever kept it from answering, the row is unknown and not absent.
                raise RemoteUnavailable(
                    f"Supabase didn't answer a read ({type(error).__name__})",
                    hint="try again later",
                ) from error

        return ask

    def _take(self, found: Sequence[SessionRows], asked: Sequence[str], as_of: int) -> None:
        """Take sessions as the server has them; what was asked for and isn't found is gone."""
        here = self._versions(asked)
        for part in PARTS:
            rows = [row for session in found for row in session.children[part.table]]
            self._refresh(part.table, rows, "session_id", asked, here, as_of)
        slim = [{k: v for k, v in s.session.items() if k not in _DERIVED} for s in found]
        self._refresh(SESSIONS, slim, "id", asked, here, as_of)

    def _refresh(
        self,
        table: str,
        rows: list[Row],
        column: str,
        asked: Sequence[str],
        here: Versions,
        as_of: int,
    ) -> None:
        """Take what differs; most reads bring nothing new and must not cost an fsync."""
        there = {str(row["id"]): str(row["updated_at"]) for row in rows}
        mine = {
            row_id: (session_id, version)
            for session_id, versions in here.items()
            for kind, row_id, version in versions
            if kind == table
        }
        lacking = {session_id for row_id, (session_id, _) in mine.items() if row_id not in there}
        news = [row for row in rows if mine.get(str(row["id"]), ("", ""))[1] != row["updated_at"]]
        if lacking:
            kept = [row for row in rows if str(row[column]) in lacking]
            where: dict[str, Any] = {column: [i for i in asked if i in lacking]}
            self._store.refresh(table, kept, user_id=self._user_id, as_of=as_of, where=where)
        if news:
            # Equality with a row that is present drops nothing.
            where = {"id": news[0]["id"]}
            self._store.refresh(table, news, user_id=self._user_id, as_of=as_of, where=where)

    def _versions(self, session_ids: Sequence[str]) -> Versions:
        """Return the versions of what is held here of these sessions."""
        ids = list(session_ids)
        found: dict[str, set[tuple[str, str, str]]] = {}
        for table, column in ((SESSIONS, "id"), *((part.table, "session_id") for part in PARTS)):
            rows = self._store.select(
                table,
                user_id=self._user_id,
                where={column: ids},
                limit=-1,
                columns=() if column == "id" else (column,),
            )
            for row in rows:
                entry = (table, str(row["id"]), str(row["updated_at"]))
                found.setdefault(str(row[column]), set()).add(entry)
        return {row_id: frozenset(versions) for row_id, versions in found.items()}
