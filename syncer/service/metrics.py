"""What `/metrics` shows: counted here as it happens, or asked for when somebody looks.

One Metrics per process, with a registry of its own. Labels come from closed lists: no user's text,
no id and no path is ever one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, get_args

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from local_store import LocalStore
from syncer.core.breaker import BreakerState
from syncer.errors import (
    BatchTooLarge,
    Declined,
    NotAuthorized,
    NotSent,
    OutcomeUnknown,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SyncError,
    Throttled,
    TookTooLong,
)
from syncer.flusher import FlushReport
from syncer.service.health import Health, SyncState
from syncer.sessions import PromptSession
from syncer.sessions.manager import SessionEvent
from syncer.sessions.models import moment_of
from syncer.settings import Settings
from syncer.transport import PoolUse

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
VERDICTS = ("applied", "duplicate", "merged", "conflict", "rejected", "held", "fenced")
PARKED_STATES = ("dead", "conflict", "held")
MISMATCHES = ("lost", "duplicated", "content_mismatch")
_ERRORS = (
    RemoteUnavailable,
    Throttled,
    TookTooLong,
    ReplyTimedOut,
    ReplyUnreadable,
    NotAuthorized,
    ProtocolMismatch,
    BatchTooLarge,
)
_QUERY_MS = (5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 45_000)
_ACK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_FLUSH_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 45)
_SESSION_MINUTES = (1, 2, 5, 15, 30, 60, 240, 1_440, 10_080)

router = APIRouter()


class Metrics:
    """The counters of one process; every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._failures = 0
        self._visible: int | None = None
        self._mismatches: dict[str, int] = {}
        self._count_calls()
        self._count_deliveries()
        self._count_sessions()
        self.registry.register(_Asked(self._told))

    def _count_calls(self) -> None:
        self._queries = self._histogram(
            "supabase_query_duration_ms", "One call to Supabase, in ms", _QUERY_MS, ["call"]
        )
        self._errors = self._counter(
            "supabase_query_errors_total", "Calls that failed, by what that means", ["type"]
        )
        for kind in _ERRORS:  # there from the start: a first error shows as an increase
            self._errors.labels(kind.__name__)

    def _count_deliveries(self) -> None:
        self._acks = self._histogram(
            "syncer_ack_duration_seconds", "From a write to its acknowledgement", _ACK_S
        )
        self._flushes = self._histogram(
            "syncer_flush_duration_seconds", "One run of the flusher that sent something", _FLUSH_S
        )
        self._verdicts = self._counter(
            "syncer_verdicts_total", "What became of transactions that were sent", ["verdict"]
        )
        for verdict in VERDICTS:
            self._verdicts.labels(verdict)

    def _count_sessions(self) -> None:
        self._sessions = {
            "created": self._counter("sessions_created_total", "Sessions created here"),
            "finalized": self._counter("sessions_finalized_total", "Sessions finalized here"),
            "abandoned": self._counter("sessions_abandoned_total", "Sessions abandoned here"),
            "hole_resolved": self._counter("holes_resolved_total", "Answers to holes given here"),
        }
        self._lengths = self._histogram(
            "session_duration_minutes",
            "From a session's creation to its end, in minutes",
            _SESSION_MINUTES,
        )

    def _counter(self, name: str, told: str, labels: tuple[str, ...] | list[str] = ()) -> Counter:
        return Counter(name, told, labels, registry=self.registry)

    def _histogram(
        self, name: str, told: str, buckets: tuple[float, ...], labels: list[str] | None = None
    ) -> Histogram:
        return Histogram(name, told, labels or (), buckets=buckets, registry=self.registry)

    # -- told as it happens --

    def called(self, call: str, took_s: float, error: SyncError | None) -> None:
        """Count a call to Supabase. Declined is an answer to an operator, not an error."""
        self._queries.labels(call).observe(took_s * 1_000)
        if error is not None and not isinstance(error, Declined):
            self._errors.labels(type(error).__name__).inc()
        # A refusal came over a connection that works.
        is_failure = isinstance(error, NotSent | OutcomeUnknown)
        with self._lock:
            self._failures = self._failures + 1 if is_failure else 0

    def flushed(self, report: FlushReport) -> None:
        """Count a run of the flusher."""
        if not report.sent:
            return
        self._flushes.observe(report.took_s)
        for verdict in VERDICTS:
            self._verdicts.labels(verdict).inc(getattr(report, verdict))

    def acknowledged(self, took_s: float) -> None:
        """Count an acknowledged write."""
        self._acks.observe(took_s)

    def session_changed(self, event: SessionEvent, session: PromptSession) -> None:
        """Count what a user did."""
        self._sessions[event].inc()
        began, ended = moment_of(session.created_at), moment_of(session.updated_at)
        if event in ("finalized", "abandoned") and began and ended:
            self._lengths.observe(max(0.0, (ended - began).total_seconds() / 60))

    def stranger_saw(self, tables: int) -> None:
        """Note in how many tables a user who owns nothing saw a row; more than none is a breach."""
        self._visible = tables

    def audited(self, **mismatches: int) -> None:
        """Note what the latest audit of this buffer found: lost, duplicated, content_mismatch."""
        self._mismatches = mismatches

    # -- asked for when somebody looks --

    def watch(
        self,
        settings: Settings,
        store: LocalStore,
        health: Health,
        sync: SyncState,
        pool: Callable[[], PoolUse] | None,
    ) -> None:
        """Show these as they are at each look; `pool` tells of the connections to Supabase."""
        self.registry.register(_Asked(lambda: _of_buffer(settings, store, health)))
        self.registry.register(_Asked(lambda: _of_supabase(sync)))
        if pool is not None:
            self.registry.register(_Asked(lambda: _of_pool(pool())))

    def exposition(self) -> bytes:
        """Return the document; reads the buffer, so it blocks for a moment."""
        return generate_latest(self.registry)

    def _told(self) -> Iterator[Metric]:
        name = "supabase_consecutive_failures"
        yield _gauge(name, "Calls that failed since the last answer", self._failures)
        if self._visible is not None:
            told = "Tables in which a user who owns nothing sees a row"
            yield _gauge("syncer_rls_canary_visible", told, self._visible)
        if self._mismatches:
            told = "What the latest audit of this buffer found wrong"
            yield _by("syncer_audit_mismatch", told, "kind", self._mismatches)


class _Asked(Collector):
    """Asks when somebody looks, and not before."""

    def __init__(self, ask: Callable[[], Iterator[Metric]]) -> None:
        self._ask = ask

    def collect(self) -> Iterator[Metric]:
        return self._ask()


def _of_buffer(settings: Settings, store: LocalStore, health: Health) -> Iterator[Metric]:
    takes_writes = health.refusal() is None
    yield _gauge("syncer_accepting_writes", "1 while writes are accepted", takes_writes)
    yield _gauge("syncer_buffer_limit_bytes", "Where writes are refused", settings.buffer_bytes_max)
    yield _gauge(
        "syncer_buffer_limit_transactions",
        "Where writes are refused",
        settings.buffer_transactions_max,
    )
    try:
        stats, parked, damage = store.stats(), store.parked_states(), store.damage()
    except Exception:  # said by syncer_accepting_writes; what isn't known isn't shown
        return
    yield _gauge("syncer_pending_transactions", "Waiting to be delivered", stats["pending"])
    age_s = stats["oldest_age_s"] or 0.0
    yield _gauge("syncer_oldest_pending_age_seconds", "Age of the oldest that waits", age_s)
    yield _gauge("syncer_buffer_bytes", "Size of what waits", stats["bytes"])
    at_risk = health.document()["at_risk_transactions"] or 0
    yield _gauge("syncer_at_risk_transactions", "Lost if this machine's disk is lost now", at_risk)
    states = {state: parked.get(state, 0) for state in PARKED_STATES}
    yield _by("syncer_parked_transactions", "Parked on the server", "state", states)
    corrupt = {"quarantined": damage["quarantined"], "lost": damage["lost"]}
    corrupt["files"] = len(damage["files"])
    yield _by("syncer_corrupt_records", "Damage that the buffer knows of", "kind", corrupt)


def _of_supabase(sync: SyncState) -> Iterator[Metric]:
    breaker = {state: sync.breaker == state for state in get_args(BreakerState)}
    yield _by("syncer_breaker_state", "1 for the state the breaker is in", "state", breaker)
    refused = {reason: sync.refused == reason for reason in ("auth", "schema")}
    yield _by("syncer_delivery_refused", "1 while Supabase takes no writes", "reason", refused)


def _of_pool(use: PoolUse) -> Iterator[Metric]:
    yield _gauge("supabase_connection_pool_size", "Connections that are open", use.open)
    free = use.limit - use.busy
    yield _gauge(
        "supabase_connection_pool_available", "Calls that could start without waiting", free
    )
    yield _gauge("supabase_connection_pool_limit", "Connections there may be", use.limit)


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(name, told, value=float(value))


def _by(name: str, told: str, label: str, values: dict[str, Any]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=[label])
    for key, value in values.items():
        family.add_metric([key], float(value))
    return family


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Show every metric in Prometheus' text format."""
    state = request.app.state
    return Response(await state.off_loop_reads(state.metrics.exposition), media_type=CONTENT_TYPE)
