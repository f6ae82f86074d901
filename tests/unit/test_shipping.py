"""Two hosts and a Volume: what one acknowledged and shipped, the other delivers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from local_store import Insert, LocalStore, Update
from local_store.clock import ManualClock, new_id
from local_store.segments import SegmentKey
from syncer.adopter import Adopter, AdoptionReport
from syncer.flusher import Flusher, drain
from syncer.sessions.tables import SESSION_TABLES
from syncer.shipper import Shipper
from syncer.testkit.fake_volume import FakeMount, FakeVolume
from syncer.volume import Volume
from tests.simulation.remote_model import RemoteModel

KEY = SegmentKey.derive("a secret of the deployment")
USER = "github:42"


@dataclass
class Host:
    """A container: its disk, its mount, and what runs in it."""

    store: LocalStore
    mount: FakeMount
    shipper: Shipper
    folder: Path

    def die(self) -> None:
        """End without a word, and take the disk along."""
        self.mount.die()
        self.store.close()
        shutil.rmtree(self.folder)


class World:
    """Hosts, one Volume, one modelled server, one clock."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root = root
        self.clock = ManualClock()
        self.server = RemoteModel({spec.name: spec for spec in SESSION_TABLES})
        self.fake = FakeVolume(root / "volume", clock=self.clock, seed=seed)
        self._hosts = 0

    def host(self) -> Host:
        self._hosts += 1
        mount = self.fake.host(f"host-{self._hosts}")
        folder = self.root / f"disk-{self._hosts}"
        store = LocalStore.open(folder, tables=SESSION_TABLES, clock=self.clock)
        volume = Volume(mount.folder, commit=mount.commit, reload=mount.reload)
        return Host(store, mount, Shipper(store, volume, KEY, environment="test"), folder)

    def adopter(self, **changes: Any) -> tuple[Adopter, Volume]:
        self._hosts += 1
        mount = self.fake.host(f"worker-{self._hosts}")
        volume = Volume(mount.folder, commit=mount.commit, reload=mount.reload)
        given = {"keys": [KEY], "environment": "test", "tables": SESSION_TABLES, **changes}
        made = Adopter(
            volume, self.server, self.root / f"scratch-{self._hosts}", clock=self.clock, **given
        )
        return made, volume

    def work(self, older_than_s: float = 0.0, **changes: Any) -> AdoptionReport:
        adopter, volume = self.adopter(**changes)
        assert volume.reload().state == "reloaded"
        return adopter.adopt(older_than_s=older_than_s, budget_s=60.0)

    def deliver(self, host: Host) -> None:
        drain(Flusher(host.store, self.server, clock=self.clock), self.clock, budget_s=60.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def create(host: Host, **values: Any) -> str:
    row_id = new_id()
    host.store.write([Insert("sessions", {"id": row_id, **values})], user_id=USER)
    return row_id


def edit(host: Host, row_id: str, **values: Any) -> str:
    receipt = host.store.write([Update("sessions", row_id, values)], user_id=USER)
    return receipt.txn_id


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
    assert sorted(entry.seq for entry in world.server.ledger.values()) == [1, 2, 3]
    assert {entry.log_id for entry in world.server.ledger.values()} == {log_id}
    assert world.fake.files() == {}


def test_what_was_not_shipped_is_gone_with_its_container(world):
    host = world.host()
    create(host)
    assert host.shipper.at_risk() == 1
    host.die()
    assert world.work().segments == 0


def test_a_change_of_a_row_delivered_before_is_built_on_the_version_its_container_knew(world):
    host = world.host()
    row_id = create(host, status="active", metadata={"n": 0})
    world.deliver(host)
    edit(host, row_id, metadata={"n": 1})
    host.shipper.ship()
    world.server.edit("sessions", row_id, metadata={"n": 0, "other": True})
    host.die()

    report = world.work()

    assert report.flush.merged == 1  # a real conflict, found with the segment alone
    assert world.server.rows[("sessions", row_id)].values["metadata"] == {"n": 1, "other": True}


def test_later_changes_are_delivered_when_their_predecessor_was_by_its_container(world):
    host = world.host()
    row_id = create(host, status="active")
    host.shipper.ship()
    edit(host, row_id, status="finalized")
    host.shipper.ship()
    drain(
        Flusher(host.store, world.server, clock=world.clock), world.clock, budget_s=0.0
    )  # one pass
    host.die()
    world.work()
    assert world.server.rows[("sessions", row_id)].values["status"] == "finalized"
    assert len(world.server.ledger) == 2
    assert not world.server.records
