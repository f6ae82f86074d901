"""Two containers change one session: both holes filled, nothing left to a person."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from local_store import LocalStore, user_uuid
from local_store.clock import ManualClock
from local_store.ops import RowConflict
from syncer.flusher import Flusher, drain
from syncer.sessions import BufferedSessionStore, SpecSessionManager
from syncer.sessions.models import hole_ids
from syncer.sessions.policy import silently_by_key
from syncer.sessions.tables import session_tables
from tests.simulation.session_model import SessionModel

USER = "github:42"
PROMPT = "sort a list of numbers stably please now"  # leaves several holes


class Container:
    """A process with a folder of its own: store, flusher, manager."""

    def __init__(self, folder: Path, server: SessionModel, clock: ManualClock) -> None:
        self.store = LocalStore.open(folder, tables=session_tables(), clock=clock)
        self.flusher = Flusher(self.store, server, clock=clock, jitter=lambda: 0.5)
        self.clock = clock
        self.sessions = BufferedSessionStore(self.store, USER, server, clock=clock)
        self.manager = SpecSessionManager(self.sessions)

    def drain(self) -> None:
        for _ in range(3):
            self.clock.advance(61)
            drain(self.flusher, self.clock, budget_s=60)

    def resolve(self, session_id: str, hole: str) -> None:
        asyncio.run(self.manager.resolve_hole(session_id, hole, f"answer to {hole}"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def server() -> SessionModel:
    return SessionModel()


@pytest.fixture
def containers(tmp_path: Path, server: SessionModel, clock: ManualClock):
    made = [Container(tmp_path / str(n), server, clock) for n in range(2)]
    yield made
    for container in made:
        container.store.close()


def shared_session(first: Container, second: Container) -> tuple[str, list[str]]:
    """A session that both containers hold; returns its id and its holes."""
    session = asyncio.run(first.manager.create_from_prompt(PROMPT))
    first.drain()
    assert second.sessions.get(session.session_id) is not None
    assert session.current_draft is not None
    return session.session_id, hole_ids(session.current_draft.ir)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_holes_answered_in_two_containers_are_all_filled(containers, server, order):
    first, second = containers
    session_id, holes = shared_session(first, second)
    assert len(holes) >= 2
    for number, hole in enumerate(holes):
        containers[number % 2].resolve(session_id, hole)
    for number in (*order, *order):
        containers[number].drain()
    assert server.parked == {}
    seen = containers[0].sessions.get(session_id)
    assert seen is not None
    assert hole_ids(seen.current_draft.ir) == []
    assert len(seen.pending_resolutions) == len(holes)
    assert all(resolution.applied for resolution in seen.pending_resolutions)
    assert {record["outcome"] for record in server.records.values()} == {"merged"}


def test_the_local_copy_shows_the_draft_that_was_made_again(containers, server):
    first, second = containers
    session_id, holes = shared_session(first, second)
    first.resolve(session_id, holes[0])
    second.resolve(session_id, holes[1])
    first.drain()
    second.flusher.flush_once()  # meets, merges, hasn't sent it again yet
    row = second.store.get("sessions", session_id, user_id=USER)
    draft = second.store.get("session_drafts", row["current_draft_id"], user_id=USER)
    assert set(holes[:2]).isdisjoint(hole_ids(draft["ir"]))


def test_the_first_end_of_a_session_stands_and_the_other_is_told(containers, server):
    first, second = containers
    session_id, _ = shared_session(first, second)
    asyncio.run(first.manager.finalize(session_id))
    asyncio.run(second.manager.abandon(session_id))
    first.drain()
    second.drain()
    assert server.parked == {}
    assert server.rows["sessions", session_id].values["status"] == "finalized"
    told = [(key[3], record["columns"]) for key, record in server.records.items()]
    assert told == [("remote", ["status"])]


def test_both_ending_it_the_same_way_is_no_conflict(containers, server):
    first, second = containers
    session_id, _ = shared_session(first, second)
    for container in containers:
        container.clock.advance(5)
        asyncio.run(container.manager.finalize(session_id))
    first.drain()
    second.drain()
    assert (server.parked, server.records) == ({}, {})


def test_a_rollback_that_meets_a_new_draft_is_the_later_word(containers, server):
    first, second = containers
    session_id, holes = shared_session(first, second)
    first.resolve(session_id, holes[0])
    asyncio.run(second.manager.rollback(session_id, 1))
    first.drain()
    second.drain()
    assert server.parked == {}
    seen = first.sessions.get(session_id)
    assert hole_ids(seen.current_draft.ir) == holes


def test_metadata_merge_by_key_and_an_overlap_is_told(containers, server):
    first, second = containers
    session_id, _ = shared_session(first, second)
    for container, value in ((first, "one"), (second, "two")):
        session = container.sessions.get(session_id)
        session.metadata = {"both": value, value: True}
        container.sessions.update(session)
    first.drain()
    second.drain()
    metadata = server.rows["sessions", session_id].values["metadata"]
    assert metadata == {"both": "two", "one": True, "two": True}
    [record] = server.records.values()
    assert (record["columns"], record["outcome"]) == (["metadata.both"], "local")


def test_a_session_deleted_elsewhere_takes_the_late_answer_with_a_record(containers, server):
    first, second = containers
    session_id, holes = shared_session(first, second)
    asyncio.run(first.manager.delete_session(session_id))
    second.resolve(session_id, holes[0])
    first.drain()
    second.drain()
    assert server.parked == {}
    assert second.sessions.get(session_id) is None
    tables = sorted(key[1] for key in server.records)
    assert tables == ["hole_resolutions", "session_drafts", "session_revisions", "sessions"]
    assert {key[3] for key in server.records} == {"deleted"}


def test_a_coroutine_fills_as_well(containers, server, clock, tmp_path):
    first, second = containers
    session_id, holes = shared_session(first, second)

    async def fill(ir, hole_id, text, type):
        return {**ir, "filled": [*ir.get("filled", []), hole_id]}

    second.flusher._store._tables = {spec.name: spec for spec in session_tables(fill)}
    first.resolve(session_id, holes[0])
    second.resolve(session_id, holes[1])
    first.drain()
    second.drain()
    draft_id = server.rows["sessions", session_id].values["current_draft_id"]
    assert server.rows["session_drafts", draft_id].values["ir"]["filled"] == [holes[1]]


def test_of_two_client_moments_the_later_stays():
    conflict = RowConflict(
        "sessions", user_uuid("x"),
        base={"client": {"updated_at": "2026-01-01T00:00:00Z", "gone": 1}},
        mine={"client": {"updated_at": "2026-01-02T00:00:00Z", "new": 1}},
        theirs={"client": {"updated_at": "2026-01-03T00:00:00+00:00Z", "gone": 1, "their": 1}},
        columns=frozenset({"client"}),
    )  # fmt: skip
    answer = silently_by_key(conflict)
    assert answer.values["client"] == {
        "updated_at": "2026-01-03T00:00:00+00:00Z", "new": 1, "their": 1,
    }  # fmt: skip
    earlier = replace(conflict, theirs={"client": {"updated_at": "2026-01-01T12:00:00Z"}})
    assert silently_by_key(earlier).values["client"]["updated_at"] == "2026-01-02T00:00:00Z"
