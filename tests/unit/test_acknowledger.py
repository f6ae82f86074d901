"""What a receipt may say, in each mode and whatever is broken."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from local_store import Insert, Receipt
from local_store.clock import new_id
from syncer.acknowledger import AckLimits, Acknowledger
from syncer.core.acknowledge import must_ship
from syncer.flusher import FlushReport
from syncer.testkit.fake_volume import CommitFault
from tests.unit.shipping_world import USER, Host, World, create

UP = FlushReport(breaker="closed", stopped="empty")
DOWN = FlushReport(breaker="open", stopped="outage", pending=1)


class Container:
    """A host with its acknowledger; `write` is what an API call does."""

    def __init__(self, world: World, mode: str, **limits: object) -> None:
        self.world = world
        self.host: Host = world.host()
        self.acknowledger = Acknowledger(
            self.host.store,
            self.host.shipper,
            AckLimits(mode, **limits),
            clock=world.clock,
        )

    def write(self) -> Receipt:
        create(self.host)
        [*_, last] = self.host.store.entries()
        return self.acknowledger.reach(Receipt(last.txn_id, last.seq, "host", ""))

    def hear(self, report: FlushReport) -> None:
        pending = self.host.store.stats()["pending"]
        self.acknowledger.heard(replace(report, pending=pending))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(
    ("mode", "delivers", "breaker", "age_s", "ships"),
    [
        ("local", False, "open", 1e9, False),
        ("remote", False, "open", 1e9, False),
        ("volume", True, "closed", None, True),
        ("adaptive", True, "closed", None, False),
        ("adaptive", True, "closed", 1.0, False),
        ("adaptive", True, "closed", 1.1, True),
        ("adaptive", True, "open", None, True),
        ("adaptive", True, "half_open", None, True),
        ("adaptive", False, "closed", None, True),
    ],
)
def test_when_a_write_must_be_on_the_volume_first(mode, delivers, breaker, age_s, ships):
    asked = {"delivers": delivers, "breaker": breaker, "oldest_age_s": age_s}
    assert must_ship(mode, adaptive_after_s=1.0, **asked) is ships


def test_local_says_host_and_touches_no_volume(world):
    container = Container(world, "local")
    assert container.write().durability == "host"
    assert container.host.mount.commits == 0
    assert container.acknowledger.at_risk() == 1


def test_volume_says_container_for_what_survives_the_container(world):
    container = Container(world, "volume")
    assert container.write().durability == "container"
    assert container.acknowledger.at_risk() == 0
    container.host.die()
    assert world.work().collected == 1


def test_a_volume_that_fails_is_an_honest_host_until_it_works_again(world):
    container = Container(world, "volume")
    container.host.mount.faults(CommitFault(error="gone"), CommitFault(error="gone"))
    assert container.write().durability == "host"
    assert container.acknowledger.error is not None
    assert container.write().durability == "host"
    assert container.acknowledger.at_risk() == 2
    assert container.write().durability == "container"
    assert container.acknowledger.error is None
    assert container.acknowledger.durability([1, 2, 3]) == "container"


def test_adaptive_ships_while_the_breaker_is_open_and_what_came_before_with_it(world):
    container = Container(world, "adaptive")
    assert container.write().durability == "host"
    container.hear(DOWN)
    assert container.write().durability == "container"
    assert container.acknowledger.at_risk() == 0  # the first one went along
    world.deliver(container.host)
    container.hear(UP)
    assert container.write().durability == "host"


def test_adaptive_ships_when_supabase_is_merely_slow(world):
    container = Container(world, "adaptive", adaptive_after_s=1.0)
    assert container.write().durability == "host"
    world.clock.advance(0.9)
    container.hear(UP)
    assert container.write().durability == "host"
    world.clock.advance(0.2)
    assert container.write().durability == "container"
    world.deliver(container.host)
    container.hear(UP)
    assert container.write().durability == "host"


def test_adaptive_without_a_flusher_here_always_ships(world):
    container = Container(world, "adaptive", delivers=False)
    assert container.write().durability == "container"


def test_what_was_acknowledged_before_the_turn_is_shipped_though_nobody_writes_any_more(world):
    container = Container(world, "adaptive")
    container.write()
    container.acknowledger.ship_if_due()
    assert container.acknowledger.at_risk() == 1
    container.hear(DOWN)
    container.acknowledger.ship_if_due()
    assert container.acknowledger.at_risk() == 0


def test_a_restarted_container_knows_that_it_is_behind(world):
    container = Container(world, "adaptive")
    container.write()
    world.clock.advance(5.0)
    again = Acknowledger(
        container.host.store,
        container.host.shipper,
        AckLimits("adaptive"),
        clock=world.clock,
    )
    assert again.must_ship()


def test_the_end_of_a_process_ships_in_any_mode(world):
    container = Container(world, "local")
    container.write()
    assert container.acknowledger.ship_all(5.0)
    container.host.die()
    assert world.work().collected == 1


def test_remote_waits_for_the_server(world):
    container = Container(world, "remote", ack_timeout_s=60.0)
    receipts: list[Receipt] = []
    thread = threading.Thread(target=lambda: receipts.append(container.write()))
    thread.start()
    while thread.is_alive():
        world.deliver(container.host)
        container.hear(UP)
        thread.join(0.01)
    assert receipts[0].durability == "remote"


def test_remote_says_host_when_the_server_does_not_confirm_in_time(tmp_path):
    world = World(tmp_path)
    host = world.host()
    acknowledger = Acknowledger(host.store, limits=AckLimits("remote", ack_timeout_s=0.05))
    create(host)
    [entry] = host.store.entries()
    assert acknowledger.reach(Receipt(entry.txn_id, 1, "host", "")).durability == "host"


def test_remote_never_says_remote_of_what_waits_for_a_person(world):
    container = Container(world, "remote", ack_timeout_s=60.0)
    receipt = container.host.store.write([_poison(container)], user_id=USER)
    world.deliver(container.host)
    assert world.server.parked
    assert container.acknowledger.reach(receipt).durability == "host"


def test_without_a_volume_nothing_is_ever_called_container(world):
    host = world.host()
    acknowledger = Acknowledger(host.store, None, AckLimits("volume"), clock=world.clock)
    create(host)
    [entry] = host.store.entries()
    assert acknowledger.reach(Receipt(entry.txn_id, 1, "host", "")).durability == "host"
    assert acknowledger.durability([1]) == "host"
    assert acknowledger.durability([]) == "remote"
    assert acknowledger.at_risk() == 1
    assert acknowledger.ship_all(1.0)


def _poison(container: Container):
    session = create(container.host)
    values = {"session_id": session, "content": "poison", "revision_type": "manual_edit"}
    return Insert("session_revisions", {"id": new_id(), **values})
