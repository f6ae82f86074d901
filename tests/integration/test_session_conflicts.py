"""Two containers refine one session over real Postgres and PostgREST; no person is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from syncer import operators
from syncer.sessions import BufferedSessionStore, SpecSessionManager
from syncer.sessions.models import hole_ids
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.faults import Cut

USER = "github:42"
HOLES = [f"hole_{number}" for number in range(5)]
IR = {
    "intent": {
        "summary": "five open questions",
        "rationale": None,
        "holes": [{"identifier": hole, "kind": "intent"} for hole in HOLES],
    }
}


class Container:
    """A folder of its own, with the manager that its API would use."""

    def __init__(self, app: BufferedApp) -> None:
        self.app = app
        self.sessions = BufferedSessionStore(app.store, USER, app.remote, read_budget_s=10.0)
        self.manager = SpecSessionManager(self.sessions)

    def resolve(self, session_id: str, hole: str) -> None:
        asyncio.run(self.manager.resolve_hole(session_id, hole, f"the answer to {hole}"))


@pytest.fixture
def pair(buffered_store: Callable[..., BufferedApp]) -> tuple[Container, Container]:
    return Container(buffered_store(SESSION_TABLES)), Container(buffered_store(SESSION_TABLES))


def shared(first: Container, second: Container) -> str:
    session = asyncio.run(first.manager.create_from_reverse_mode(IR))
    first.app.drain()
    assert second.sessions.get(session.session_id) is not None
    return session.session_id


def test_five_answers_to_five_holes_from_two_containers_fill_all_five(
    pair, fresh_supabase, fault_proxy: Any
):
    first, second = pair
    session_id = shared(first, second)
    for number, hole in enumerate(HOLES):
        pair[number % 2].resolve(session_id, hole)
    fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
    for container in (second, first, second):
        container.app.drain()
    with psycopg.connect(fresh_supabase.database_url) as sql:
        [(ir,)] = sql.execute("select current_ir from sessions").fetchall()
        assert sql.execute("select count(*) from hole_resolutions where applied").fetchone() == (5,)
        assert sql.execute("select count(*) from sync.parked").fetchone() == (0,)
        outcomes = sql.execute("select distinct outcome from sync.conflicts").fetchall()
    assert hole_ids(ir) == []
    for hole in HOLES:
        assert f"the answer to {hole}" in ir["intent"]["rationale"]
    assert outcomes == [("merged",)]
    for container in pair:
        seen = container.sessions.get(session_id)
        assert seen is not None
        assert len(seen.pending_resolutions) == 5
        assert hole_ids(seen.current_draft.ir) == []
        assert container.app.audit().balanced


def test_twenty_answers_appended_by_twenty_containers_are_all_kept(
    buffered_store, fault_proxy: Any, fresh_supabase
):
    containers = [Container(buffered_store(SESSION_TABLES)) for _ in range(20)]
    session_id = shared(containers[0], containers[1])
    for container in containers[2:]:
        assert container.sessions.get(session_id) is not None
    for number, container in enumerate(containers):
        container.resolve(session_id, f"extra_{number}")
        if number % 4 == 0:
            fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
        container.app.flush_once()
    for container in containers:
        container.app.drain()
    seen = containers[0].sessions.get(session_id)
    assert seen is not None
    assert {r.hole_id for r in seen.pending_resolutions} == {f"extra_{n}" for n in range(20)}
    assert operators.dead_letters(containers[0].app.remote) == []
