"""The API's wiring: routes, errors, limits, the gate for writes. No decisions are made here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_store import LocalStore
from local_store.clock import new_id
from syncer.acknowledger import Acknowledger
from syncer.remote import SupabaseRemote
from syncer.service import health, http_errors, metrics, session_routes, sync_routes
from syncer.service.auth import Authenticator
from syncer.service.health import Health, SyncState, WriteGate
from syncer.service.http_errors import reply_to, request_id_of
from syncer.service.log_setup import where
from syncer.service.metrics import Metrics
from syncer.sessions import BufferedSessionStore, GuardedReads, SketchTranslator, Translator
from syncer.sessions.documents import Documents
from syncer.sessions.server_reads import Reads
from syncer.settings import Settings

T = TypeVar("T")

# Reads may wait for Supabase and writes never do, so they don't share threads: a slow Supabase
# fills the readers' and leaves the writers' alone.
READ_THREADS_MAX = 24
WRITE_THREADS_MAX = 128  # each may wait for a commit of the Volume, which they share
SHUTDOWN_WAIT_S = 4.0  # a write takes milliseconds; what waits for the Volume is in the buffer
OPERATOR_THREADS_MAX = 2  # an audit takes long, and takes no reader's thread
KEY_THREADS_MAX = 2  # who waits for the project's keys waits for one answer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")

log = structlog.get_logger("syncer.api")


def create_app(
    settings: Settings,
    store: LocalStore,
    *,
    remote: Reads | None = None,
    flusher_state: SyncState | None = None,
    translator: Translator | None = None,
    acknowledger: Acknowledger | None = None,
    at_end: Callable[[], None] = lambda: None,
    counted: Metrics | None = None,
) -> FastAPI:
    """Build the API on an open store, which stays the caller's to close.

    `remote` answers reads; without one, what isn't held here is unknown. Whoever runs a flusher
    passes the SyncState and the Metrics it reports to, and the `acknowledger` that takes receipts
    as far as the settings ask; without one they say `host`. `at_end` runs when the server shuts
    down and no write is under way any more. Raises SettingsError when users can't be authenticated.
    """
    counted = counted or Metrics()
    sync = flusher_state or SyncState(enabled=settings.use_supabase)
    reads = GuardedReads(
        remote,
        allowed=sync.reads_allowed,
        watch=sync.heard,
        interval_s=settings.breaker_interval_s,
    )
    gate = WriteGate()
    acknowledger = acknowledger or Acknowledger(store)
    documents = Documents()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        if not await anyio.to_thread.run_sync(gate.close, SHUTDOWN_WAIT_S):
            log.error("writes_left_behind", waited_s=SHUTDOWN_WAIT_S)
        await anyio.to_thread.run_sync(at_end)

    app = FastAPI(title="syncer", summary="Prompt sessions on a durable buffer", lifespan=lifespan)
    app.state.authenticator = Authenticator.from_settings(settings)
    app.state.acknowledger = acknowledger
    app.state.gate = gate
    app.state.sync = sync
    app.state.health = Health(settings, store, gate, sync, acknowledger)
    app.state.metrics = counted
    supabase = remote if isinstance(remote, SupabaseRemote) else None
    pool = None if supabase is None else supabase.pool_use
    counted.watch(settings, store, app.state.health, sync, pool)
    app.state.desk = sync_routes.Desk(store, sync, supabase)
    app.state.off_loop_desk = _threads(OPERATOR_THREADS_MAX)
    app.state.translator = translator or SketchTranslator()
    app.state.off_loop_reads = _threads(READ_THREADS_MAX)
    app.state.off_loop_writes = _threads(WRITE_THREADS_MAX, gate)
    app.state.off_loop_keys = _threads(KEY_THREADS_MAX)
    app.state.sessions_of = lambda user_id: BufferedSessionStore(
        store,
        user_id,
        reads,
        reads.usable,
        settings.read_through_ms / 1_000,
        acknowledge=acknowledger.reach,
        survives=acknowledger.durability,
        on_ack=counted.acknowledged,
        documents=documents,
    )
    app.include_router(session_routes.router)
    app.include_router(sync_routes.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    http_errors.install(app)
    app.add_middleware(_BodyLimit, bytes_max=settings.op_bytes_max)
    app.add_middleware(_RequestEdge)
    return app


def _threads(threads_max: int, gate: WriteGate | None = None) -> Callable[..., Awaitable[Any]]:
    """Return a runner of blocking calls with threads of its own; through the gate if given."""
    limiter: list[anyio.CapacityLimiter] = []  # made on first use: it belongs to an event loop

    async def run(call: Callable[..., T], /, *args: Any) -> T:
        if not limiter:
            limiter.append(anyio.CapacityLimiter(threads_max))

        def inside() -> T:
            if gate is None:
                return call(*args)
            with gate.entered():
                return call(*args)

        return await anyio.to_thread.run_sync(inside, limiter=limiter[0])

    return run


class _RequestEdge:
    """Gives each request its id, and answers what nobody else answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                status = message["status"]
                log.debug("answered", method=scope["method"], route=_route_of(scope), status=status)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                # The service's edge. Where it happened is logged; not the error's own text, which
                # may quote what a user wrote.
                log.error(
                    "request_failed",
                    route=_route_of(scope),
                    error=type(error).__name__,
                    where=where(error.__traceback__),
                )
                if started:
                    raise
                await reply_to(error).response(request_id)(scope, receive, send_with_id)


def _route_of(scope: Scope) -> str | None:
    """Return the route as it is written in the code: a path may hold what a user typed."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path


class _BodyLimit:
    """Refuses a body over `bytes_max` while it arrives, before it is held in memory."""

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = HTTPException(413, f"the body is over {self._bytes_max} bytes")
        told = Headers(scope=scope).get("content-length", "")
        if told.isdigit() and int(told) > self._bytes_max:
            await reply_to(refusal).response(request_id_of(scope))(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._bytes_max:
                raise refusal
            return message

        await self._app(scope, receive_bounded, send)
