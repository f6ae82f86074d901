"""The sessions over HTTP. A write answers from the buffer and never waits for Supabase."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathValue
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from syncer.service.api_schema import (
    HistoryDocument,
    PageDocument,
    SessionDocument,
    reads,
    writes,
)
from syncer.service.auth import AuthenticatedRoute
from syncer.service.http_errors import invalid
from syncer.sessions import (
    BufferedSessionStore,
    PromptSession,
    RequestKey,
    SessionNotFound,
    SpecSessionManager,
)
from syncer.sessions.models import ResolutionType, SessionStatus
from syncer.sessions.row_store import PAGE_MAX
from syncer.sessions.store_api import SyncInfo

T = TypeVar("T")

KEY_CHARS_MAX = 255
HOLE_ID_CHARS_MAX = 512  # an identifier, not a text
PAGE_DEFAULT = 50


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("contains the NUL character, which can't be stored")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("contains a lone surrogate, which isn't valid UTF-8")
    return text


Text = Annotated[str, AfterValidator(_storable)]
HoleId = Annotated[
    str, PathValue(min_length=1, max_length=HOLE_ID_CHARS_MAX), AfterValidator(_storable)
]


class _Body(BaseModel):
    # A misspelt field that is silently ignored would be a write lost silently.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class NewSession(_Body):
    """A prompt to refine, or an IR lifted from code."""

    prompt: Annotated[Text, Field(min_length=1)] | None = None
    ir: dict[str, Any] | None = None
    source: Literal["prompt", "reverse_mode"] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Resolution(_Body):
    """The answer to a hole."""

    resolution_text: Text
    resolution_type: ResolutionType = "clarify_intent"


class Rollback(_Body):
    """Which draft to go back to."""

    version: int = Field(strict=True)


class Caller:
    """One request's user with their sessions, their manager and their idempotency key."""

    def __init__(self, request: Request) -> None:
        state = request.app.state
        self._read = state.off_loop_reads
        self._waits: bool = state.acknowledger.waits_for_server
        self._method, self._path = request.method, request.url.path
        self._key = _idempotency_key(request)
        self.user_id: str = request.state.user_id
        self.store: BufferedSessionStore = state.sessions_of(self.user_id)
        self.manager = SpecSessionManager(
            self.store,
            state.translator,
            off_loop=state.off_loop_writes,
            tell=state.metrics.session_changed,
        )

    def request_key(self, body: BaseModel | None = None) -> RequestKey | None:
        """Return what identifies this write if its client named a key for it."""
        if self._key is None:
            return None
        content = None if body is None else body.model_dump()
        try:
            asked = orjson.dumps([self._method, self._path, content], option=orjson.OPT_SORT_KEYS)
        except TypeError:
            raise invalid("body", "isn't JSON that can be stored") from None
        return RequestKey.derive(self.user_id, self._key, hashlib.sha256(asked).hexdigest())

    async def read(self, call: Callable[..., T], *args: Any) -> T:
        """Run a blocking read off the event loop."""
        result: T = await self._read(call, *args)
        return result

    async def answer(self, change: Awaitable[PromptSession], status: int = 200) -> Response:
        """Wait for a write and show the session it left, and where it stood at that moment."""
        session = await change
        info = None if self._waits else self.store.last_sync
        if info is None:  # a repeat; or the server's answer was waited for
            info = await self._read(self.store.sync_info, session)
        headers: dict[str, str] = {"X-Durability": info.durability}
        if status == 201:
            headers["Location"] = f"/api/sessions/{session.session_id}"
        return _json(_shown(session, info), status, headers)


class _Parts(Response):
    """JSON in parts that are sent as they are: to copy a long list takes a millisecond."""

    media_type = "application/json"

    def __init__(self, *parts: bytes) -> None:
        super().__init__()
        self._parts = parts
        self.headers["content-length"] = str(sum(map(len, parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


router = APIRouter(
    prefix="/api/sessions",
    route_class=AuthenticatedRoute,
    dependencies=[Depends(HTTPBearer(auto_error=False, description="Supabase access token"))],
)


async def _caller(request: Request) -> Caller:
    return Caller(request)  # a coroutine, so that it costs no thread


Who = Annotated[Caller, Depends(_caller)]


@router.post("", status_code=201, responses=writes(201))
async def create(body: NewSession, who: Who) -> Response:
    """Create a session from a prompt or from a lifted IR."""
    key = who.request_key(body)
    if body.prompt is not None and body.ir is None and body.source in (None, "prompt"):
        return await who.answer(
            who.manager.create_from_prompt(body.prompt, body.metadata, request=key), 201
        )
    if body.ir is not None and body.prompt is None and body.source in (None, "reverse_mode"):
        return await who.answer(
            who.manager.create_from_reverse_mode(body.ir, body.metadata, request=key), 201
        )
    if body.prompt is not None and body.ir is not None:
        raise invalid("ir", "give either a prompt or an ir")
    if body.prompt is None and body.ir is None:
        raise invalid("prompt", "is needed, or an ir")
    raise invalid("source", "doesn't fit: prompt goes with a prompt, reverse_mode with an ir")


@router.get("", responses=reads(PageDocument))
async def list_sessions(
    who: Who,
    status: SessionStatus | None = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE_DEFAULT,
    cursor: str | None = None,
) -> Response:
    """List the caller's sessions, newest first; `complete` says whether Supabase was asked."""

    page = await who.read(who.store.list_documents, status, limit, cursor)
    rest = orjson.dumps({"complete": page.complete, "next": page.next})
    return _Parts(b'{"sessions":', page.sessions, b"," + rest[1:])


@router.get("/{session_id}", responses=reads(SessionDocument, 404))
async def show(session_id: str, who: Who) -> Response:
    """Show one session."""

    document = await who.read(who.store.get_document, session_id)
    if document is None:
        raise SessionNotFound(session_id)
    return Response(document, media_type="application/json")


@router.get("/{session_id}/history", responses=reads(HistoryDocument, 404))
async def history(session_id: str, who: Who) -> Response:
    """Show what was said, drafted and answered, each list from the oldest to the newest."""

    def found() -> dict[str, Any]:
        session = who.store.get(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        whole = _shown(session, who.store.sync_info(session))
        parts = ("session_id", "revisions", "ir_drafts", "pending_resolutions", "sync")
        return {name: whole[name] for name in parts}

    return _json(await who.read(found))


@router.post("/{session_id}/holes/{hole_id}/resolve", responses=writes(200, 404))
async def resolve(session_id: str, hole_id: HoleId, body: Resolution, who: Who) -> Response:
    """Answer a hole; unknown holes are accepted."""
    key = who.request_key(body)
    return await who.answer(
        who.manager.resolve_hole(
            session_id, hole_id, body.resolution_text, body.resolution_type, request=key
        )
    )


@router.post("/{session_id}/finalize", responses=writes(200, 404))
async def finalize(session_id: str, who: Who) -> Response:
    """Declare a session done."""
    return await who.answer(who.manager.finalize(session_id, request=who.request_key()))


@router.post("/{session_id}/abandon", responses=writes(200, 404))
async def abandon(session_id: str, who: Who) -> Response:
    """Declare a session given up."""
    return await who.answer(who.manager.abandon(session_id, request=who.request_key()))


@router.post("/{session_id}/rollback", responses=writes(200, 404))
async def rollback(session_id: str, body: Rollback, who: Who) -> Response:
    """Go back to an older draft, as a new one."""
    key = who.request_key(body)
    return await who.answer(who.manager.rollback(session_id, body.version, request=key))


@router.delete("/{session_id}", status_code=204, responses=writes(204, 404))
async def delete(session_id: str, who: Who) -> Response:
    """Delete a session with its history."""
    await who.manager.delete_session(session_id, request=who.request_key())
    receipt = who.store.last_receipt
    durability: str = "host" if receipt is None else receipt.durability
    return Response(status_code=204, headers={"X-Durability": durability})


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= KEY_CHARS_MAX or not key.isprintable():
        raise invalid("Idempotency-Key", f"must be 1 to {KEY_CHARS_MAX} printable characters")
    return key


def _shown(session: PromptSession, info: SyncInfo) -> dict[str, Any]:
    return {**session.to_dict(), "sync": info.to_dict()}


def _json(
    document: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(orjson.dumps(document), status, headers, media_type="application/json")
