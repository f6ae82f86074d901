"""The threads that calls to Supabase are made in."""

from __future__ import annotations

import sys
import threading
from queue import SimpleQueue

from local_store.clock import SystemClock
from syncer.testkit import wait_until
from syncer.transport import Threads

PATIENCE_S = 5.0


def taken(threads: Threads) -> int:
    """Return the id of the thread that takes an order."""
    took: SimpleQueue[int] = SimpleQueue()
    threads.run(lambda: took.put(threading.get_ident()))
    return took.get(timeout=PATIENCE_S)


def test_an_idle_thread_is_taken_again() -> None:
    threads, clock = Threads(), SystemClock()
    first, end = taken(threads), clock.monotonic() + PATIENCE_S
    while taken(threads) != first:  # it may be on its way to being idle
        assert clock.monotonic() < end, "a thread was started for each call"


def test_a_call_that_hangs_keeps_no_other_waiting() -> None:
    threads, leave = Threads(), threading.Event()

    def hang() -> None:
        leave.wait(PATIENCE_S)

    threads.run(hang)
    assert taken(threads)
    leave.set()


def test_a_thread_that_is_idle_for_long_ends_and_the_next_call_has_one_all_the_same() -> None:
    threads = Threads(idle_s=0.01)
    first = taken(threads)
    wait_until(lambda: first not in sys._current_frames(), PATIENCE_S)
    assert taken(threads)
