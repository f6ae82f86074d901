"""What an application does with sessions: create, refine, roll back, finish.

Coroutines; everything that blocks runs off the event loop. A change is read, made and stored; when
somebody else changed the session in between, it is made again on what they left. All of it runs in
one thread, because each way to a thread and back costs as much as a read; only what a translator
that is a coroutine does is awaited on the loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, cast

from local_store import TransactionIdReused
from syncer.sessions.errors import (
    ConcurrentModificationError,
    DraftNotFound,
    IdempotencyMismatch,
    SessionNotFound,
)
from syncer.sessions.models import (
    HoleResolution,
    IRDraft,
    PromptRevision,
    PromptSession,
    ResolutionType,
    SessionSource,
    draft_of,
    timestamp_now,
)
from syncer.sessions.store_api import RequestKey, SessionStore
from syncer.sessions.tables import SESSIONS
from syncer.sessions.threads import OffLoop, OnLoop, in_thread, to_thread
from syncer.sessions.translate import IR, SketchTranslator, Translate, Translator, TranslatorOf

SessionEvent = Literal["created", "finalized", "abandoned", "hole_resolved"]
Make = Callable[[PromptSession], Awaitable[SessionEvent | None]]  # returns what there is to tell
Made = tuple[PromptSession, SessionEvent | None]
Tell = Callable[[SessionEvent, PromptSession], None]

CHANGE_ATTEMPTS_MAX = 64  # each lost race means that another change of the session got through


class SpecSessionManager:
    """Plays the life of prompt sessions on one user's store.

    `translate` is a Translator, or a callable from prompt to IR, sync or async, that may carry a
    `fill`. With `request` a repeated call has one effect and gives the same session again; the
    same key for anything else raises IdempotencyMismatch. `tell` hears of each change once it is
    stored; a repeated request changes nothing.
    """

    def __init__(
        self,
        store: SessionStore,
        translate: Translator | Translate | None = None,
        *,
        off_loop: OffLoop = to_thread,
        tell: Tell = lambda event, session: None,
    ) -> None:
        self._store = store
        self._tell = tell
        self._translator = _translator(translate)
        self._off_loop = off_loop

    async def create_from_prompt(
        self,
        prompt: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        request: RequestKey | None = None,
    ) -> PromptSession:
        """Create a session from a prompt: its initial revision and its first draft."""

        async def make(session: PromptSession) -> SessionEvent:
            ir = await self._called(self._translator.translate, prompt)
            session.add_revision(PromptRevision(content=prompt, revision_type="initial"))
            session.add_draft(draft_of(ir, 1))
            return "created"

        return await self._create("prompt", metadata, make, request)

    async def create_from_reverse_mode(
        self,
        ir: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        request: RequestKey | None = None,
    ) -> PromptSession:
        """Create a session from an IR that was lifted from code."""

        async def make(session: PromptSession) -> SessionEvent:
            session.add_draft(draft_of(copy.deepcopy(dict(ir)), 1))
            return "created"

        return await self._create("reverse_mode", metadata, make, request)

    async def resolve_hole(
        self,
        session_id: str,
        hole_id: str,
        text: str,
        type: ResolutionType = "clarify_intent",
        *,
        request: RequestKey | None = None,
    ) -> PromptSession:
        """Answer a hole: the answer, a revision that says it, and a new draft with it worked in.

        Unknown hole ids are accepted, and a hole may be answered again. Raises SessionNotFound.
        """

        async def make(session: PromptSession) -> SessionEvent:
            now = timestamp_now()
            resolution = HoleResolution(
                hole_id=hole_id, resolution_text=text, resolution_type=type, timestamp=now
            )
            session.add_resolution(resolution)
            session.add_revision(
                PromptRevision(
                    timestamp=now, content=text, revision_type="hole_fill", target_hole=hole_id
                )
            )
            draft = session.current_draft
            if draft is None:
                return "hole_resolved"  # nothing to work it into: the answer stays unapplied
            ir = copy.deepcopy(draft.ir)  # the older draft stays as it was, whatever fill does
            ir = await self._called(self._translator.fill, ir, hole_id, text, type)
            session.add_draft(draft_of(ir, _next_version(session)))
            resolution.applied = True
            return "hole_resolved"

        return await self._change(session_id, make, request)

    async def finalize(
        self, session_id: str, *, request: RequestKey | None = None
    ) -> PromptSession:
        """Declare the session done, with or without open holes. Raises SessionNotFound."""

        async def make(session: PromptSession) -> SessionEvent | None:
            is_news = session.status != "finalized"
            session.finalize()
            return "finalized" if is_news else None

        return await self._change(session_id, make, request)

    finalize_session = finalize

    async def abandon(self, session_id: str, *, request: RequestKey | None = None) -> PromptSession:
        """Declare the session given up. Raises SessionNotFound."""

        async def make(session: PromptSession) -> SessionEvent | None:
            is_news = session.status != "abandoned"
            session.abandon()
            return "abandoned" if is_news else None

        return await self._change(session_id, make, request)

    async def rollback(
        self, session_id: str, version: int, *, request: RequestKey | None = None
    ) -> PromptSession:
        """Make an older draft the current one again, as a new draft: history only grows.

        Of several drafts of that version the last counts. Raises DraftNotFound, SessionNotFound.
        """

        async def make(session: PromptSession) -> None:
            found = [draft for draft in session.ir_drafts if draft.version == version]
            if not found:
                raise DraftNotFound(session_id, version)
            changes = {"version": _next_version(session), "created_at": timestamp_now()}
            session.add_draft(IRDraft.from_dict({**found[-1].to_dict(), **changes}))

        return await self._change(session_id, make, request)

    async def get_session(self, session_id: str) -> PromptSession | None:
        """Return the session, or None when there is none."""
        return await self._off_loop(self._store.get, session_id)

    async def list_active_sessions(self) -> list[PromptSession]:
        """Return the active sessions, newest first."""
        return await self._off_loop(self._store.list_active)

    async def delete_session(
        self, session_id: str, *, request: RequestKey | None = None
    ) -> PromptSession | None:
        """Delete the session with its history and return what it was.

        A repeated request returns None: what it deleted is gone. Raises SessionNotFound.
        """

        def delete() -> PromptSession | None:
            session = self._store.load(session_id)
            if session is None and not (request is not None and self._store.knows(request)):
                raise SessionNotFound(session_id)
            try:
                self._store.delete(session_id, request=request)
            except TransactionIdReused:
                raise IdempotencyMismatch from None
            return session

        return await self._off_loop(delete)

    async def _create(
        self,
        source: SessionSource,
        metadata: Mapping[str, Any] | None,
        make: Make,
        request: RequestKey | None,
    ) -> PromptSession:
        return self._told(
            *await in_thread(self._created(source, metadata, make, request), self._off_loop)
        )

    async def _change(
        self, session_id: str, make: Make, request: RequestKey | None
    ) -> PromptSession:
        return self._told(
            *await in_thread(self._changed(session_id, make, request), self._off_loop)
        )

    # -- in the change's thread -------------------------------------------------------------------

    async def _created(
        self,
        source: SessionSource,
        metadata: Mapping[str, Any] | None,
        make: Make,
        request: RequestKey | None,
    ) -> Made:
        session = PromptSession.create_new(source=source, metadata=metadata)
        session.user_id = self._store.user_id
        if request is not None:
            session.session_id = request.row_id(SESSIONS)
            made = self._store.created_by(request)
            if made is not None:
                return made, None
        event = await make(session)
        try:
            self._store.create(session, request=request)
        except TransactionIdReused:
            # The same request, sent twice at once: the other one was faster.
            made = self._store.created_by(cast("RequestKey", request))
            if made is None:
                raise IdempotencyMismatch from None
            return made, None
        return session, event

    async def _changed(self, session_id: str, make: Make, request: RequestKey | None) -> Made:
        for _attempt in range(CHANGE_ATTEMPTS_MAX):
            session, is_done = self._loaded(session_id, request)
            if is_done:
                return session, None
            event = await make(session)
            try:
                self._store.update(session, request=request)
            except (ConcurrentModificationError, TransactionIdReused):
                continue  # make it again on what the others left, or find that it was made
            return session, event
        raise ConcurrentModificationError(session_id, ["*"])

    def _told(self, session: PromptSession, event: SessionEvent | None) -> PromptSession:
        if event is not None:
            self._tell(event, session)
        return session

    def _loaded(self, session_id: str, request: RequestKey | None) -> tuple[PromptSession, bool]:
        """Return the session and whether this request changed it already."""
        known = request is not None and self._store.knows(request)
        session = self._store.load(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        return session, request is not None and self._store.is_repeat(request, session, known)

    async def _called(self, call: Callable[..., IR | Awaitable[IR]], *args: Any) -> IR:
        result = call(*args)
        return cast("IR", await OnLoop(result)) if inspect.isawaitable(result) else result


def _translator(translate: Translator | Translate | None) -> Translator:
    if translate is None:
        return SketchTranslator()
    if hasattr(translate, "translate"):
        return cast("Translator", translate)
    fill = getattr(translate, "fill", SketchTranslator().fill)
    return TranslatorOf(translate, fill)


def _next_version(session: PromptSession) -> int:
    return max((draft.version for draft in session.ir_drafts), default=0) + 1
