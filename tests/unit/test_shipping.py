"""Two hosts and a Volume: what one acknowledged and shipped, the other delivers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from local_store import Delete, Insert, segments
from local_store.clock import new_id
from local_store.segment_files import scan
from local_store.segment_names import SegmentName
from local_store.segments import SegmentHeader, seal
from syncer import shipper as shipper_module
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.remote import SeqRange
from syncer.sessions.tables import SESSION_TABLES
from syncer.shipper import Shipper
from syncer.testkit.fake_volume import CommitFault
from syncer.volume import Volume
from tests.unit.shipping_world import KEY, USER, World, add_child, create, edit


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def delivered_once(world: World) -> list[tuple[str, int]]:
    """Every position of the ledger, which has each transaction once."""
    return sorted((entry.log_id, entry.seq) for entry in world.server.ledger.values())


def test_what_was_shipped_is_delivered_when_its_container_is_gone_with_its_disk(world):
    host = world.host()
    row_id = create(host, status="active")
    edit(host, row_id, status="finalized")
    edit(host, row_id, metadata={"n": 1})
    assert host.shipper.ship().state == "committed"
    log_id = host.store.log_id
    host.die()

    report = world.work()

    row = world.server.rows[("sessions", row_id)]
    assert (row.values["status"], row.values["metadata"]) == ("finalized", {"n": 1})
    assert (report.adopted, report.remaining, report.collected) == (3, 0, 1)
    assert delivered_once(world) == [(log_id, 1), (log_id, 2), (log_id, 3)]
    assert world.fake.files() == {}


def test_what_was_not_shipped_is_gone_with_its_container(world):
    host = world.host()
    create(host)
    assert host.shipper.at_risk() == 1
    host.die()
    assert world.work().segments == 0


def test_the_owner_and_the_worker_deliver_the_same_at_once_without_a_double(world):
    host = world.host()
    ids = [create(host, metadata={"n": n}) for n in range(6)]
    for row_id in ids:
        edit(host, row_id, status="finalized")
    host.shipper.ship()
    calls = 0

    def owner_comes_back() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # between the worker's first look and its batch
            world.server.before_call = lambda: None
            world.deliver(host)

    world.server.before_call = owner_comes_back
    report = world.work()
    world.deliver(host)

    assert len(world.server.ledger) == 12
    assert report.remaining == 0
    assert host.store.stats()["pending"] == 0
    assert {world.server.rows[("sessions", i)].values["status"] for i in ids} == {"finalized"}
    assert not world.server.records


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("loses", ["the request", "the reply"])
def test_a_worker_that_dies_at_any_call_leaves_the_rest_to_the_next(world, call, loses):
    host = world.host()
    ids = [create(host) for _ in range(3)]
    for row_id in ids:
        edit(host, row_id, status="finalized")
        add_child(host, row_id)
    host.shipper.ship()
    host.die()
    calls = 0

    def die() -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise RuntimeError("killed")

    hook = "before_call" if loses == "the request" else "after_commit"
    setattr(world.server, hook, die)
    with suppress(RuntimeError):
        world.work()
    setattr(world.server, hook, lambda: None)

    report = world.work()

    assert report.remaining == 0
    assert len(world.server.ledger) == 9
    assert len(world.server.rows) == 6
    assert world.fake.files() == {}


def test_an_outage_in_the_middle_is_a_report_and_collects_nothing_undelivered(world):
    host = world.host()
    create(host)
    host.shipper.ship()
    host.die()

    def gone() -> None:
        raise RemoteUnavailable("refused")

    world.server.before_call = gone
    report = world.work()
    assert (report.flush.stopped, report.collected) == ("outage", 0)
    assert len(world.fake.files()) == 1
    world.server.before_call = lambda: None
    assert world.work().collected == 1


def test_after_a_lost_reply_the_server_tells_what_is_done(world):
    host = world.host()
    create(host)
    host.shipper.ship()
    host.die()

    def lost() -> None:
        raise ReplyTimedOut("no reply")

    world.server.after_commit = lost
    report = world.work()
    assert (report.flush.stopped, report.collected) == ("outage", 1)
    assert len(world.server.ledger) == 1


def test_young_segments_are_left_to_their_container(world):
    host = world.host()
    create(host)
    host.shipper.ship()
    assert world.work(older_than_s=120.0).young == 1
    world.clock.advance(121.0)
    assert world.work(older_than_s=120.0).collected == 1


def test_a_segment_goes_only_when_the_server_knows_all_of_it(world):
    host = world.host()
    row_id = create(host)
    host.shipper.ship()
    world.deliver(host)
    assert world.work().collected == 1
    edit(host, row_id, status="finalized")
    host.shipper.ship()
    assert len(world.fake.files()) == 1


def test_files_that_come_back_after_they_were_collected_change_nothing(world):
    host = world.host()
    row_id = create(host)
    host.shipper.ship()
    host.die()
    world.work()
    world.server.edit("sessions", row_id, status="abandoned")
    assert world.fake.resurrect()
    report = world.work()
    assert (report.adopted, report.collected) == (0, 1)
    assert world.server.rows[("sessions", row_id)].values["status"] == "abandoned"


@pytest.mark.parametrize("seed", range(20))
def test_any_prefix_of_a_background_commit_delivers_whole_transactions_in_order(tmp_path, seed):
    world = World(tmp_path, seed=seed)
    host = world.host()
    row_id = create(host, metadata={"n": 0})
    for number in range(1, 4):
        edit(host, row_id, metadata={"n": number})
        host.shipper._write()
        host.mount.observe()
    host.mount.background_commit()
    host.die()
    world.work()
    seqs = [entry.seq for entry in world.server.ledger.values()]
    assert sorted(seqs) == list(range(1, len(seqs) + 1))


def test_a_failed_commit_promises_nothing_and_the_next_one_covers_it(world):
    host = world.host()
    create(host)
    host.mount.faults(CommitFault(error="deadline exceeded"))
    assert host.shipper.ship().state == "failed"
    assert host.shipper.at_risk() == 1
    assert not host.shipper.covers(1)
    assert host.shipper.ship().state == "committed"
    assert host.shipper.at_risk() == 0
    assert host.shipper.covers(1)
    host.die()
    assert world.work().collected == 1


def test_a_commit_that_fails_after_it_took_effect_is_not_counted_on_and_harmless(world):
    host = world.host()
    create(host)
    host.mount.faults(CommitFault(error="the reply was lost", takes_effect=True))
    assert host.shipper.ship().state == "failed"
    host.die()
    assert world.work().collected == 1


def test_nothing_new_needs_no_commit(world):
    host = world.host()
    create(host)
    host.shipper.ship()
    before = host.mount.commits
    assert host.shipper.ship().state == "committed"
    assert host.mount.commits == before


def test_a_transaction_too_large_for_a_segment_stays_at_risk_and_the_others_go(world, monkeypatch):
    monkeypatch.setattr(segments, "INFLATED_BYTES_MAX", 100_000)
    large = [Insert("sessions", {"id": new_id(), "metadata": {"n": "x" * 100_000}})]
    roomy = world.host()
    create(roomy)
    receipt = roomy.store.write(large, user_id=USER)
    create(roomy)
    assert roomy.shipper.ship().state == "failed"
    assert roomy.shipper.at_risk() == 1
    assert not roomy.shipper.covers(receipt.seq)
    assert roomy.shipper.covers(receipt.seq + 1)
    world.deliver(roomy)
    assert roomy.shipper.at_risk() == 0
    assert roomy.shipper.ship().state == "committed"


def test_a_backlog_is_sealed_into_several_segments(world, monkeypatch):
    host = world.host()
    for _ in range(5):
        create(host)
    monkeypatch.setattr(shipper_module, "TRANSACTIONS_MAX", 2)
    host.shipper.ship()
    names = [item for item in scan(host.mount.folder) if isinstance(item, SegmentName)]
    assert [(name.first_seq, name.last_seq) for name in names] == [(1, 2), (3, 4), (5, 5)]
    host.die()
    assert world.work().collected == 3


def test_after_a_restart_what_is_undelivered_is_sealed_again_without_harm(world):
    host = world.host()
    create(host)
    host.shipper.ship()
    create(host)
    volume = Volume(host.mount.folder, commit=host.mount.commit)
    again = Shipper(host.store, volume, KEY, environment="test")
    assert again.at_risk() == 2
    assert again.ship().state == "committed"
    host.die()
    report = world.work()
    assert len(world.server.ledger) == 2
    assert report.remaining == 0


def test_older_schema_versions_are_up_cast_and_newer_ones_left_alone(world):
    host = world.host()
    row_id = create(host, metadata={"old": 1})
    host.shipper.ship()
    host.die()
    newer = [
        replace(
            SESSION_TABLES[0],
            schema_version=2,
            upcasts={1: lambda row: {**row, "metadata": {"new": 1}} if "metadata" in row else row},
        ),
        *SESSION_TABLES[1:],
    ]
    assert world.work(tables=newer).collected == 1
    assert world.server.rows[("sessions", row_id)].values["metadata"] == {"new": 1}

    late = world.host(tables=newer)
    create(late)
    late.shipper.ship()
    late.die()
    report = world.work()
    assert (report.collected, report.quarantined, len(report.left)) == (0, (), 1)
    assert "schema version 2" in report.left[0]
    assert world.work(tables=newer).collected == 1


def test_a_delete_and_what_its_author_knew_of_the_children_travel_along(world):
    host = world.host()
    row_id = create(host)
    add_child(host, row_id)
    world.deliver(host)
    host.store.write([Delete("sessions", row_id)], user_id=USER)
    host.shipper.ship()
    host.die()
    assert world.work().remaining == 0
    assert world.server.rows == {}


class Sink:
    """A server that takes everything: thousands of transactions are too many for the model."""

    def __init__(self) -> None:
        self.taken: dict[int, str] = {}

    def settled(self, ranges: Sequence[SeqRange]) -> list[bool]:
        return [first in self.taken for _, first, _ in ranges]

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        self.taken |= {item.seq: item.txn_id for item in batch.transactions}
        return tuple(Verdict(item.txn_id, "applied") for item in batch.transactions)


def test_ten_thousand_segments_are_delivered_and_collected(tmp_path):
    world, server, count = World(tmp_path), Sink(), 10_000
    host = world.host()
    create(host)
    [first] = host.store.sealable(0, transactions_max=1, bytes_max=1)
    folder = tmp_path / "plain"
    (folder / "segments" / first.log_id).mkdir(parents=True)
    nothing = {name: () for name in ("ops", "bases", "chained", "before", "children")}
    for seq in range(1, count + 1):
        item = replace(first, seq=seq, txn_id=new_id(), **nothing)
        name = SegmentName(first.log_id, seq, seq)
        sealed = seal([item], SegmentHeader(name, count, "test", {}), KEY)
        (folder / name.path).write_bytes(sealed.data)
    adopter = world.plain_adopter(folder, server)
    report = adopter.adopt(older_than_s=0.0, budget_s=3_600.0)
    assert (report.segments, report.adopted, report.collected) == (count, count, count)
    assert sorted(server.taken) == list(range(1, count + 1))
    assert not any(folder.rglob("*.seg"))
