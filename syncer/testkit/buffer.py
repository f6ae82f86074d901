"""One container as a test sees it: a buffer, its flusher, its restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from local_store import LocalStore, TableSpec
from local_store.clock import Clock, ManualClock, SystemClock
from syncer.audit import AuditReport, audit
from syncer.flusher import Flusher, FlushReport
from syncer.remote import SupabaseRemote
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Refuse
from syncer.testkit.local_supabase import LocalSupabase

QUIET_PASSES_MAX = 1_000  # far above what any backlog of a test needs; a livelock must end


class BufferedApp:
    """A LocalStore in a folder and a flusher that delivers it, without waiting for real time.

    Waiting between attempts is done on a manual clock, so a test with twenty lost replies takes as
    long as the calls take.
    """

    def __init__(
        self, folder: Path, tables: Sequence[TableSpec], url: str, key: str, **limits: Any
    ) -> None:
        self.folder = folder
        self._tables = tables
        self._limits = limits
        self._pauses = ManualClock()
        self.remote = SupabaseRemote(url, key)
        self.store = LocalStore.open(folder, tables=tables, **limits)

    def flush_once(self) -> FlushReport:
        """Make one pass of the flusher."""
        return Flusher(self.store, self.remote, clock=self._pauses, jitter=lambda: 0.0).flush_once()

    def drain(self) -> FlushReport:
        """Flush until nothing is due; failed passes are repeated. Raises when it never ends."""
        flusher = Flusher(self.store, self.remote, clock=self._pauses, jitter=lambda: 0.0)
        total = FlushReport()
        for _ in range(QUIET_PASSES_MAX):
            report = flusher.flush_once()
            total = total.plus(report)
            if report.stopped == "empty":
                return total
            self._pauses.advance(60.0)
        raise AssertionError(f"not drained after {QUIET_PASSES_MAX} passes: {total}")

    def restart(self) -> None:
        """Close the buffer and open it again, as a new process on the same folder does."""
        self.store.close()
        self.store = LocalStore.open(self.folder, tables=self._tables, **self._limits)

    def audit(self) -> AuditReport:
        """Compare the buffer with the server's ledger and rows."""
        return audit(self.remote, self.store)

    def close(self) -> None:
        """Close the buffer and the connections."""
        self.store.close()
        self.remote.close()


@contextmanager
def outage(of: LocalSupabase | FaultProxy) -> Iterator[None]:
    """Supabase is gone inside the block and back after it, however the block ends.

    Of a LocalSupabase: Postgres and PostgREST are stopped. Of a FaultProxy: its port is closed,
    which takes no time and leaves the stack alone.
    """
    if isinstance(of, LocalSupabase):
        with of.outage():
            yield
        return
    of.set(Refuse())
    try:
        yield
    finally:
        of.clear()


def wait_until(condition: Any, timeout_s: float = 30.0, clock: Clock | None = None) -> None:
    """Poll `condition` until it is true; raises AssertionError after `timeout_s`."""
    clock = clock or SystemClock()
    end = clock.monotonic() + timeout_s
    while not condition():
        if clock.monotonic() > end:
            raise AssertionError(f"did not happen within {timeout_s:g} s")
        clock.sleep(0.02)
