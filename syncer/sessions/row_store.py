"""What every store of sessions does alike: whole aggregates in, row changes out.

A store keeps rows in its own way and says how they are found, committed and listed. How a session
becomes rows, what a stale copy may do and what a repeated request is told is decided here, once.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from local_store import Delete, InvalidWrite, Op, user_uuid
from local_store.clock import Clock, SystemClock, isoformat, new_id
from syncer.sessions.aggregate import SessionRows, Snapshot, assemble, copied, snapshot_of
from syncer.sessions.diff import Change, Mark, NewId, creation, difference
from syncer.sessions.errors import (
    ConcurrentModificationError,
    IdempotencyMismatch,
    SessionNotFound,
)
from syncer.sessions.models import PromptSession, SessionStatus
from syncer.sessions.store_api import RequestKey, SessionPage
from syncer.sessions.tables import SESSIONS

PAGE_MAX = 1_000  # sessions with all their children: some megabytes
WRITE_ATTEMPTS_MAX = 64  # each lost race means that somebody else's write got through


@dataclass(frozen=True, slots=True)
class Traces:
    """What is known of a request before its rows are read.

    `known`: its key was used before, for whatever. `was_here`: the session it would create is
    here, or was and has been deleted.
    """

    known: bool
    was_here: bool


class RowSessionStore(ABC):
    """One user's sessions, kept as rows somewhere. Subclasses say where."""

    def __init__(
        self, user_id: str, clock: Clock | None = None, ids: Callable[[], str] = new_id
    ) -> None:
        self._user_id = user_id
        self._clock = clock or SystemClock()
        self._ids = ids
        self._me = object()  # by which rows that were read through this object are known again

    @property
    def user_id(self) -> str:
        """The user whose sessions these are, as given."""
        return self._user_id

    # -- the rows, as each kind of store has them --------------------------------------------------

    @abstractmethod
    def _found(self, session_id: str) -> SessionRows | None:
        """Return a session's rows, to show them or to change them; None when there is none."""

    @abstractmethod
    def _commit(
        self, ops: Sequence[Op], current: SessionRows | None, request: RequestKey | None
    ) -> bool:
        """Make the ops one transaction; False when a row isn't as `current` has it any more.

        Raises InvalidWrite, TransactionIdReused: then nothing was written.
        """

    @abstractmethod
    def _traces(self, request: RequestKey, session_id: str) -> Traces:
        """Look for what an earlier run of the request left, before its rows are read."""

    @abstractmethod
    def _list(
        self, status: SessionStatus | None, limit: int | None, cursor: str | None
    ) -> SessionPage:
        """Return some sessions, newest first; all of them without a limit."""

    @abstractmethod
    def knows(self, request: RequestKey) -> bool:
        """Tell whether the key was used before, for whatever."""

    # -- writes -----------------------------------------------------------------------------------

    def create(self, session: PromptSession, *, request: RequestKey | None = None) -> str:
        """Store a new session with its history, as one transaction; returns its id.

        Raises InvalidWrite naming the column, also when the id is taken.
        """
        self._check_author(session)
        change = creation(session, self._new_id(request), _mark(request), self._now())
        if not self._commit(change.ops, None, request):
            raise InvalidWrite(SESSIONS, "id", "is taken")
        self._remember(session, change)
        return session.session_id

    def update(self, session: PromptSession, *, request: RequestKey | None = None) -> None:
        """Store what the caller changed since this object was read or written, in one transaction.

        Raises ConcurrentModificationError naming the fields that somebody else changed meanwhile,
        SessionNotFound, InvalidWrite; RemoteUnavailable when the session can't be looked for now.
        """
        self._check_author(session)
        session_id = canonical(session.session_id)
        if session_id is None:
            raise SessionNotFound(session.session_id)
        at_hand = self._at_hand(session)
        for _attempt in range(WRITE_ATTEMPTS_MAX):
            current = at_hand or self._found(session_id)
            if current is None:
                raise SessionNotFound(session_id)
            change = difference(
                session, current, self._new_id(request), _mark(request), self._now()
            )
            if change.clashes:
                raise ConcurrentModificationError(session_id, change.clashes)
            if self._commit(change.ops, current, request) if change.ops else at_hand is None:
                self._remember(session, change)
                return
            at_hand = None  # a write came between: merge with that one too
        raise ConcurrentModificationError(session_id, ["*"])

    def delete(self, session_id: str, *, request: RequestKey | None = None) -> None:
        """Delete the session with its history.

        Nothing happens when there is none. Raises RemoteUnavailable when that is unknown.
        """
        row_id = canonical(session_id)
        if row_id is None:
            return
        is_repeat = request is not None and self.knows(request)
        for _attempt in range(WRITE_ATTEMPTS_MAX):
            current = None if is_repeat else self._found(row_id)
            if current is None and not is_repeat:
                return
            if self._commit([Delete(SESSIONS, row_id)], current, request) or is_repeat:
                return
        raise ConcurrentModificationError(row_id, ["*"])

    def is_repeat(self, request: RequestKey, session: PromptSession | None, known: bool) -> bool:
        """Tell whether `session` carries this request; `known` is from before it was read.

        Raises IdempotencyMismatch when the key was used for anything else.
        """
        base: Snapshot | None = None if session is None else session._base
        seen = None if base is None else base.requests.get(request.txn_id)
        if seen == request.fingerprint:
            return True
        if seen is not None or known:
            raise IdempotencyMismatch
        return False

    def created_by(self, request: RequestKey) -> PromptSession | None:
        """Return the session that this very request created, None when it is new.

        Raises IdempotencyMismatch; SessionNotFound when that session was deleted since.
        """
        session_id = request.row_id(SESSIONS)
        # In this order: a twin of this request may be writing between the two.
        traces = self._traces(request, session_id)
        rows = self._kept(session_id)
        if rows is None and traces.was_here:
            raise SessionNotFound(session_id)
        session = None if rows is None else assemble(session_id, snapshot_of(rows))
        return session if self.is_repeat(request, session, traces.known) else None

    # -- reads ------------------------------------------------------------------------------------

    def get(self, session_id: str) -> PromptSession | None:
        """Return the session, or None when there is none; a malformed id names none."""
        row_id = canonical(session_id)
        rows = None if row_id is None else self._found(row_id)
        return None if row_id is None or rows is None else assemble(row_id, snapshot_of(rows))

    def load(self, session_id: str) -> PromptSession | None:
        """Return the session to change it: a copy held at hand is good enough.

        The first `update` of it through this object compares and sets on the rows read here.
        """
        row_id = canonical(session_id)
        rows = None if row_id is None else self._found(row_id)
        if row_id is None or rows is None:
            return None
        return assemble(row_id, replace(snapshot_of(rows), at_hand=(self._me, rows)))

    def list_active(self) -> list[PromptSession]:
        """Return all active sessions known now, newest first; see `list_page` for completeness."""
        return self._list("active", None, None).sessions

    def list_all(self) -> list[PromptSession]:
        """Return all sessions known now, newest first; see `list_page` for completeness."""
        return self._list(None, None, None).sessions

    def list_page(
        self,
        status: SessionStatus | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> SessionPage:
        """Return at most `limit` sessions (1 to 1,000), newest first, from after `cursor` on.

        Raises InvalidCursor.
        """
        return self._list(status, min(max(limit, 1), PAGE_MAX), cursor)

    # -- shared -----------------------------------------------------------------------------------

    def _kept(self, session_id: str) -> SessionRows | None:
        """Return the rows that an earlier run of a request may have made."""
        return self._found(session_id)

    def _at_hand(self, session: PromptSession) -> SessionRows | None:
        """Return the rows that `load` read for this session, if this very object did."""
        base: Snapshot | None = session._base
        known = None if base is None else base.at_hand
        return known[1] if known is not None and known[0] is self._me else None

    def _remember(self, session: PromptSession, change: Change) -> None:
        assert change.snapshot is not None
        session._base = replace(copied(change.snapshot), stale=False)

    def _check_author(self, session: PromptSession) -> None:
        owner = session.user_id
        if owner is not None and user_uuid(owner) != user_uuid(self._user_id):
            raise InvalidWrite(SESSIONS, "user_id", "isn't the user of this store")

    def _new_id(self, request: RequestKey | None) -> NewId:
        if request is None:
            return lambda table, number: self._ids()
        return request.row_id

    def _now(self) -> str:
        return isoformat(self._clock.now())


def canonical(session_id: object) -> str | None:
    """Return a session's id in the form rows have it in; None when it can't be one."""
    try:
        return str(uuid.UUID(session_id)) if isinstance(session_id, str) else None
    except ValueError:
        return None


def _mark(request: RequestKey | None) -> Mark:
    return None if request is None else [request.txn_id, request.fingerprint]
