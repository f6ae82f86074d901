"""Group commit: callers who wait at the same time share one sync of the disk.

A thread that finds nobody committing commits at once, its own and whatever else waits, and hands
over to one of those that came meanwhile. Coroutines wake a commit thread, started for the first of
them, so that the event loop never waits for a disk.

The front knows nothing of what is committed: it is given a function that takes a group and returns
one result or one error for each item.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from local_store import forks
from local_store.errors import StoreClosed

_log = logging.getLogger(__name__)

Item = TypeVar("Item", bound="Sized")
Result = TypeVar("Result")

GROUP_MAX = 256  # transactions under one sync: above it the copying costs more than the sync saves
PATIENCE = 0.25  # of a commit: what a second, smaller one would cost several times over
PATIENCE_MAX_S = 0.002  # a slow disk is no reason to dawdle
GROUP_BYTES_MAX = 4 * 1024 * 1024  # of ops: a group of large ones doesn't delay the next for long


class Sized(Protocol):
    """What waits to be committed."""

    @property
    def size_bytes(self) -> int:
        """Its weight in a group."""


class _Thread(Generic[Item, Result]):
    """A thread that waits for its result, or for its turn to lead."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.outcome: Result | BaseException | None = None
        self.leads = False
        self.gone = False
        self._woken = threading.Lock()
        self._woken.acquire()

    def wait(self) -> None:
        self._woken.acquire()

    def wake(self) -> None:
        self._woken.release()


@dataclass(slots=True)
class _Coroutine(Generic[Item, Result]):
    """A coroutine that waits for its result."""

    item: Item
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Result]


class GroupCommit(forks.Forkable, Generic[Item, Result]):
    """Collects items and commits them in groups of at most 256, by one thread at a time.

    `after` runs behind each group, when its callers are on their way and the next may be led.
    Callers who were in the last group tend to come again at once: the next leader waits for as
    many, for a part of the time that the last commit took (by `monotonic`, in seconds).
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Sequence[Result | BaseException]],
        after: Callable[[], None],
        monotonic: Callable[[], float],
        *,
        patience_max_s: float = PATIENCE_MAX_S,
    ) -> None:
        self._commit = commit
        self._after = after
        self._monotonic = monotonic
        self._patience_max_s = patience_max_s
        self._closed = False
        self._begin_process()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Start with nobody waiting: who waits, and who leads, is a thread of the parent."""
        self._begin_process()

    def _begin_process(self) -> None:
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._waiting: deque[_Thread[Item, Result] | _Coroutine[Item, Result]] = deque()
        self._leading = False
        self._idle = threading.Condition(self._mutex)
        self._expected, self._patience_s = 1, 0.0
        self._gathering = False
        self._gathered = threading.Lock()
        self._gathered.acquire()
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._committer: threading.Thread | None = None

    def submit(self, item: Item) -> Result:
        """Commit `item` and return its result; blocks the thread. Raises what the commit says."""
        if self._pid != os.getpid():
            raise StoreClosed("this store was opened before a fork; start a fresh process")
        waiter: _Thread[Item, Result] = _Thread(item)
        with self._mutex:
            self._admit(waiter)
            leads, self._leading = not self._leading, True
        if not leads:
            self._wait(waiter)
        while waiter.outcome is None:  # so it leads; behind a long queue its turn may come later
            self._lead(waiter)
            if waiter.outcome is None:
                self._wait(waiter)
        if isinstance(waiter.outcome, BaseException):
            raise waiter.outcome
        return waiter.outcome

    def _wait(self, waiter: _Thread[Item, Result]) -> None:
        try:
            waiter.wait()
        except BaseException:  # a signal: nobody may count on this thread to lead
            with self._mutex:
                waiter.gone = True
            if waiter.leads and waiter.outcome is None:
                self._hand_over()
            raise

    async def submit_async(self, item: Item) -> Result:
        """Commit `item` and return its result without blocking the event loop.

        Cancelling stops the waiting, not the commit.
        """
        if self._pid != os.getpid():
            raise StoreClosed("this store was opened before a fork; start a fresh process")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._mutex:
            self._admit(_Coroutine(item, loop, future))
            leads, self._leading = not self._leading, True
            if leads:
                self._call_committer()
        return await future

    def close(self) -> None:
        """Admit nobody any more, and wait until those who were admitted have their answer."""
        if self._pid != os.getpid():
            return
        with self._mutex:
            self._closed = True
            while self._leading:
                self._idle.wait()
            committer, self._committer = self._committer, None
        if committer is not None:
            self._wanted.put(False)
            committer.join()

    def _admit(self, waiter: _Thread[Item, Result] | _Coroutine[Item, Result]) -> None:
        if self._closed:
            raise StoreClosed("this store is closed")
        self._waiting.append(waiter)
        if self._gathering and len(self._waiting) >= self._expected:
            self._gathering = False
            self._gathered.release()

    def _call_committer(self) -> None:
        if self._committer is None:
            self._committer = threading.Thread(
                target=self._run, name="local_store commit", daemon=True
            )
            self._committer.start()
        self._wanted.put(True)

    def _run(self) -> None:
        while self._wanted.get():
            self._lead()

    def _lead(self, own: _Thread[Item, Result] | None = None) -> None:
        """Commit one group, then pass the lead on: a caller isn't kept for others' work."""
        group: list[_Thread[Item, Result] | _Coroutine[Item, Result]] = []
        try:
            self._gather()
            self._take(group)
            began = self._monotonic()
            outcomes = self._outcomes([waiter.item for waiter in group])
            self._expected = len(group)
            self._patience_s = min(self._patience_max_s, PATIENCE * (self._monotonic() - began))
            _answer(group, outcomes, own)
        except BaseException as error:  # a signal between two lines: nobody may wait for ever
            _answer(group, [error] * len(group), own)
            self._hand_over()
            raise
        # Before anything that gives up the interpreter: those just woken would all go first.
        self._hand_over()
        try:
            self._after()
        except Exception:  # its callers have their answers
            _log.exception("what follows a group of commits failed")

    def _gather(self) -> None:
        """Wait a little for those who were in the last group; for nobody after a group of one."""
        with self._mutex:
            self._gathering = len(self._waiting) < self._expected
            if not self._gathering:
                return
            self._gathered.acquire(blocking=False)  # of those who came just too late last time
        self._gathered.acquire(timeout=self._patience_s)
        with self._mutex:
            self._gathering = False

    def _take(self, group: list[_Thread[Item, Result] | _Coroutine[Item, Result]]) -> None:
        size_bytes = 0
        with self._mutex:
            while self._waiting and len(group) < GROUP_MAX:
                size_bytes += self._waiting[0].item.size_bytes
                if group and size_bytes > GROUP_BYTES_MAX:
                    break
                group.append(self._waiting.popleft())

    def _outcomes(self, items: Sequence[Item]) -> Sequence[Result | BaseException]:
        try:
            return self._commit(items)
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            return [error] * len(items)

    def _hand_over(self) -> None:
        with self._mutex:
            if not self._waiting:
                self._leading = False
                if self._closed:
                    self._idle.notify_all()
                return
            following = next(
                (item for item in self._waiting if isinstance(item, _Thread) and not item.gone),
                None,
            )
            if following is None:
                self._call_committer()
                return
            following.leads = True
        following.wake()


def _answer(
    group: Sequence[_Thread[Item, Result] | _Coroutine[Item, Result]],
    outcomes: Sequence[Result | BaseException],
    own: _Thread[Item, Result] | None,
) -> None:
    """Tell each of a group how it went; who was told already keeps that answer."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Result], object]]] = {}
    for waiter, outcome in zip(group, outcomes, strict=True):
        if isinstance(waiter, _Coroutine):
            by_loop.setdefault(waiter.loop, []).append((waiter.future, outcome))
        elif waiter.outcome is None:
            waiter.outcome = outcome
            if waiter is not own and not waiter.gone:  # perhaps woken already, to lead
                waiter.wake()
    for loop, answers in by_loop.items():
        _tell(loop, answers)


def _tell(
    loop: asyncio.AbstractEventLoop, answers: Sequence[tuple[asyncio.Future[Result], object]]
) -> None:
    """Give a loop its answers with one wake-up; one that was closed meanwhile has no listeners."""

    def answer() -> None:
        for future, outcome in answers:
            if future.done():  # cancelled: setting it would fail, and take the rest along
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)  # type: ignore[arg-type]

    try:
        loop.call_soon_threadsafe(answer)
    except RuntimeError:
        return
