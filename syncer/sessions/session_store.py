"""Sessions on the durable buffer: what is written here is acknowledged here.

A write never asks the server when the session is held here. A read asks it within a short budget
when the local copy has nothing pending; what can't be asked for is unknown, never absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Self

from local_store import (
    InvalidWrite,
    LocalStore,
    LocalStoreError,
    Op,
    Receipt,
    Row,
    RowNotFound,
    VersionMismatch,
)
from local_store.clock import Clock, new_id
from local_store.ops import Durability
from syncer.errors import RemoteUnavailable
from syncer.sessions.aggregate import (
    PARTS,
    SessionRows,
    assemble,
    rows_by_session,
    snapshot_of,
)
from syncer.sessions.cursor import Page, Position, after_cursor, cut
from syncer.sessions.models import PromptSession, SessionStatus
from syncer.sessions.read_through import ReadThrough
from syncer.sessions.row_store import RowSessionStore, Traces, canonical
from syncer.sessions.server_reads import Reads, Stretch
from syncer.sessions.store_api import RequestKey, SessionPage, SyncInfo, at_host
from syncer.sessions.tables import SESSIONS

LOCAL = ("created_at", "status")  # what decides whether and where a session is listed


class BufferedSessionStore(RowSessionStore):
    """One user's sessions on a LocalStore, read through to a server while it can be asked.

    Without a `remote` the local copy is all there is. With one, an id that isn't held here while
    `remote_usable` says no is unknown: RemoteUnavailable. `last_receipt` is the acknowledgement
    of the latest write through this object; it may be shared by threads except for that.

    `acknowledge` takes a receipt as far as the deployment asks before a write returns; `survives`
    tells what undelivered transactions, by their seqs, survive.
    """

    def __init__(
        self,
        store: LocalStore,
        user_id: str,
        remote: Reads | None = None,
        remote_usable: Callable[[], bool] = lambda: True,
        read_budget_s: float = 0.5,
        *,
        clock: Clock | None = None,
        ids: Callable[[], str] = new_id,
        owns_store: bool = False,
        acknowledge: Callable[[Receipt], Receipt] = lambda receipt: receipt,
        survives: Callable[[Collection[int]], Durability] = at_host,
        on_ack: Callable[[float], None] = lambda took_s: None,
    ) -> None:
        super().__init__(user_id, clock, ids)
        self._store = store
        self._remote_usable = remote_usable
        self._owns_store, self._on_ack = owns_store, on_ack
        self._acknowledge, self._survives = acknowledge, survives
        self._through: ReadThrough | None = None
        if remote is not None:
            self._through = ReadThrough(store, user_id, remote, read_budget_s, self._clock)
        self.last_receipt: Receipt | None = None

    def close(self) -> None:
        """Close the buffer if this object opened it."""
        if self._owns_store:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def knows(self, request: RequestKey) -> bool:
        """Tell whether the key was used before, for whatever."""
        return self._store.state(request.txn_id) is not None

    # -- reads ------------------------------------------------------------------------------------

    def get(self, session_id: str) -> PromptSession | None:
        """Return the session with this user's latest writes in it, or None when there is none.

        Pending changes come from here; else the server is asked within the read budget, and the
        local copy is the fallback, marked stale. Raises RemoteUnavailable when the id isn't held
        here and the server can't be asked.
        """
        row_id = canonical(session_id)
        if row_id is None:
            return None
        if not self._is_held(row_id):
            rows = self._fetch(row_id)
            return None if rows is None else assemble(row_id, snapshot_of(rows))
        stale = bool(self._clean_among([row_id])) and not self._refreshed(row_id)
        rows = self._rows(row_id)
        return None if rows is None else assemble(row_id, snapshot_of(rows, stale=stale))

    def sync_info(self, session: PromptSession) -> SyncInfo:
        """Tell where a session that this store returned stands now."""
        return self.sync_infos([session])[0]

    def sync_infos(self, sessions: Sequence[PromptSession]) -> list[SyncInfo]:
        """Tell of each session that this store returned where it stands now."""
        row_ids = [canonical(session.session_id) or "" for session in sessions]
        found = self._store.transactions_among(SESSIONS, row_ids, user_id=self._user_id)
        return [
            SyncInfo.of(
                [state for *_, state in found[row_id]],
                self._survives([seq for _txn_id, seq, _state in found[row_id]]),
                stale=session._base is not None and session._base.stale,
            )
            for row_id, session in zip(row_ids, sessions, strict=True)
        ]

    # -- what the base asks for -------------------------------------------------------------------

    def _commit(
        self, ops: Sequence[Op], current: SessionRows | None, request: RequestKey | None
    ) -> bool:
        txn_id, began = None if request is None else request.txn_id, self._clock.monotonic()
        try:
            receipt = self._store.write(ops, user_id=self._user_id, txn_id=txn_id)
        except (VersionMismatch, RowNotFound):
            return False
        except InvalidWrite:
            if current is not None and self._rows(current.session["id"]) is None:
                return False  # deleted between: new children have no parent any more
            raise
        self.last_receipt = self._acknowledge(receipt)
        self._on_ack(self._clock.monotonic() - began)
        return True

    def _traces(self, request: RequestKey, session_id: str) -> Traces:
        # Here only: a repeat that lands in another container is recognised by the server.
        return Traces(known=self.knows(request), was_here=self._is_held(session_id))

    def _kept(self, session_id: str) -> SessionRows | None:
        return self._rows(session_id)

    # -- the local copy ---------------------------------------------------------------------------

    def _found(self, session_id: str) -> SessionRows | None:
        """Return the rows from here if held; asks the server only for a session that isn't."""
        return self._rows(session_id) if self._is_held(session_id) else self._fetch(session_id)

    def _is_held(self, session_id: str) -> bool:
        return self._store.is_held(SESSIONS, session_id, user_id=self._user_id)

    def _clean_among(self, session_ids: Sequence[str]) -> list[str]:
        """Return those of the sessions that have nothing pending, nor have their children."""
        found = self._store.transactions_among(SESSIONS, session_ids, user_id=self._user_id)
        return [row_id for row_id in session_ids if not found[row_id]]

    def _rows(self, session_id: str) -> SessionRows | None:
        session = self._store.get(SESSIONS, session_id, user_id=self._user_id)
        if session is None:
            return None
        where = {"session_id": session_id}
        return SessionRows(
            session,
            {
                part.table: self._store.select(
                    part.table, user_id=self._user_id, where=where, limit=-1
                )
                for part in PARTS
            },
        )

    def _fetch(self, session_id: str) -> SessionRows | None:
        if self._through is not None:
            if not self._remote_usable():
                raise RemoteUnavailable(
                    f"session {session_id} isn't held here and Supabase can't be asked",
                    hint="try again later",
                )
            self._through.session(session_id)
        return self._rows(session_id)

    def _refreshed(self, session_id: str) -> bool:
        """Bring a clean session up to date; False when that wasn't possible."""
        if self._through is None:
            return True
        if not self._remote_usable():
            return False
        try:
            self._through.session(session_id)
        except (RemoteUnavailable, LocalStoreError):
            # A buffer that takes no more refreshes, because the disk is full, still answers reads.
            return False
        return True

    def _list(
        self, status: SessionStatus | None, limit: int | None, cursor: str | None
    ) -> SessionPage:
        after = after_cursor(cursor)
        local = self._store.select(
            SESSIONS,
            user_id=self._user_id,
            where={} if status is None else {"status": status},
            order_by="-created_at",
            after=after,
            limit=-1 if limit is None else limit + 1,  # one more tells whether others follow
            columns=LOCAL,
        )
        page = cut(local, status, limit, after)
        asked = self._through is None
        if self._through is not None and self._remote_usable():
            try:
                guessed = [row["id"] for row in page.rows if not row["_pending"]]
                listing = self._through.listed(status, limit, after, guessed)
                joined = self._joined(local, listing.stretch, status, limit, after)
                clean = self._clean_among([row["id"] for row in joined.rows])
                self._through.take(listing, clean)
                page, asked = joined, True
            except (RemoteUnavailable, LocalStoreError):
                pass
        ids = [row["id"] for row in page.rows]
        return SessionPage(self._sessions(ids, status, stale=not asked), asked, page.next)

    def _joined(
        self,
        local: Sequence[Row],
        there: Stretch,
        status: SessionStatus | None,
        limit: int | None,
        after: Position | None,
    ) -> Page:
        """Cut the page out of the server's rows and the local ones; pending changes win."""
        merged = {row["id"]: row for row in local}
        theirs = {str(row["id"]): row for row in there.rows}
        beside = [row_id for row_id in theirs if row_id not in merged]
        where = {"id": beside}
        elsewhere = self._store.select(
            SESSIONS, user_id=self._user_id, where=where, limit=-1, columns=LOCAL
        )
        known = merged | {row["id"]: row for row in elsewhere}
        for row_id, row in theirs.items():
            if row_id in known:
                merged[row_id] = known[row_id] if known[row_id]["_pending"] else row
            elif not self._is_held(row_id):  # else it was deleted here
                merged[row_id] = row
        known_to = there.rows[-1] if there.more else None
        return cut(merged.values(), status, limit, after, known_to)

    def _sessions(
        self, ids: Sequence[str], status: SessionStatus | None, *, stale: bool
    ) -> list[PromptSession]:
        """Build sessions from the local copy, where all of them are by now; in the order asked."""

        def held(table: str, column: str) -> list[Row]:
            where = {column: list(ids)}
            return self._store.select(table, user_id=self._user_id, where=where, limit=-1)

        sessions = {row["id"]: row for row in held(SESSIONS, "id")}
        chosen = [sessions[row_id] for row_id in ids if row_id in sessions]
        chosen = [row for row in chosen if status in (None, row["status"])]
        children = {part.table: held(part.table, "session_id") for part in PARTS}
        return [self._listed(rows, stale=stale) for rows in rows_by_session(chosen, children)]

    def _listed(self, rows: SessionRows, *, stale: bool) -> PromptSession:
        is_clean = not any(row["_pending"] for _table, row in rows.all())
        return assemble(rows.session["id"], snapshot_of(rows, stale=stale and is_clean))
