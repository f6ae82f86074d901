"""Several processes on one folder, and processes that are killed: one folder is one store."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from local_store import LocalStore
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    ConcurrentModificationError,
    PromptSession,
    SpecSessionManager,
)
from tests.unit.session_store.support import ALICE, a_session, got

# Fresh interpreters: a fork would inherit the parent's locks and threads.
SPAWN = multiprocessing.get_context("spawn")
DEADLINE_S = 60
HOLES = [f"hole_{number}" for number in range(5)]


def answer_holes(folder: Path, session_id: str, holes: list[str], told: Connection) -> None:
    """Answer holes one by one and say after each that it was acknowledged; then wait."""
    with LocalStore.open(folder, tables=SESSION_TABLES) as local:
        manager = SpecSessionManager(BufferedSessionStore(local, ALICE))
        for hole in holes:
            asyncio.run(manager.resolve_hole(session_id, hole, f"about {hole}"))
            told.send(hole)
        told.recv()


def finalize_when_told(folder: Path, session_id: str, told: Connection) -> None:
    """Read the session, wait, and finalize the copy that was read."""
    with LocalStore.open(folder, tables=SESSION_TABLES) as local:
        store = BufferedSessionStore(local, ALICE)
        session = store.get(session_id)
        assert session is not None
        told.send("read")
        told.recv()
        session.finalize()
        try:
            store.update(session)
        except ConcurrentModificationError as error:
            told.send(error.fields)
        else:
            told.send("stored")


@pytest.fixture
def session(sessions: BufferedSessionStore) -> PromptSession:
    made = a_session()
    sessions.create(made)
    return made


def hear(told: Connection) -> object:
    assert told.poll(DEADLINE_S), "the other process says nothing"
    return told.recv()


def test_what_was_acknowledged_survives_a_kill_at_that_moment(
    tmp_path: Path, sessions: BufferedSessionStore, session: PromptSession
) -> None:
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=answer_holes, args=(tmp_path, session.session_id, HOLES, there))
    child.start()
    acknowledged = [hear(here) for _ in range(3)]
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(DEADLINE_S)
    assert child.exitcode == -signal.SIGKILL
    kept = [r.hole_id for r in got(sessions, session).pending_resolutions]
    assert kept[:3] == acknowledged
    assert kept == HOLES[: len(kept)], "and what was under way is there as a whole, or not at all"
    assert len(got(sessions, session).ir_drafts) == 1 + len(kept)


def test_two_processes_on_one_folder_answer_one_session_and_lose_nothing(
    tmp_path: Path, sessions: BufferedSessionStore, session: PromptSession
) -> None:
    pipes = [SPAWN.Pipe() for _ in range(2)]
    halves = (HOLES[:2], HOLES[2:])
    children = [
        SPAWN.Process(target=answer_holes, args=(tmp_path, session.session_id, half, pipe[1]))
        for half, pipe in zip(halves, pipes, strict=True)
    ]
    for child in children:
        child.start()
    for half, (here, _there) in zip(halves, pipes, strict=True):
        assert [hear(here) for _ in half] == half
        here.send("enough")
    for child in children:
        child.join(DEADLINE_S)
        assert child.exitcode == 0
    found = got(sessions, session)
    assert sorted(r.hole_id for r in found.pending_resolutions) == HOLES
    assert sorted(d.version for d in found.ir_drafts) == [1, 2, 3, 4, 5, 6]
    assert found.current_draft == max(found.ir_drafts, key=lambda draft: draft.version)


def test_a_copy_held_by_another_process_is_stale_when_this_one_wrote(
    tmp_path: Path, sessions: BufferedSessionStore, session: PromptSession
) -> None:
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=finalize_when_told, args=(tmp_path, session.session_id, there))
    child.start()
    assert hear(here) == "read"
    session.abandon()
    sessions.update(session)
    here.send("go on")
    assert hear(here) == ("status",)
    child.join(DEADLINE_S)
    assert got(sessions, session).status == "abandoned"
