"""What a worker makes of changes that build on one another, across logs and after merges."""

from __future__ import annotations

from pathlib import Path

import pytest

from local_store import Delete, Insert, Update
from local_store.clock import new_id
from syncer.flusher import Flusher, FlushLimits, drain
from tests.simulation.remote_model import RemoteModel
from tests.unit.buffer_tables import waiting
from tests.unit.history_world import TABLES as NOTES
from tests.unit.shipping_world import USER, Host, World, add_child, create, edit


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_later_segment_builds_on_what_its_container_delivered_itself(world):
    host = world.host()
    row_id = create(host, metadata={"n": 0})
    world.deliver(host)
    edit(host, row_id, metadata={"n": 1})
    host.shipper.ship()
    world.server.edit("sessions", row_id, metadata={"n": 0, "other": True})
    host.die()

    report = world.work()

    assert report.flush.merged == 1  # a real conflict, found with the segment alone
    assert world.server.rows[("sessions", row_id)].values["metadata"] == {"n": 1, "other": True}


def test_a_chain_goes_on_where_its_container_stopped_delivering_it(world):
    host = world.host()
    row_id = create(host, status="active")
    host.shipper.ship()
    edit(host, row_id, status="finalized")
    host.shipper.ship()
    edit(host, row_id, metadata={"n": 1})
    edit(host, row_id, metadata={"n": 2})
    host.shipper.ship()
    limits = FlushLimits(batch_ops_max=2)  # one pass: the first two
    Flusher(host.store, world.server, limits=limits, clock=world.clock).flush_once()
    assert len(world.server.ledger) == 2
    host.die()

    report = world.work()

    values = world.server.rows[("sessions", row_id)].values
    assert (values["status"], values["metadata"]) == ("finalized", {"n": 2})
    assert len(world.server.ledger) == 4
    assert report.flush.merged == 0
    assert not world.server.records


def test_a_base_learned_between_two_changes_is_no_conflict_when_both_are_adopted(world):
    """The first was applied and the row changed by others since, as its author had seen."""
    host = world.host()
    row_id = create(host, metadata={"n": 0})
    world.deliver(host)
    edit(host, row_id, status="finalized")
    host.shipper.ship()
    world.deliver(host)
    world.server.edit("sessions", row_id, metadata={"n": 5})
    seen = world.server._seen(f"sessions/{row_id}", world.server.rows[("sessions", row_id)].user_id)
    host.store.refresh(
        "sessions", [seen], user_id=USER, as_of=host.store.change_counter(), where={"id": row_id}
    )
    edit(host, row_id, metadata={"n": 6})
    host.shipper.ship()
    host.die()

    report = world.work()

    assert report.flush.merged == 0
    assert world.server.rows[("sessions", row_id)].values["metadata"] == {"n": 6}


def test_what_was_sealed_before_a_merge_does_not_follow_what_was_merged(world):
    """Its container merged and delivered the first change, and died before it met the second's."""
    host = world.host()
    row_id = create(host, status="active", metadata={"n": 0})
    world.deliver(host)
    edit(host, row_id, status="finalized")
    edit(host, row_id, metadata={"n": 6})
    host.shipper.ship()
    world.server.edit("sessions", row_id, metadata={"n": 5})
    limits = FlushLimits(batch_ops_max=1)
    owner = Flusher(host.store, world.server, limits=limits, clock=world.clock)
    while len(world.server.ledger) < 2:
        owner.flush_once()
        world.clock.advance(1.0)
    assert not world.server.records
    host.die()

    world.work()

    [record] = world.server.records.values()
    names = ("outcome", "columns", "mine", "theirs")
    assert [record[name] for name in names] == [
        "local",
        ["metadata.n"],
        {"metadata.n": 6},
        {"metadata.n": 5},
    ]


@pytest.mark.parametrize("between", [0, 3])
def test_what_is_sealed_after_a_merge_brings_along_what_it_was_merged_with(world, between):
    """The first change was sealed before the merge, and carries the record of both after it."""
    world.server = RemoteModel({spec.name: spec for spec in NOTES})
    host, note = world.host(tables=NOTES), new_id()
    host.store.write([Insert("notes", {"id": note, "text": "first"})], user_id=USER)
    world.deliver(host)
    host.store.write([Update("notes", note, {"text": "mine"})], user_id=USER)
    host.shipper.ship()
    for _ in range(between):
        host.store.write([Insert("notes", {"text": "another"})], user_id=USER)
        host.shipper.ship()
    host.store.write([Update("notes", note, {"title": "later"})], user_id=USER)
    world.server.delete_row(("notes", note))
    limits = FlushLimits(batch_ops_max=1)
    Flusher(host.store, world.server, limits=limits, clock=world.clock).flush_once()
    host.shipper.ship()
    host.die()

    report = world.work(tables=NOTES)

    [record] = world.server.records.values()
    assert (record["outcome"], record["columns"]) == ("deleted", ["text", "title"])
    assert record["mine"] == {"text": "mine", "title": "later"}
    assert report.remaining == 0
    assert len(world.server.ledger) == 3 + between


def test_what_waits_behind_a_conflict_that_was_sealed_is_parked_with_it(world):
    """Its container had merged it and left it to a person, and died before it could say so."""
    world.server = RemoteModel({spec.name: spec for spec in NOTES})
    host, note = world.host(tables=NOTES), new_id()
    host.store.write([Insert("notes", {"id": note, "text": "first"})], user_id=USER)
    world.deliver(host)
    host.store.write([Update("notes", note, {"text": "mine"})], user_id=USER)
    host.store.write([Update("notes", note, {"title": "later"})], user_id=USER)
    world.server.edit("notes", note, text="theirs")
    Flusher(host.store, world.server, clock=world.clock).flush_once()
    host.shipper.ship()
    host.die()

    report = world.work(tables=NOTES)

    assert [parked.state for parked in world.server.parked.values()] == ["conflict", "held"]
    assert (report.remaining, report.collected) == (0, 1)


def test_what_was_sealed_behind_a_change_that_came_to_nothing_is_delivered(world):
    """Its container handed the first one over; its author deleted the row elsewhere meanwhile."""
    world.server = RemoteModel({spec.name: spec for spec in NOTES})
    host, note = world.host(tables=NOTES), new_id()
    host.store.write([Insert("notes", {"id": note, "text": "first"})], user_id=USER)
    world.deliver(host)
    host.store.write([Update("notes", note, {"title": "poison"})], user_id=USER)
    world.deliver(host)
    assert [parked.state for parked in world.server.parked.values()] == ["dead"]
    host.store.write([Update("notes", note, {"text": "later"})], user_id=USER)
    host.shipper.ship()
    host.die()
    elsewhere = world.host(tables=NOTES)
    rows = [world.server._seen(f"notes/{note}", world.server.rows[("notes", note)].user_id)]
    as_of = elsewhere.store.change_counter()
    elsewhere.store.refresh("notes", rows, user_id=USER, as_of=as_of, where={"id": note})
    elsewhere.store.write([Delete("notes", note)], user_id=USER)
    world.deliver(elsewhere)
    assert [parked.state for parked in world.server.parked.values()] == ["superseded"]

    report = world.work(tables=NOTES)

    assert (report.remaining, report.collected) == (0, 1)


@pytest.mark.parametrize("parent_first", [True, False])
def test_a_child_waits_for_its_parent_in_another_log_even_after_a_long_outage(world, parent_first):
    first, second = world.host(), world.host()
    parent, child = (first, second) if parent_first else (second, first)
    session_id = create(parent)
    child.store.refresh(  # the other container read the session before it was deleted in a restore
        "sessions",
        [{"id": session_id, "user_id": USER, "updated_at": "2026-01-01T00:00:00+00:00"}],
        user_id=USER,
        as_of=child.store.change_counter(),
        where={"id": session_id},
    )
    add_child(child, session_id)
    for host in (first, second):
        host.shipper.ship()
        host.die()
    world.clock.advance(100_000.0)  # far above parent_wait_s

    report = world.work()

    assert report.remaining == 0
    assert not world.server.parked
    assert len(world.server.ledger) == 2


def test_a_child_whose_parent_never_comes_is_parked_in_the_end(world):
    host = world.host()
    missing = new_id()
    host.store.refresh(
        "sessions",
        [{"id": missing, "user_id": USER, "updated_at": "2026-01-01T00:00:00+00:00"}],
        user_id=USER,
        as_of=host.store.change_counter(),
        where={"id": missing},
    )
    add_child(host, missing)
    host.shipper.ship()
    host.die()
    assert world.work().remaining == 1
    world.clock.advance(10_000.0)
    report = world.work()
    assert (report.remaining, report.collected) == (0, 1)
    assert [entry.state for entry in world.server.parked.values()] == ["dead"]


def test_what_builds_on_work_parked_by_its_container_is_parked_behind_it(world):
    host = world.host()
    session_id = create(host)
    poison = new_id()
    values = {"session_id": session_id, "content": "poison", "revision_type": "manual_edit"}
    host.store.write([Insert("session_revisions", {"id": poison, **values})], user_id=USER)
    world.deliver(host)
    assert [entry.state for entry in world.server.parked.values()] == ["dead"]
    host.store.write([Update("session_revisions", poison, {"metadata": {"n": 1}})], user_id=USER)
    host.shipper.ship()
    host.die()

    report = world.work()

    assert (report.remaining, report.collected) == (0, 1)
    assert sorted(entry.state for entry in world.server.parked.values()) == ["dead", "held"]


def in_conflict(world: World) -> tuple[Host, str]:
    """A container with two changes of a note, the first merged and left to a person, not parked."""
    world.server = RemoteModel({spec.name: spec for spec in NOTES})
    host, note = world.host(tables=NOTES), new_id()
    host.store.write([Insert("notes", {"id": note, "text": "first"})], user_id=USER)
    world.deliver(host)
    host.store.write([Update("notes", note, {"text": "mine"})], user_id=USER)
    host.store.write([Update("notes", note, {"text": "mine too"})], user_id=USER)
    world.server.edit("notes", note, text="theirs")
    Flusher(host.store, world.server, clock=world.clock).flush_once()
    return host, note


def apply_without_ops(world: World, host: Host) -> None:
    """What a worker's merge may have made of the first change: nothing was left of it."""
    first = waiting(host.store)[0]
    names = ("txn_id", "seq", "user_id", "digest", "accepted_at")
    sent = {**{name: getattr(first, name) for name in names}, "after": [], "ops": []}
    batch = {"log_id": host.store.log_id, "acknowledged_seq": 3, "transactions": [sent]}
    assert [v["verdict"] for v in world.server.apply(batch)["verdicts"]] == ["applied"]


def test_what_follows_a_change_that_another_container_left_out_meets_the_row_by_itself(world):
    host, note = in_conflict(world)
    apply_without_ops(world, host)
    world.deliver(host)
    assert world.server.rows[("notes", note)].values["text"] == "theirs"
    [record] = world.server.records.values()
    assert (record["outcome"], record["mine"]) == ("manual", {"text": "mine too"})


def test_a_worker_comes_back_to_what_it_could_not_merge_before_its_own_pass_settled_more(world):
    host, note = in_conflict(world)
    host.shipper.ship()
    apply_without_ops(world, host)
    world.server.delete_row(("notes", note))
    host.die()

    report = world.work(tables=NOTES)

    assert (report.remaining, report.collected) == (0, 1)


def test_what_follows_a_change_that_a_worker_merged_meets_the_row_by_itself(world):
    """Its owner hears of a duplicate, and nothing of what that was merged with."""
    world.server = RemoteModel({spec.name: spec for spec in NOTES})
    host, note = world.host(tables=NOTES), new_id()
    host.store.write([Insert("notes", {"id": note, "text": "a", "title": "b"})], user_id=USER)
    world.deliver(host)
    host.store.write([Update("notes", note, {"text": "mine"})], user_id=USER)
    host.shipper.ship()
    world.server.edit("notes", note, title="theirs")
    world.work(tables=NOTES)
    host.store.write([Update("notes", note, {"title": "mine"})], user_id=USER)
    limits = FlushLimits(batch_ops_max=1)
    owner = Flusher(host.store, world.server, limits=limits, clock=world.clock)
    drain(owner, world.clock, budget_s=60.0)
    values = world.server.rows[("notes", note)].values
    assert (values["text"], values["title"]) == ("mine", "theirs")
    [record] = world.server.records.values()
    assert (record["outcome"], record["columns"]) == ("manual", ["title"])
