"""Group commit at its edges: a queue longer than a group, odd moments of signals and of callers."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import pytest

from local_store.group_commit import GROUP_MAX, GroupCommit

DEADLINE_S = 30


@dataclass
class Item:
    name: str
    size_bytes: int = 1


class Front:
    """A group commit whose first commit waits for `go`; `groups` tells what was committed."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.group: GroupCommit[Item, str] = GroupCommit(self._commit, lambda: None, lambda: 0.0)
        self.answers: dict[str, str | BaseException] = {}

    def _commit(self, items: Sequence[Item]) -> list[str]:
        self.groups.append([item.name for item in items])
        self.begun.set()
        assert self.go.wait(DEADLINE_S)
        return [f"{item.name} is done" for item in items]

    def thread(self, name: str) -> threading.Thread:
        def submit() -> None:
            try:
                self.answers[name] = self.group.submit(Item(name))
            except BaseException as error:
                self.answers[name] = error

        thread = threading.Thread(target=submit, daemon=True)
        thread.start()
        return thread

    def queued(self, count: int) -> None:
        until(lambda: len(self.group._waiting) >= count)


def until(is_true: Callable[[], bool]) -> None:
    moment = threading.Event()
    for _ in range(DEADLINE_S * 1_000):
        if is_true():
            return
        moment.wait(0.001)
    pytest.fail("it never came")


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.go.set()
    made.group.close()


@contextmanager
def on_signal(act: Callable[[], None]) -> Iterator[None]:
    """Have the main thread do something, and be interrupted, when SIGUSR1 comes."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        act()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_behind_a_full_group_leads_that_one_and_then_its_own(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)

    async def main() -> None:
        names = [str(n) for n in range(GROUP_MAX)]
        tasks = [asyncio.create_task(front.group.submit_async(Item(name))) for name in names]
        await asyncio.sleep(0)
        last = front.thread("last")
        front.queued(GROUP_MAX + 1)
        front.go.set()
        assert await asyncio.gather(*tasks) == [f"{name} is done" for name in names]
        finish(first, last)

    asyncio.run(main())
    assert front.answers == {"first": "first is done", "last": "last is done"}
    assert [len(group) for group in front.groups] == [1, GROUP_MAX, 1]
    assert front.group._committer is None  # it was led by the one who waited


def interrupted(front: Front, name: str) -> None:
    """Submit from the main thread, which a signal interrupts while it waits."""
    main = threading.main_thread().ident
    assert main is not None
    waiting = len(front.group._waiting)

    def strike() -> None:
        front.queued(waiting + 1)
        signal.pthread_kill(main, signal.SIGUSR1)

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()
    with pytest.raises(KeyboardInterrupt):
        front.group.submit(Item(name))
    finish(striker)


def test_a_thread_that_a_signal_took_away_is_committed_for_and_leads_nobody(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)
    with on_signal(lambda: None):
        interrupted(front, "gone")
    second = front.thread("second")
    front.queued(2)
    front.go.set()
    finish(first, second)
    assert front.groups == [["first"], ["gone", "second"]]
    assert front.answers["second"] == "second is done"


def test_a_thread_that_a_signal_takes_away_as_it_is_to_lead_hands_the_lead_on(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)

    def becomes_leader() -> None:  # the signal came in time, and is looked at too late
        [waiter] = front.group._waiting
        front.go.set()
        until(lambda: waiter.leads)  # type: ignore[union-attr]

    with on_signal(becomes_leader):
        interrupted(front, "gone")
    second = front.thread("second")
    finish(first, second)
    assert sorted(name for group in front.groups for name in group) == ["first", "gone", "second"]
    assert front.answers["second"] == "second is done"
    until(lambda: not front.group._leading)

    async def main() -> str:  # by the commit thread, which is well
        return await asyncio.wait_for(front.group.submit_async(Item("third")), DEADLINE_S)

    assert asyncio.run(main()) == "third is done"


def test_a_loop_that_was_closed_meanwhile_is_told_nothing_and_hinders_nobody(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)

    async def leave() -> None:
        asyncio.create_task(front.group.submit_async(Item("left")))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    second = front.thread("second")
    front.queued(2)
    front.go.set()
    finish(first, second)
    assert front.groups == [["first"], ["left", "second"]]
    assert front.answers["second"] == "second is done"


class Struck(BaseException):
    """What a signal's handler raises."""


class StruckLoop(asyncio.SelectorEventLoop):
    """A loop in whose wake-up a signal strikes the thread that commits, once."""

    strikes = 1

    def call_soon_threadsafe(self, *args: object, **more: object) -> asyncio.Handle:
        if self.strikes and threading.current_thread() is not threading.main_thread():
            self.strikes -= 1
            raise Struck
        return super().call_soon_threadsafe(*args, **more)  # type: ignore[arg-type]


def test_a_signal_while_answers_are_told_leaves_the_told_ones_theirs(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)
    leader = front.thread("leader")
    front.queued(1)
    told = front.thread("told")
    front.queued(2)

    async def main() -> None:
        task = asyncio.create_task(front.group.submit_async(Item("late")))
        await asyncio.sleep(0)
        front.queued(3)
        front.go.set()
        with pytest.raises(Struck):
            await asyncio.wait_for(task, DEADLINE_S)

    loop = StruckLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    finish(first, leader, told)
    assert front.groups == [["first"], ["leader", "told", "late"]]
    assert front.answers["told"] == "told is done"
    assert isinstance(front.answers["leader"], Struck)
    assert front.group.submit(Item("next")) == "next is done"


class JustTooLate:
    """The lock on which a leader waits for others; they come just as its patience ends."""

    def __init__(self, lock: threading.Lock, come: Callable[[], None]) -> None:
        self._lock, self._come = lock, come

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking:
            return self._lock.acquire(blocking=False)
        self._come()
        return False

    def release(self) -> None:
        self._lock.release()


def test_who_comes_just_as_the_leaders_patience_ends_is_in_the_group_each_time(front: Front):
    first = front.thread("first")
    assert front.begun.wait(DEADLINE_S)
    pair = front.thread("a"), front.thread("b")
    front.queued(2)
    front.go.set()
    finish(first, *pair)  # from now on a leader looks out for another
    until(lambda: not front.group._leading)
    late: list[threading.Thread] = []

    def come() -> None:
        late.append(front.thread(f"late {len(late)}"))
        front.queued(2)

    front.group._gathered = JustTooLate(front.group._gathered, come)  # type: ignore[assignment]
    for name in ("c", "d"):
        assert front.group.submit(Item(name)) == f"{name} is done"
    finish(*late)
    assert front.groups[2:] == [["c", "late 0"], ["d", "late 1"]]
    assert [front.answers[f"late {n}"] for n in range(2)] == ["late 0 is done", "late 1 is done"]
