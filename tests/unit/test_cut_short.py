"""What is left when a process ends between two steps of a pass, or a change comes to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_store import Delete, Insert, LocalStore, TableSpec, Update
from local_store.clock import ManualClock, new_id
from local_store.ops import Outcome, PendingTransaction, Row, StoredTransaction, WireOp
from syncer.core.merge import merge
from syncer.flusher import Flusher, FlushLimits
from tests.simulation.model_people import OperatedModel
from tests.unit import history_world
from tests.unit.history_world import ANN, COMMENTS, NOTES, TABLES, World, opened

OTHER = TableSpec("other", dict(NOTES.columns))
YIELDING = replace(NOTES, policy={"text": "remote_wins", "title": "remote_wins"})


class Ended(BaseException):
    """The process ends here."""


def end_before_meeting(world: World, txn_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end when what became of a change is recorded and not merged, and rise."""
    meet = Flusher._meet

    def end(
        self: Flusher, transaction: PendingTransaction, rows: Mapping[str, Row | None], *given: Any
    ) -> str | None:
        if transaction.txn_id == txn_id:
            raise Ended
        return meet(self, transaction, rows, *given)

    world.stores[0].recheck([txn_id])
    with monkeypatch.context() as patch:
        patch.setattr(Flusher, "_meet", end)
        with pytest.raises(Ended):
            world.flushers[0].flush_once()
    world.restart(0)


def in_conflict(world: World) -> tuple[OperatedModel, str, str]:
    """A note with a change of its text that is in conflict; returns the ids of both."""
    server, row_id = world.server, new_id()
    assert isinstance(server, OperatedModel)
    world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
    world.flush(0)
    world.edit(row_id, text="theirs")
    first = world.write(0, ANN, Update("notes", row_id, {"text": "mine"}))
    world.flush(0)
    assert world.stores[0].state(first.txn_id) == "conflict"
    return server, row_id, first.txn_id


def test_a_process_that_ends_when_a_discard_is_recorded_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with opened(tmp_path, 1, OperatedModel) as world:
        server, row_id, first = in_conflict(world)
        last = world.write(0, ANN, Update("notes", row_id, {"text": "mine again"}))
        server.discard([first])
        end_before_meeting(world, first, monkeypatch)
        assert world.stores[0].state(first) == "discarded"
        world.settle()
        assert server.rows["notes", row_id].values["text"] == "theirs"
        assert world.stores[0].state(last.txn_id) == "conflict"


@pytest.mark.parametrize("is_more_pending", [False, True])
def test_a_row_decided_for_theirs_is_there_when_the_process_ends_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_more_pending: bool
):
    with opened(tmp_path, 1, OperatedModel) as world:
        server, row_id, first = in_conflict(world)
        if is_more_pending:
            world.write(0, ANN, Update("notes", row_id, {"title": "more"}))
        server.resolve(first, f"notes/{row_id}", "theirs")
        end_before_meeting(world, first, monkeypatch)
        assert world.stores[0].get("notes", row_id, user_id=ANN) is not None
        world.settle()
        assert server.rows["notes", row_id].values["text"] == "theirs"


@pytest.mark.parametrize("deletes", [False, True])
def test_what_built_on_a_discarded_change_goes_on_from_where_that_one_began(
    tmp_path: Path, deletes: bool
):
    row_id = new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "title": "base"}))
        world.flush(0)
        first = world.write(0, ANN, Update("notes", row_id, {"title": "poison"}))
        world.flush(0)
        change = Update("notes", row_id, {"title": "mine"})
        last = world.write(0, ANN, Delete("notes", row_id) if deletes else change)
        server.discard([first.txn_id])
        world.settle()
        assert store.state(last.txn_id) == "applied"
        assert not server.records
        assert (("notes", row_id) in server.rows) is not deletes


def test_a_record_carried_on_beside_one_of_its_own_is_told_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history_world, "TABLES", [YIELDING, COMMENTS])
    row_id, other, third = new_id(), new_id(), new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base", "title": "base"}))
        world.write(0, ANN, *(Insert("notes", {"id": i, "text": "base"}) for i in (other, third)))
        world.flush(0)
        poison = Update("notes", other, {"title": "poison"})
        first = world.write(0, ANN, Update("notes", row_id, {"text": "one"}), poison)
        beside = Update("notes", third, {"text": "two"})
        world.write(0, ANN, Update("notes", row_id, {"text": "two", "title": "two"}), beside)
        world.edit(row_id, text="theirs")
        flusher = Flusher(store, server, limits=FlushLimits(batch_ops_max=1), clock=world.clock)
        flusher.flush_once()  # the text gives way, told on the first, up to the last
        flusher.flush_once()  # the first is refused
        assert store.state(first.txn_id) == "dead"
        world.edit(row_id, title="theirs")
        world.edit(third, text="theirs")
        flusher.flush_once()  # the title and the other row give way, told on the last
        server.discard([first.txn_id])
        store.record([Outcome(first.txn_id, "discarded")])
        world.settle()
        told = {record["id"]: record for record in server.records.values()}
        assert told.keys() == {row_id, third}
        assert told[row_id]["columns"] == ["text", "title"]
        assert told[row_id]["mine"] == {"text": "two", "title": "two"}
        assert told[row_id]["theirs"] == {"text": "theirs", "title": "theirs"}


def test_a_record_of_nothing_but_what_was_discarded_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history_world, "TABLES", [YIELDING, COMMENTS])
    row_id, other = new_id(), new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
        world.write(0, ANN, Insert("notes", {"id": other, "text": "base"}))
        world.flush(0)
        poison = Update("notes", other, {"title": "poison"})
        only = world.write(0, ANN, Update("notes", row_id, {"text": "one"}), poison)
        world.edit(row_id, text="theirs")
        world.flush(0)
        assert store.state(only.txn_id) == "dead"
        server.discard([only.txn_id])
        world.settle()
        assert store.state(only.txn_id) == "discarded"
        assert not server.records


def test_a_record_of_a_row_is_taken_over_while_another_row_waits_for_a_person():
    ops = (
        WireOp("notes", "update", "r1", {"text": "m", "title": "m"}),
        WireOp("notes", "update", "r2", {"due": "m"}),
    )
    first = StoredTransaction("A", 1, "u", ops, ({"text": "b", "title": "b"}, {"due": "b"}))
    theirs = {"id": "r1", "text": "t", "title": "b", "updated_at": "2"}
    [once] = merge({"notes": YIELDING}, [first], {"notes/r1": theirs}).rewritten
    manual = {
        "table": "notes", "id": "r2", "columns": ["due"], "base": {}, "mine": {}, "theirs": {},
        "policy": "merge", "outcome": "manual", "through": "A",
    }  # fmt: skip
    waits = replace(first, ops=once.ops, before=once.before, records=(*once.records, manual))
    theirs = {**theirs, "title": "t", "updated_at": "3"}
    [twice] = merge({"notes": YIELDING}, [waits], {"notes/r1": theirs}).rewritten
    told = {record["id"]: record["columns"] for record in twice.records}
    assert len(twice.records) == 2
    assert told == {"r1": ["text", "title"], "r2": ["due"]}


@pytest.mark.parametrize("what", ["conflict", "discarded", "retried"])
def test_what_is_not_registered_any_more_stops_nobody(tmp_path: Path, what: str):
    clock, row_id = ManualClock(), new_id()
    server = OperatedModel({spec.name: spec for spec in [*TABLES, OTHER]})
    with LocalStore.open(tmp_path, tables=[*TABLES, OTHER], clock=clock) as store:
        store.write([Insert("other", {"id": row_id, "text": "base"})], user_id=ANN)
        Flusher(store, server, clock=clock).flush_once()
        text = "mine" if what == "conflict" else "poison"
        if what == "conflict":
            server.edit("other", row_id, text="theirs")
        strange = store.write([Update("other", row_id, {"text": text})], user_id=ANN)
        if what != "conflict":
            Flusher(store, server, clock=clock).flush_once()
        if what == "retried":
            store.write([Update("other", row_id, {"title": "later"})], user_id=ANN)
    if what == "discarded":
        server.discard([strange.txn_id])
    elif what == "retried":
        server.poison = None
        server.retry([strange.txn_id])
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as store:
        store.recheck([strange.txn_id])
        fine = store.write([Insert("notes", {"text": "fine"})], user_id=ANN)
        flusher = Flusher(store, server, clock=clock)
        for _ in range(5):
            flusher.flush_once()
            clock.advance(60)
        assert store.state(fine.txn_id) == "applied"
        waits = {"conflict": "held", "discarded": "discarded", "retried": "applied"}
        assert store.state(strange.txn_id) == waits[what]
    with LocalStore.open(tmp_path, tables=[*TABLES, OTHER], clock=clock) as store:
        clock.advance(3_600)
        Flusher(store, server, clock=clock).flush_once()
        Flusher(store, server, clock=clock).flush_once()
        assert store.backlog() == 0
        expected = {"conflict": "conflict", "discarded": "discarded", "retried": "applied"}
        assert store.state(strange.txn_id) == expected[what]
