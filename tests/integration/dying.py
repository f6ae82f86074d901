"""A process of its own that ends, stops or goes on at a named moment of its calls."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence

from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.core.wire import Park
from syncer.remote import SupabaseRemote


def die() -> None:
    """End as a lost machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stand still until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


class Dying(SupabaseRemote):
    """The real remote; `event` happens at one moment before or after its calls."""

    def __init__(self, url: str, key: str, when: str, event: Callable[[], None]) -> None:
        super().__init__(url, key)
        self._when = when
        self._event = event

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        self._happen("before send")
        reply = super().apply_batch(batch)
        self._happen("after commit")
        return reply

    def park(
        self, log_id: str, acknowledged_seq: int, parks: Sequence[Park]
    ) -> tuple[Verdict, ...]:
        self._happen("before parking")
        reply = super().park(log_id, acknowledged_seq, parks)
        self._happen("after parking")
        return reply

    def _happen(self, moment: str) -> None:
        if moment == self._when:
            self._event()


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return pid


def ended(pid: int, within_s: float = 60.0) -> int:
    """Wait for it, at most so long: its exit code, negative for a signal."""
    deadline = threading.Timer(within_s, os.kill, (pid, signal.SIGKILL))
    deadline.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        deadline.cancel()


def is_stopped(pid: int) -> bool:
    """Wait until it stands still; False when it ended instead."""
    return os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
