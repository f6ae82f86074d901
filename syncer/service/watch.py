"""What a process asks itself now and then: does row-level security hold, does the account balance?

Both need Supabase. While it can't be asked nothing is found out, and the last finding stays.
"""

from __future__ import annotations

import threading
from dataclasses import asdict

import structlog

from local_store import LocalStore, LocalStoreError
from local_store.clock import Clock, SystemClock
from local_store.ops import user_uuid
from syncer.audit import audit
from syncer.errors import SyncError
from syncer.remote import Remote, TableRead
from syncer.service.health import SyncState
from syncer.service.metrics import MISMATCHES, Metrics
from syncer.settings import Settings

STRANGER = user_uuid("syncer:stranger")
"""A user whom nobody is: whatever it sees, it must not."""

COMPARED_MAX = 1_000  # rows per audit: one or two seconds of small reads
END_WAIT_S = 1.0  # a look under way at the shutdown is left to itself

log = structlog.get_logger("syncer.watch")


class Watch:
    """Looks at what no other part would notice. One thread; `look` does what is due."""

    def __init__(
        self,
        settings: Settings,
        store: LocalStore,
        remote: Remote,
        sync: SyncState,
        counted: Metrics,
        clock: Clock | None = None,
        *,
        compared_max: int = COMPARED_MAX,
    ) -> None:
        self._store = store
        self._remote = remote
        self._sync = sync
        self._counted = counted
        self._clock = clock or SystemClock()
        self._look_s, self._audit_s = settings.watch_interval_s, settings.audit_interval_s
        self._compared_max = compared_max
        self._compared, self._wrong, self._wrong_before = 0, 0, 0
        # A first audit at the start would be one per restart, on the largest backlog there is.
        self._audit_at = self._clock.monotonic() + self._audit_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="syncer-watch", daemon=True)

    def start(self) -> None:
        """Look every `watch_interval_s` from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; waits END_WAIT_S for a look under way."""
        self._stopping.set()
        self._thread.join(END_WAIT_S)

    def look(self) -> None:
        """Do what is due, unless Supabase is known to be down; never raises for what it finds."""
        if not self._sync.reads_allowed():
            return
        try:
            self._look_as_stranger()
            if self._audit_s and self._clock.monotonic() >= self._audit_at:
                self._audit_at = self._clock.monotonic() + self._audit_s
                self._audit()
        except (SyncError, LocalStoreError) as error:
            log.info("not_looked", error=type(error).__name__)

    def _look_as_stranger(self) -> None:
        """Read every table as a user who owns nothing: any row at all means that all are open."""
        tables = sorted(self._store.tables)
        found = self._remote.read(STRANGER, [TableRead(name, {}, limit=1) for name in tables])
        seen = [name for name, rows in zip(tables, found, strict=True) if rows]
        self._counted.stranger_saw(len(seen))
        if seen:
            log.critical("row_level_security_bypassed", tables=seen)

    def _audit(self) -> None:
        """Audit this buffer's own logs; other buffers' backlogs would look like losses here.

        The account is whole each time. Rows are compared some at a time, in rounds; the most that
        one look of a round finds is shown until the next round has found less.
        """
        mine = {log["log_id"] for log in self._store.logs()}
        began = self._clock.monotonic()
        page = self._store.clean_rows(after=self._compared, limit=self._compared_max)
        report = audit(self._remote, self._store, rows=[row for _, row in page])
        found = [asdict(item) for item in report.logs if item.log_id in mine]
        sums = {kind: sum(item[kind] for item in found) for kind in MISMATCHES}
        self._wrong = max(self._wrong, sums["content_mismatch"])
        sums["content_mismatch"] = max(self._wrong, self._wrong_before)
        self._compared = page[-1][0] if page else 0
        if len(page) < self._compared_max:  # a round is over
            self._compared, self._wrong_before, self._wrong = 0, self._wrong, 0
        self._counted.audited(**sums)
        took_s = round(self._clock.monotonic() - began, 3)
        tell = log.critical if any(sums.values()) else log.info
        tell("audited", took_s=took_s, **sums)

    def _run(self) -> None:
        while not self._stopping.wait(self._look_s):
            try:
                self.look()
            except Exception:
                # A loop's edge: the next look must come whatever happened in this one.
                log.exception("look_failed")
