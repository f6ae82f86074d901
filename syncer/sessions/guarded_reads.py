"""When readers ask the server: breakers that all requests of a process share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from local_store import Row
from local_store.clock import Clock, SystemClock
from syncer.core.breaker import Breaker
from syncer.errors import RemoteUnavailable, ReplyTimedOut, SyncError
from syncer.remote import TableRead
from syncer.sessions.server_reads import Reads

PATIENCE_S = 1.0  # who gives up sooner has something to show instead


class GuardedReads:
    """A remote's reads with breakers of their own, shared by all requests of a process.

    An outage must not cost every reader the whole budget, nor a struggling project more than one
    probe per `interval_s`. `watch` hears when the server answers and when reads stop asking it.

    A read whose `timeout_s` is below PATIENCE_S is made by somebody who has a copy. That the server
    was late for it is no outage: reads without a copy go on, while those wait for an interval, so
    that a slow server costs them the budget once in a while and not each time.
    """

    def __init__(
        self,
        remote: Reads | None,
        *,
        allowed: Callable[[], bool] = lambda: True,
        watch: Callable[[bool], None] = lambda answered: None,
        interval_s: float = 5.0,
        clock: Clock | None = None,
    ) -> None:
        self._remote = remote
        self._allowed = allowed
        self._watch = watch
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._away = Breaker(interval_s=interval_s)
        self._late = Breaker(interval_s=interval_s)

    def usable(self) -> bool:
        """Tell whether a read may go out now."""
        return (
            self._remote is not None
            and self._allowed()
            and self._away.allows(self._clock.monotonic())
        )

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Pass the read on, unless the last ones failed and the interval isn't over."""
        in_haste = timeout_s is not None and timeout_s < PATIENCE_S
        if self._remote is None or not self._claim(in_haste):
            raise RemoteUnavailable("Supabase can't be asked now", hint="try again later")
        try:
            answer = self._remote.read(user_id, reads, timeout_s=timeout_s)
        except SyncError as error:
            self._failed(is_late=in_haste and isinstance(error, ReplyTimedOut))
            raise
        with self._lock:
            self._away = self._away.after_success()
            if in_haste:
                self._late = self._late.after_success()
        self._watch(True)
        return answer

    def _claim(self, in_haste: bool) -> bool:
        """Take the one probe of an interval, where it takes one; the others wait for its end."""
        with self._lock:
            now = self._clock.monotonic()
            if not self._away.allows(now) or (in_haste and not self._late.allows(now)):
                return False
            self._away = _probed(self._away, now)
            if in_haste:
                self._late = _probed(self._late, now)
            return True

    def _failed(self, *, is_late: bool) -> None:
        with self._lock:
            now = self._clock.monotonic()
            if is_late:
                self._late = self._late.after_failure(now, 0.0)
            else:
                self._away = self._away.after_failure(now, 0.0)
            is_away = not is_late and _is_open(self._away)
        if is_away:
            self._watch(False)


def _probed(breaker: Breaker, now: float) -> Breaker:
    return breaker.after_failure(now, 0.0) if _is_open(breaker) else breaker


def _is_open(breaker: Breaker) -> bool:
    return breaker.failures >= breaker.failures_max
