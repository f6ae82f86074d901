"""In which thread a change of a session is made, and what a translator may do there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from local_store import LocalStore
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    SpecSessionManager,
)

T = TypeVar("T")

USER = "github:42"
PROMPT = "Create a function that adds two numbers"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        yield store


@pytest.fixture
def store(local: LocalStore) -> BufferedSessionStore:
    return BufferedSessionStore(local, USER)


class Threads:
    """Runs blocking calls, counts them, and knows whether one is under way."""

    def __init__(self) -> None:
        self.calls = self.inside = 0

    async def __call__(self, call: Callable[..., T], /, *args: Any) -> T:
        self.calls += 1
        self.inside += 1
        try:
            return await asyncio.to_thread(call, *args)
        finally:
            self.inside -= 1


async def test_a_change_takes_one_way_to_a_thread(store: BufferedSessionStore) -> None:
    threads = Threads()
    manager = SpecSessionManager(store, off_loop=threads)
    session = await manager.create_from_prompt(PROMPT)
    await manager.resolve_hole(session.session_id, "h", "x")
    assert threads.calls == 2


async def test_a_coroutine_translates_on_the_event_loop_and_holds_no_thread(
    store: BufferedSessionStore,
) -> None:
    threads, here, seen = Threads(), asyncio.get_running_loop(), []

    async def translate(prompt: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        seen.append((asyncio.get_running_loop() is here, threads.inside))
        return {"said": prompt}

    manager = SpecSessionManager(store, translate, off_loop=threads)
    await manager.create_from_prompt(PROMPT)
    assert (seen, threads.calls) == ([(True, 0)], 2)


async def test_a_translator_that_fails_leaves_nothing_behind(
    store: BufferedSessionStore, local: LocalStore
) -> None:
    async def translate(prompt: str) -> dict[str, Any]:
        raise ConnectionError("the model is away")

    with pytest.raises(ConnectionError):
        await SpecSessionManager(store, translate).create_from_prompt(PROMPT)
    assert local.stats()["last_seq"] == 0


async def test_a_caller_that_gives_up_is_told_so_while_its_thread_goes_on(
    store: BufferedSessionStore,
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def translate(prompt: str) -> dict[str, Any]:
        entered.set()
        assert leave.wait(5)
        return {"said": prompt}

    calling = asyncio.create_task(SpecSessionManager(store, translate).create_from_prompt(PROMPT))
    assert await asyncio.to_thread(entered.wait, 5)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    leave.set()
