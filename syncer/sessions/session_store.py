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
    Unsettled,
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
    rows_of,
    snapshot_of,
)
from syncer.sessions.documents import Documents, Shown, array_of, end_of
from syncer.sessions.lister import Lister
from syncer.sessions.models import PromptSession, SessionStatus
from syncer.sessions.read_through import ReadThrough
from syncer.sessions.row_store import PAGE_MAX, RowSessionStore, Traces, canonical
from syncer.sessions.server_reads import Reads, versions_in
from syncer.sessions.store_api import (
    DocumentPage,
    RequestKey,
    RowVersions,
    SessionPage,
    SyncInfo,
    at_host,
)
from syncer.sessions.tables import SESSIONS


class BufferedSessionStore(RowSessionStore):
    """One user's sessions on a LocalStore, read through to a server while it can be asked.

    Without a `remote` the local copy is all there is. With one, an id that isn't held here while
    `remote_usable` says no is unknown: RemoteUnavailable. `last_receipt` is the acknowledgement
    of the latest write through this object, `last_sync` where its session stood then; the object
    may be shared by threads except for these.

    `acknowledge` takes a receipt as far as the deployment asks before a write returns; `survives`
    tells what undelivered transactions, by their seqs, survive; `documents` are those of the
    process, where it keeps any.
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
        documents: Documents | None = None,
    ) -> None:
        super().__init__(user_id, clock, ids)
        self._store = store
        self._remote_usable = remote_usable
        self._owns_store, self._on_ack = owns_store, on_ack
        self._acknowledge, self._survives = acknowledge, survives
        self._through: ReadThrough | None = None
        if remote is not None:
            self._through = ReadThrough(store, user_id, remote, read_budget_s, self._clock)
        self._documents = documents or Documents()
        self._lister = Lister(store, user_id, self._documents, self._through, remote_usable)
        self.last_receipt: Receipt | None = None
        self.last_sync: SyncInfo | None = None

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
        [held] = self._store.aggregates(SESSIONS, [row_id], user_id=self._user_id).values()
        rows, stale = rows_of(held), False
        if rows is None:
            rows = self._found(row_id)
        elif not held.unsettled:
            try:
                is_news = self._is_news(row_id, versions_in(rows))
                rows = self._rows(row_id) if is_news else rows
            except (RemoteUnavailable, LocalStoreError):
                # A buffer that takes no more refreshes, because the disk is full, still answers.
                stale = True
        return None if rows is None else assemble(row_id, snapshot_of(rows, stale=stale))

    def get_document(self, session_id: str) -> bytes | None:
        """Return what `get` and `sync_info` do as JSON, which is kept while it stands."""
        row_id = canonical(session_id)
        if row_id is None:
            return None
        shown, stale = self._shown(row_id), False
        if shown is None:
            if not self._is_held(row_id):
                self._fetch(row_id)
            shown = self._shown(row_id)
        elif not shown.unsettled:
            try:
                if self._is_news(row_id, shown.document.versions):
                    shown = self._shown(row_id)
            except (RemoteUnavailable, LocalStoreError):
                stale = True
        if shown is None:
            return None
        return shown.document.text + end_of(self._info(shown.unsettled, stale=stale))

    def list_documents(
        self, status: SessionStatus | None = None, limit: int = 50, cursor: str | None = None
    ) -> DocumentPage:
        """Return what `list_page` and `sync_infos` do as JSON, which is kept while it stands."""
        listed = self._lister.page(status, min(max(limit, 1), PAGE_MAX), cursor)
        settled = end_of(self._info((), stale=not listed.asked))
        shown = []
        for row in listed.page.rows:
            found = listed.found.get(row["id"])
            if found is not None and status in (None, found.document.place["status"]):
                known = found.unsettled
                end = end_of(self._info(known, stale=not listed.asked)) if known else settled
                shown.append((found.document, end))
        return DocumentPage(array_of(shown), listed.asked, listed.page.next)

    def sync_info(self, session: PromptSession) -> SyncInfo:
        """Tell where a session that this store returned stands now."""
        return self.sync_infos([session])[0]

    def sync_infos(self, sessions: Sequence[PromptSession]) -> list[SyncInfo]:
        """Tell of each session that this store returned where it stands now."""
        row_ids = [canonical(session.session_id) or "" for session in sessions]
        found = self._store.transactions_among(SESSIONS, row_ids, user_id=self._user_id)
        return [
            self._info(found[row_id], stale=session._base is not None and session._base.stale)
            for row_id, session in zip(row_ids, sessions, strict=True)
        ]

    def _info(self, unsettled: Sequence[Unsettled], *, stale: bool) -> SyncInfo:
        survives = self._survives([seq for _txn_id, seq, _state in unsettled])
        return SyncInfo.of([state for *_, state in unsettled], survives, stale=stale)

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
        before = () if current is None else current.unsettled
        self.last_sync = self._info(
            [*before, (receipt.txn_id, receipt.seq, "pending")], stale=False
        )
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
        rows = self._rows(session_id)
        if rows is not None:
            return rows
        # Deleted here; or made since the look.
        return self._rows(session_id) if self._is_held(session_id) else self._fetch(session_id)

    def _shown(self, session_id: str) -> Shown | None:
        looked_at = self._documents.look(self._store, self._user_id, [session_id])
        return looked_at.get(session_id)

    def _is_held(self, session_id: str) -> bool:
        return self._store.is_held(SESSIONS, session_id, user_id=self._user_id)

    def _rows(self, session_id: str) -> SessionRows | None:
        [held] = self._store.aggregates(SESSIONS, [session_id], user_id=self._user_id).values()
        return rows_of(held)

    def _fetch(self, session_id: str) -> SessionRows | None:
        """Bring a session here that isn't held; raises RemoteUnavailable, where there is a server,
        when it can't be asked.
        """
        if self._through is not None:
            self._check_usable(session_id)
            self._through.fetch(session_id)
        return self._rows(session_id)

    def _is_news(self, session_id: str, here: RowVersions | None) -> bool:
        """Bring a held session up to date where there is a server; tells whether it wasn't.

        Raises RemoteUnavailable when the server can't be asked within the read budget.
        """
        if self._through is None:
            return False
        self._check_usable(session_id)
        return self._through.refresh(session_id, here)

    def _check_usable(self, session_id: str) -> None:
        if not self._remote_usable():
            raise RemoteUnavailable(
                f"session {session_id} isn't held here and Supabase can't be asked",
                hint="try again later",
            )

    def _list(
        self, status: SessionStatus | None, limit: int | None, cursor: str | None
    ) -> SessionPage:
        listed = self._lister.page(status, limit, cursor)
        ids = [row["id"] for row in listed.page.rows]
        sessions = self._sessions(ids, status, stale=not listed.asked)
        return SessionPage(sessions, listed.asked, listed.page.next)

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
