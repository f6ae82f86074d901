"""A coroutine that runs in a thread, but for what it hands back to the event loop.

What blocks mustn't run on the loop, and each way to a thread and back costs as much as reading a
session: so all of a change goes there once, and comes back for what only the loop can wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")


class OffLoop(Protocol):
    """Runs a blocking call in a thread and waits for it without blocking the event loop."""

    def __call__(self, call: Callable[..., T], /, *args: Any) -> Awaitable[T]:
        """Return what `call(*args)` returns."""


async def to_thread(call: Callable[..., T], /, *args: Any) -> T:
    """Run a blocking call in one of asyncio's own threads."""
    return await asyncio.to_thread(call, *args)


class OnLoop:
    """What a coroutine of `in_thread` awaits, to be awaited on the event loop."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._work = work

    def __await__(self) -> Generator[Awaitable[Any], Any, Any]:
        return (yield self._work)


async def in_thread(work: Coroutine[Awaitable[Any], Any, T], off_loop: OffLoop) -> T:
    """Run `work`, which awaits nothing but OnLoop, in a thread; while it awaits, it holds none."""
    given = None
    try:
        while True:
            awaited, result = await off_loop(_advance, work, given)
            if awaited is None:
                return cast("T", result)
            given = await awaited
    finally:
        with suppress(ValueError):  # cancelled: its thread is still in it, and ends it
            work.close()


def _advance(
    work: Coroutine[Awaitable[Any], Any, T], given: Any
) -> tuple[Awaitable[Any] | None, T | None]:
    """Run it as far as it goes; returns what it awaits, or what it came to."""
    try:
        return work.send(given), None
    except StopIteration as end:
        return None, end.value
