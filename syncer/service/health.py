"""How this process is: alive, ready for writes, and how far behind Supabase is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from local_store import LocalStore, StoreClosed
from local_store.clock import Clock, SystemClock
from syncer.acknowledger import Acknowledger
from syncer.core.breaker import BreakerState
from syncer.flusher import FlushReport
from syncer.service.api_schema import ErrorDocument, HealthDocument
from syncer.service.http_errors import ErrorReply, request_id_of
from syncer.settings import Settings

SupabaseState = Literal["up", "down", "off", "unknown"]
Status = Literal["ok", "degraded", "failing"]

FRESH_S = 60.0  # an older answer of Supabase proves nothing about now
BACKLOG_AGE_MAX_S = 60.0  # a healthy drain takes seconds

router = APIRouter()


class SyncState:
    """What is known of Supabase: told by the flusher's reports and by reads. Thread-safe."""

    def __init__(self, *, enabled: bool = True, clock: Clock | None = None) -> None:
        self._enabled = enabled
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._answers: bool | None = None
        self._heard_at = 0.0
        self._breaker: BreakerState = "closed"
        self._refused: str | None = None
        self._error: str | None = None

    def record(self, report: FlushReport) -> None:
        """Take in what a flush found."""
        with self._lock:
            self._breaker = report.breaker
            if report.stopped in ("auth", "schema"):
                self._refused = report.stopped
            elif report.sent:
                self._refused = None
            if report.sent:
                self._error = report.error
                self._hear(report.stopped != "outage")

    def heard(self, answered: bool) -> None:
        """Take in whether Supabase answered a read."""
        with self._lock:
            self._hear(answered)

    def _hear(self, answered: bool) -> None:
        self._answers = answered
        self._heard_at = self._clock.monotonic()

    @property
    def breaker(self) -> BreakerState:
        """Where the flusher's breaker stood in its last report."""
        return self._breaker

    @property
    def refused(self) -> str | None:
        """Why Supabase takes no writes at all: `auth`, `schema`, or None."""
        return self._refused

    @property
    def error(self) -> str | None:
        """The last flush's error, without secrets."""
        return self._error

    @property
    def supabase(self) -> SupabaseState:
        """Tell whether Supabase answers; an answer that is long ago is no knowledge."""
        if not self._enabled:
            return "off"
        with self._lock:
            if self._answers is None or self._clock.monotonic() - self._heard_at > FRESH_S:
                return "unknown" if self._breaker == "closed" else "down"
            return "up" if self._answers else "down"

    def reads_allowed(self) -> bool:
        """Tell whether a read may go to Supabase."""
        return self._enabled and self._breaker != "open"


class WriteGate:
    """Lets writes in while the service runs; once closed, none gets in and none is left inside.

    It counts the blocking part of each write, in its thread: a request whose client has gone is
    over for the event loop while its thread still writes.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._changed = threading.Condition()
        self._is_open = True
        self._inside = 0

    @property
    def is_open(self) -> bool:
        """Tell whether writes are let in."""
        return self._is_open

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for the length of the block; raises StoreClosed when the gate is closed."""
        with self._changed:
            if not self._is_open:
                raise StoreClosed("this server is shutting down")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in any more and wait for those inside; False when some are left."""
        end = self._clock.monotonic() + timeout_s
        with self._changed:
            self._is_open = False
            while self._inside and self._clock.monotonic() < end:
                self._changed.wait(max(0.0, end - self._clock.monotonic()))
            return not self._inside


class Health:
    """The facts behind the health routes."""

    def __init__(
        self,
        settings: Settings,
        store: LocalStore,
        gate: WriteGate,
        sync: SyncState,
        acknowledger: Acknowledger,
    ) -> None:
        self._settings = settings
        self._store = store
        self._gate = gate
        self._sync = sync
        self._acknowledger = acknowledger

    def refusal(self) -> str | None:
        """Say why writes aren't accepted now, None when they are."""
        if not self._gate.is_open:
            return "shutting down"
        try:
            stats = self._store.stats()
        except Exception as error:  # whatever keeps the buffer from answering keeps writes out
            return f"the buffer doesn't answer ({type(error).__name__})"
        return self._limit_reached(stats)

    def _limit_reached(self, stats: dict[str, Any]) -> str | None:
        if stats["pending"] >= self._settings.buffer_transactions_max:
            return "the buffer is full (transactions)"
        if stats["bytes"] >= self._settings.buffer_bytes_max:
            return "the buffer is full (bytes)"
        return None

    def document(self) -> dict[str, Any]:
        """Return what `/health` shows."""
        refusal = self.refusal()
        try:
            stats = self._store.stats()
            at_risk: int | None = self._acknowledger.at_risk()
        except Exception:  # told by the status; health always answers
            stats, at_risk = dict.fromkeys(("pending", "oldest_age_s", "parked")), None
        return {
            "status": self._status(refusal, stats),
            "supabase": self._sync.supabase,
            "breaker": self._sync.breaker,
            "pending": stats["pending"],
            "oldest_age_s": stats["oldest_age_s"],
            "at_risk_transactions": at_risk,
            "parked": stats["parked"],
            "acknowledge": self._settings.ack,
        }

    def _status(self, refusal: str | None, stats: dict[str, Any]) -> Status:
        if refusal is not None or self._sync.refused is not None:
            return "failing"
        is_behind = (stats["oldest_age_s"] or 0.0) > BACKLOG_AGE_MAX_S
        cant_ship = self._acknowledger.error is not None
        if stats["parked"] or is_behind or cant_ship or self._sync.supabase in ("down", "off"):
            return "degraded"
        return "ok"


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Answer while the process runs."""
    return {"status": "alive"}


@router.get(
    "/health/ready",
    responses={503: {"model": ErrorDocument, "description": "Writes aren't accepted now."}},
)
async def ready(request: Request) -> Response:
    """Answer 200 exactly while writes are accepted, in an outage of Supabase too."""
    refusal = await request.app.state.off_loop_reads(request.app.state.health.refusal)
    if refusal is None:
        return Response(orjson.dumps({"status": "ready"}), media_type="application/json")
    code: Literal["buffer_full", "shutting_down", "unavailable"] = "unavailable"
    if refusal == "shutting down":
        code = "shutting_down"
    elif "full" in refusal:
        code = "buffer_full"
    reply = ErrorReply(503, code, refusal, retry_after_s=1.0)
    return reply.response(request_id_of(request.scope))


@router.get("/health", responses={200: {"model": HealthDocument}})
async def health(request: Request) -> Response:
    """Show how far behind Supabase is, and what is wrong."""
    document = await request.app.state.off_loop_reads(request.app.state.health.document)
    return Response(orjson.dumps(document), media_type="application/json")
