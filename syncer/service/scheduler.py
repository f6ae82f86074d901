"""The flusher inside the API process: APScheduler's interval, plus a nudge after each write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC
from typing import Any

import structlog
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from local_store import LocalStore
from local_store.clock import Clock, SystemClock
from syncer.flusher import Flusher, FlushReport, drain

JOB_ID = "flush"
JOB_BUDGET_S = 20.0  # a run ends by itself: APScheduler would skip a job that never ends for ever
# Between two runs that writes asked for: joins a burst into one batch. A run that takes longer is
# followed by a longer rest, so that delivery takes a share of the machine and not all of it; a
# write still reaches the server long before `adaptive_after_s` calls it late.
REST_S_MIN, REST_S_MAX = 0.02, 0.2
REST_PER_RUN = 4.0  # so at most a fifth of the time, while runs are short

log = structlog.get_logger("syncer.scheduler")


def rest_after(took_s: float, *, eager: bool) -> float:
    """Return for how many seconds no run follows one that took `took_s`."""
    return REST_S_MIN if eager else min(max(REST_S_MIN, REST_PER_RUN * took_s), REST_S_MAX)


class SteadyScheduler(BackgroundScheduler):  # type: ignore[misc]  # APScheduler ships no types
    """Runs interval jobs also when the clock was set back; an hour back would be an hour's pause.

    APScheduler keeps the next moment of a job by the wall clock. One that is further off than the
    job's interval is a moment of the clock as it was.
    """

    def _process_jobs(self) -> Any:
        now = SystemClock().now()
        for job in self.get_jobs():
            if job.next_run_time - now > job.trigger.interval:
                job.modify(next_run_time=now)
        return super()._process_jobs()


class FlushScheduler:
    """Runs the flusher while the API runs. `start` and `stop` are called once each.

    A write wakes the flusher at once, so the interval only bounds how late retries and other
    processes' writes are noticed. Under steady writing it rests between two runs, for at most
    0.2 s and, if somebody waits for each write's delivery (`eager`), for 0.02 s. While the breaker
    is open, nudges change nothing: a pass then returns without a call.
    """

    def __init__(
        self,
        store: LocalStore,
        flusher: Flusher,
        *,
        interval_s: float,
        on_report: Callable[[FlushReport], None] = lambda report: None,
        on_pass: Callable[[FlushReport], None] = lambda report: None,
        eager: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self._eager = eager
        self._store = store
        self._flusher = flusher
        self._interval_s = interval_s
        self._on_report = on_report
        self._on_pass = on_pass
        self._clock = clock or SystemClock()
        self._scheduler = SteadyScheduler(timezone=UTC)
        self._nudged = threading.Event()
        self._idle = threading.Event()  # no run is under way or asked for
        self._idle.set()
        self._runs, self._took_s = 0, 0.0
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
            # missed.
            self._nudged.clear()
            if self._flusher.breaker == "closed" and not self._run_now():
                self._nudged.set()
            self._stopping.wait(rest_after(self._took_s, eager=self._eager))

    def _run_now(self) -> bool:
        """Have a run and wait for its end; False when there was none.

        APScheduler leaves out a run that is asked for during another, which may be past its last
        look at the buffer.
        """
        runs = self._runs
        self._run_soon()
        self._idle.wait(JOB_BUDGET_S)
        return self._runs > runs

    def _run_soon(self) -> None:
        self._idle.clear()
        try:
            self._scheduler.modify_job(JOB_ID, next_run_time=self._clock.now())
        except JobLookupError:
            self._idle.set()  # shutting down

    def _run(self) -> None:
        self._idle.clear()
        self._runs += 1
        began = self._clock.monotonic()
        try:
            self._drain()
        finally:
            self._took_s = self._clock.monotonic() - began
            self._idle.set()

    def _drain(self) -> None:
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
