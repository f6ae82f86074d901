"""The rules of the session tables one by one, and five answers to five holes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from local_store import Row
from local_store.clock import ManualClock
from local_store.ops import StoredTransaction, WireOp, by_name
from syncer.core.merge import merge
from syncer.core.net_effect import policy_of
from syncer.sessions.models import hole_ids
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
