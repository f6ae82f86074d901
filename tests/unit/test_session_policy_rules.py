"""The rules of the session tables one by one, and five answers to five holes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from local_store import Row
from local_store.clock import ManualClock
from local_store.ops import RowConflict, StoredTransaction, WireOp, by_name
from syncer.core.merge import merge
from syncer.core.net_effect import policy_of
from syncer.sessions.models import draft_of, hole_ids
from syncer.sessions.policy import their_end
from syncer.sessions.tables import session_tables
from tests.simulation.session_model import SessionModel
from tests.unit.test_session_policy import Container

TABLES = by_name(session_tables())
HOLES = [f"hole_{n}" for n in range(5)]


def session_row(**values: Any) -> Row:
    row: Row = dict.fromkeys(TABLES["sessions"].columns)
    row |= {"id": "s", "user_id": "u", "status": "active", "metadata": {}, "client": {}}
    return {**row, **values}


def test_no_column_of_a_session_or_its_children_is_ever_left_to_a_person() -> None:
    for spec in TABLES.values():
        columns = [column for column in spec.columns if spec.writable(column)]
        assert not {policy_of(spec, column) for column in columns} & {"merge", "manual"}
        assert spec.on_delete == "keep_remote"


def test_an_end_that_came_second_leaves_no_stamp_on_the_first() -> None:
    mine = {"status": "finalized", "finalized_at": "2026-01-02T00:00:00Z"}
    op = WireOp("sessions", "update", "s", mine)
    pending = StoredTransaction("t1", 1, "u", (op,), ({"status": "active", "finalized_at": None},))
    theirs = {"sessions/s": session_row(status="abandoned")}
    merged = merge(TABLES, [pending], theirs)
    assert merged.manual == {}
    [rewritten] = merged.rewritten
    assert rewritten.ops == ()
    [record] = rewritten.records
    assert (record["columns"], record["outcome"]) == (["status"], "remote")


def test_an_end_without_a_stamp_or_beside_other_changes_is_theirs_as_well() -> None:
    child = WireOp("session_revisions", "insert", "r", {"content": "x"})
    bare = WireOp("sessions", "update", "s", {"status": "finalized"})
    stamped = WireOp("sessions", "update", "s", {"status": "finalized", "finalized_at": "then"})
    theirs = session_row(status="abandoned")
    for siblings, stamps in (((child, bare), {}), ((child, stamped), {1: {"finalized_at": None}})):
        mine = dict(siblings[1].values)
        conflict = RowConflict(
            "sessions", "s", {"status": "active"}, mine, theirs, frozenset({"status"}), siblings
        )
        answer = their_end(conflict)
        assert (answer.values, answer.siblings) == ({}, stamps)


def test_going_back_to_an_older_draft_is_the_later_word_and_needs_nobody(tmp_path: Path) -> None:
    clock, server = ManualClock(), SessionModel()
    first, second = (Container(tmp_path / str(n), server, clock) for n in range(2))
    session = asyncio.run(first.manager.create_from_reverse_mode({"n": 1}))
    session.add_draft(draft_of({"n": 2}, 2))
    first.sessions.update(session)
    first.drain()
    mine = second.sessions.get(session.session_id)
    assert mine is not None
    mine.current_draft = mine.ir_drafts[0]
    second.sessions.update(mine)
    session.add_draft(draft_of({"n": 3}, 3))
    first.sessions.update(session)
    for container in (first, second, first):
        container.drain()
    for container in (first, second):
        found = container.sessions.get(session.session_id)
        assert found is not None
        assert [draft.ir for draft in found.ir_drafts] == [{"n": 1}, {"n": 2}, {"n": 3}]
        assert found.current_draft is found.ir_drafts[0]
        container.store.close()
    assert server.parked == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("first_three", [0, 1])
def test_five_holes_answered_in_two_containers_are_all_filled(
    tmp_path: Path, order: tuple[int, int], first_three: int
) -> None:
    clock, server = ManualClock(), SessionModel()
    containers = [Container(tmp_path / str(n), server, clock) for n in range(2)]
    holes = [{"identifier": hole, "kind": "intent"} for hole in HOLES]
    ir = {"intent": {"summary": "s", "rationale": None, "holes": holes}}
    session = asyncio.run(containers[0].manager.create_from_reverse_mode(ir))
    containers[0].drain()
    assert containers[1].sessions.get(session.session_id) is not None
    for number, hole in enumerate(HOLES):
        at = first_three if number < 3 else 1 - first_three
        containers[at].resolve(session.session_id, hole)
    for number in (*order, *order):
        containers[number].drain()
    assert server.parked == {}
    for container in containers:
        found = container.sessions.get(session.session_id)
        assert found is not None
        assert found.current_draft is not None
        assert hole_ids(found.current_draft.ir) == []
        said = found.current_draft.ir["intent"]["rationale"]
        assert sorted(said.split("\n")) == [f"answer to {hole}" for hole in HOLES]
        container.store.close()
