"""One bounded pass: breaker → next batch → one RPC → record.

Delivery is at least once and the server's ledger makes it exactly once in effect, so this module
needs no memory of what is under way: a transaction is pending until the server's verdict on it is
written down, and sending it again is harmless. Whatever interrupts a pass, the next one continues.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from local_store import LocalStore
from local_store.clock import Clock, SystemClock
from local_store.ops import Outcome
from syncer.core.backoff import RetryLimits, honoured_retry_after_s, retry_delay_s
from syncer.core.batch import Batch, choose
from syncer.core.breaker import Breaker, BreakerState
from syncer.core.verdict import Verdict, outcome_of
from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    SyncError,
    Throttled,
)
from syncer.remote import Remote, SupabaseRemote
from syncer.settings import Settings

Stopped = Literal["empty", "budget", "outage", "auth", "schema"]


@dataclass(frozen=True, slots=True)
class FlushLimits:
    """Bounds of one pass."""

    batch_ops_max: int = 500
    batch_bytes_max: int = 4 * 1024 * 1024
    breaker_interval_s: float = 5.0
    held_retry_max_s: float = 30.0  # a missing parent arrives with another container's next flush
    retry: RetryLimits = field(default_factory=RetryLimits)

    @classmethod
    def from_settings(cls, settings: Settings) -> FlushLimits:
        """Take the bounds from the environment's settings."""
        return cls(
            batch_ops_max=settings.batch_ops_max,
            batch_bytes_max=settings.batch_bytes_max,
            breaker_interval_s=settings.breaker_interval_s,
        )


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What one pass did. An outage is a report, not an exception.

    `stopped` says why it ended: nothing left that is due (`empty`), one batch done and more may be
    left (`budget`), Supabase is unavailable (`outage`), it refuses the key (`auth`) or lacks the
    schema (`schema`). `pending` counts what is still undelivered.
    """

    sent: int = 0
    applied: int = 0
    duplicate: int = 0
    conflict: int = 0
    rejected: int = 0
    held: int = 0
    fenced: int = 0
    pending: int = 0
    breaker: BreakerState = "closed"
    stopped: Stopped = "empty"
    error: str | None = None

    def plus(self, later: FlushReport) -> FlushReport:
        """Add up the counts of two passes; the rest is the later one's."""
        return replace(
            later,
            sent=self.sent + later.sent,
            applied=self.applied + later.applied,
            duplicate=self.duplicate + later.duplicate,
            conflict=self.conflict + later.conflict,
            rejected=self.rejected + later.rejected,
            held=self.held + later.held,
            fenced=self.fenced + later.fenced,
        )


class Flusher:
    """Delivers one store's op log to one remote. Thread-safe; passes never overlap in a process."""

    def __init__(
        self,
        store: LocalStore,
        remote: Remote,
        *,
        limits: FlushLimits | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._remote = remote
        self._limits = limits or FlushLimits()
        self._clock = clock or SystemClock()
        self._jitter = jitter or random.SystemRandom().random
        self._lock = threading.Lock()
        self._breaker = Breaker(interval_s=self._limits.breaker_interval_s)
        self._transactions_max = self._limits.batch_ops_max

    @classmethod
    def from_settings(cls, store: LocalStore, settings: Settings | None = None) -> Flusher:
        """Build the flusher of `store`; raises SettingsError naming what is missing."""
        settings = settings or Settings.load()
        remote = SupabaseRemote.from_settings(settings)
        return cls(store, remote, limits=FlushLimits.from_settings(settings))

    @property
    def breaker(self) -> BreakerState:
        """Where the breaker stands now."""
        return self._breaker.state(self._clock.monotonic())

    def wait_s(self) -> float:
        """Seconds until the breaker lets the next attempt through."""
        return self._breaker.wait_s(self._clock.monotonic())

    def flush_once(self) -> FlushReport:
        """Send at most one batch and record what became of each transaction.

        Bounded by `batch_ops_max`, `batch_bytes_max` and the remote's call deadline; one RPC.
        """
        with self._lock:
            return self._flush_once()

    def _flush_once(self) -> FlushReport:
        if not self._breaker.allows(self._clock.monotonic()):
            return self._report(FlushReport(stopped="outage"))
        batch = self._next_batch()
        if not batch.transactions:
            return self._report(FlushReport(stopped="empty"))
        try:
            verdicts = self._remote.apply_batch(batch)
        except SyncError as error:
            return self._report(self._after_failure(batch, error))
        self._breaker = self._breaker.after_success()
        self._transactions_max = min(self._limits.batch_ops_max, 2 * self._transactions_max)
        self._store.record([self._outcome(batch, index, v) for index, v in enumerate(verdicts)])
        return self._report(_tally(verdicts))

    def _next_batch(self) -> Batch:
        # The log's end is read before its pending part: a smaller acknowledged_seq is only stale,
        # one beyond what was acknowledged would look like a loss.
        stats = self._store.stats()
        due = self._store.pending(
            transactions_max=self._transactions_max, bytes_max=self._limits.batch_bytes_max
        )
        return choose(stats["log_id"], stats["last_seq"], due, self._limits.batch_ops_max)

    def _outcome(self, batch: Batch, index: int, verdict: Verdict) -> Outcome:
        attempts = batch.transactions[index].attempts
        limits = replace(self._limits.retry, max_s=self._limits.held_retry_max_s)
        return outcome_of(verdict, retry_delay_s(attempts, self._jitter(), limits))

    def _after_failure(self, batch: Batch, error: SyncError) -> FlushReport:
        now, told = self._clock.monotonic(), str(error)
        if isinstance(error, NotAuthorized | ProtocolMismatch):
            self._breaker = self._breaker.after_refusal(now)
            stopped: Stopped = "auth" if isinstance(error, NotAuthorized) else "schema"
            return FlushReport(sent=len(batch.transactions), stopped=stopped, error=told)
        if isinstance(error, BatchTooLarge):
            return self._split(batch, error)
        delay_s = retry_delay_s(self._breaker.failures, self._jitter(), self._limits.retry)
        if isinstance(error, Throttled):
            asked_s = honoured_retry_after_s(error.retry_after_s, self._limits.retry)
            delay_s = max(delay_s, asked_s)
            self._transactions_max = max(1, len(batch.transactions) // 2)
        self._breaker = self._breaker.after_failure(now, delay_s)
        return FlushReport(sent=len(batch.transactions), stopped="outage", error=told)

    def _split(self, batch: Batch, error: BatchTooLarge) -> FlushReport:
        """Halve the next batch until the one transaction that spoils the call stands alone."""
        if len(batch.transactions) > 1:
            self._transactions_max = len(batch.transactions) // 2
            return FlushReport(sent=len(batch.transactions), stopped="budget", error=str(error))
        [only] = batch.transactions
        evidence = {"verdict": "rejected", "message": str(error), "rows": {}}
        self._store.record([Outcome(only.txn_id, "dead", reply=evidence)])
        self._transactions_max = self._limits.batch_ops_max
        return FlushReport(sent=1, rejected=1, stopped="budget", error=str(error))

    def _report(self, report: FlushReport) -> FlushReport:
        return replace(report, pending=self._store.stats()["pending"], breaker=self.breaker)


def _tally(verdicts: tuple[Verdict, ...]) -> FlushReport:
    kinds = [verdict.kind for verdict in verdicts]
    return FlushReport(
        sent=len(kinds),
        applied=kinds.count("applied"),
        duplicate=kinds.count("duplicate"),
        conflict=kinds.count("conflict"),
        rejected=kinds.count("rejected") + kinds.count("parked"),
        held=kinds.count("held"),
        fenced=kinds.count("fenced"),
        stopped="budget",
    )


def drain(
    flusher: Flusher,
    clock: Clock,
    *,
    budget_s: float,
    keep_going: Callable[[], bool] = lambda: True,
) -> FlushReport:
    """Repeat passes until nothing is due, Supabase fails, or `budget_s` has passed.

    The budget is checked between passes: one call may overrun it by its own deadline.
    """
    end = clock.monotonic() + budget_s
    total = FlushReport()
    while True:
        report = flusher.flush_once()
        total = total.plus(report)
        if report.stopped != "budget" or clock.monotonic() >= end or not keep_going():
            return total
