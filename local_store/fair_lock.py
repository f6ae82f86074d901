"""A lock that is handed over in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A mutual exclusion whose holder can't take it again before those who wait.

    A flusher that records a large reply in slices would otherwise win every race for the next
    slice, and a writer would wait for all of them. Not reentrant.
    """

    def __init__(self) -> None:
        self._inner = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; False when it wasn't to be had within `timeout` seconds (-1: for ever)."""
        with self._inner:
            if not self._held:
                self._held = True
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        # Until the holder before us hands over: `held` stays true meanwhile.
        in_time = turn.acquire(timeout=timeout)
        with self._inner:
            if not in_time and turn in self._waiting:  # else it was handed over just now
                self._waiting.remove(turn)
                return False
        return True

    def release(self) -> None:
        """Hand over to who has waited longest."""
        with self._inner:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
