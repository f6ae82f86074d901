"""The flusher inside the API process: APScheduler's interval, plus a nudge after each write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC

import structlog
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from local_store import LocalStore
from local_store.clock import Clock, SystemClock
from syncer.flusher import Flusher, FlushReport, drain

JOB_ID = "flush"
JOB_BUDGET_S = 20.0  # a run ends by itself: APScheduler would skip a job that never ends for ever
NUDGE_PAUSE_S = 0.02  # joins a burst of writes into one batch; far below a reader's patience

log = structlog.get_logger("syncer.scheduler")


class FlushScheduler:
    """Runs the flusher while the API runs. `start` and `stop` are called once each.

    A write wakes the flusher at once, so the interval only bounds how late retries and other
    processes' writes are noticed. While the breaker is open, nudges change nothing: a pass then
    returns without a call.
    """

    def __init__(
        self,
        store: LocalStore,
        flusher: Flusher,
        *,
        interval_s: float,
        on_report: Callable[[FlushReport], None] = lambda report: None,
        on_pass: Callable[[FlushReport], None] = lambda report: None,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._flusher = flusher
        self._interval_s = interval_s
        self._on_report = on_report
        self._on_pass = on_pass
        self._clock = clock or SystemClock()
        self._scheduler = BackgroundScheduler(timezone=UTC)
        self._nudged = threading.Event()
        self._stopping = threading.Event()
        self._nudger = threading.Thread(target=self._wake, name="syncer-nudge", daemon=True)

    def start(self) -> None:
        """Start the interval job and the nudge."""
        self._scheduler.add_job(
            self._run,
            "interval",
            seconds=self._interval_s,
            id=JOB_ID,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )
        self._scheduler.start()
        self._store.on_write(self._nudged.set)
        self._nudger.start()

    def stop(self) -> None:
        """Stop after the pass under way; everything acknowledged stays in the buffer."""
        self._store.on_write(None)
        self._stopping.set()
        self._nudged.set()
        self._nudger.join()
        self._scheduler.shutdown(wait=True)

    def _wake(self) -> None:
        while True:
            self._nudged.wait()
            if self._stopping.is_set():
                return
            # Cleared before the run is asked for: a write from here on sets it again, so none is
            # missed; the pause joins a burst into one run.
            self._nudged.clear()
            if self._flusher.breaker == "closed":
                self._run_soon()
            self._stopping.wait(NUDGE_PAUSE_S)

    def _run_soon(self) -> None:
        try:
            self._scheduler.modify_job(JOB_ID, next_run_time=self._clock.now())
        except JobLookupError:
            return  # shutting down

    def _run(self) -> None:
        try:
            report = drain(
                self._flusher,
                self._clock,
                budget_s=JOB_BUDGET_S,
                keep_going=lambda: not self._stopping.is_set(),
                on_pass=self._on_pass,
            )
        except Exception:
            # A loop's edge: the next run must come whatever happened in this one.
            log.exception("flush_failed")
            return
        self._on_report(report)
        if report.sent or report.error:
            log.info(
                "flushed",
                sent=report.sent,
                applied=report.applied,
                duplicate=report.duplicate,
                conflict=report.conflict,
                rejected=report.rejected,
                merged=report.merged,
                held=report.held,
                fenced=report.fenced,
                pending=report.pending,
                breaker=report.breaker,
                stopped=report.stopped,
                took_ms=round(report.took_s * 1_000, 1),
                error=report.error,
            )
