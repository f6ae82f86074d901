"""A page of one user's sessions, of what is held here and what the server has.

While nothing of a page changed, here or there, that is all there is to find out: the server is
asked for digests of the page only, while the local copy is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from local_store import LocalStore, LocalStoreError, Row
from syncer.errors import RemoteUnavailable
from syncer.sessions.cursor import Page, Position, after_cursor, cut
from syncer.sessions.documents import Documents, Shown
from syncer.sessions.models import SessionStatus
from syncer.sessions.read_through import ReadThrough
from syncer.sessions.server_reads import Stretch, is_digest_of
from syncer.sessions.store_api import RowVersions
from syncer.sessions.tables import SESSIONS

LEFT_OUT_MAX = 1_000  # keys in one question: 40 KB


@dataclass(frozen=True, slots=True)
class Listed:
    """A page, whether the server was asked for it, and the documents that were looked at."""

    page: Page
    asked: bool
    found: Mapping[str, Shown]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which page is asked for."""

    status: SessionStatus | None
    limit: int | None
    after: Position | None

    def cut(self, rows: Iterable[Row], known_to: Row | None = None) -> Page:
        """Cut the page out of rows."""
        return cut(rows, self.status, self.limit, self.after, known_to)


class Lister:
    """Finds pages of one user's sessions."""

    def __init__(
        self,
        store: LocalStore,
        user_id: str,
        documents: Documents,
        through: ReadThrough | None,
        remote_usable: Callable[[], bool],
    ) -> None:
        self._store, self._user_id, self._documents = store, user_id, documents
        self._through, self._remote_usable = through, remote_usable

    def page(self, status: SessionStatus | None, limit: int | None, cursor: str | None) -> Listed:
        """Return a page by what is here and, if it can be asked, by what the server has.

        Raises InvalidCursor.
        """
        asked = _Asked(status, limit, after_cursor(cursor))
        if self._through is None or not self._remote_usable():
            clean, changed = self._candidates(asked)
            here = self._look([*clean, *changed])
            return Listed(asked.cut(_places(here)), self._through is None, here)
        return self._compared(self._through, asked)

    def _compared(self, through: ReadThrough, asked: _Asked) -> Listed:
        """Return the page; ask for its rows only when what has no changes here doesn't stand.

        What is delivered meanwhile was left out of the question, and is known from its reply.
        """
        end = through.end_of_budget()
        clean, changed = self._candidates(asked)
        with ThreadPoolExecutor(1) as beside:
            told = beside.submit(_digests, through, asked, clean, changed, end)
            here = self._look([*clean, *changed])
        versions = _versions(here, clean)
        try:
            if len(versions) == len(clean) and is_digest_of(told.result(), versions):
                return Listed(asked.cut(_places(here)), True, here)
            return self._joined(through, asked, here, versions)
        except (RemoteUnavailable, LocalStoreError):
            return Listed(asked.cut(_places(here)), False, here)

    def _candidates(self, asked: _Asked) -> tuple[list[str], list[str]]:
        return self._store.candidates(
            SESSIONS,
            user_id=self._user_id,
            where={} if asked.status is None else {"status": asked.status},
            order_by="-created_at",
            after=asked.after,
            limit=-1 if asked.limit is None else asked.limit + 1,  # one more tells of others
        )

    def _joined(
        self,
        through: ReadThrough,
        asked: _Asked,
        here: Mapping[str, Shown],
        versions: Mapping[str, RowVersions],
    ) -> Listed:
        """Ask the server for the page and bring up to date here what it has otherwise.

        It answered in time, or there is little here to show instead: that is worth waiting for.
        """
        end = through.end_of_fetch()
        there = through.listed(asked.status, asked.limit, asked.after, versions, end)
        page = self._cut(asked, here, there.stretch)
        row_ids = [row["id"] for row in page.rows]
        unsettled = self._store.transactions_among(SESSIONS, row_ids, user_id=self._user_id)
        through.take(there, [row_id for row_id in row_ids if not unsettled[row_id]])
        return Listed(page, True, self._look(row_ids))

    def _cut(self, asked: _Asked, here: Mapping[str, Shown], there: Stretch) -> Page:
        """Cut the page out of the server's rows and the local ones; pending changes win."""
        theirs = {str(row["id"]): row for row in there.rows}
        known = {**here, **self._look([row_id for row_id in theirs if row_id not in here])}
        merged = {row_id: shown.document.place for row_id, shown in here.items()}
        for row_id, row in theirs.items():
            if row_id in known:
                document = known[row_id].document
                merged[row_id] = document.place if document.versions is None else row
            elif not self._store.is_held(SESSIONS, row_id, user_id=self._user_id):
                merged[row_id] = row  # else it was deleted here
        known_to = there.rows[-1] if there.more else None
        return asked.cut(merged.values(), known_to)

    def _look(self, session_ids: Sequence[str]) -> dict[str, Shown]:
        return self._documents.look(self._store, self._user_id, session_ids)


def _digests(
    through: ReadThrough, asked: _Asked, clean: Sequence[str], changed: Sequence[str], end: float
) -> list[list[Row]] | None:
    """Ask for the page's digests; None where it would be of nothing, or without too many."""
    if not clean or len(changed) > LEFT_OUT_MAX:
        return None
    return through.digests(asked.status, asked.limit, asked.after, changed, end)


def _places(found: Mapping[str, Shown]) -> list[Row]:
    return [shown.document.place for shown in found.values()]


def _versions(found: Mapping[str, Shown], session_ids: Sequence[str]) -> dict[str, RowVersions]:
    """Return by id the versions of those sessions that are as the server was known to have them."""
    documents = [(row_id, found[row_id].document) for row_id in session_ids if row_id in found]
    return {row_id: doc.versions for row_id, doc in documents if doc.versions is not None}
