"""Hosts with disks of their own, one fake Volume, one modelled server, one clock."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_store import Insert, LocalStore, TableSpec, Update
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

    def host(self, tables: Sequence[TableSpec] = SESSION_TABLES, **limits: Any) -> Host:
        self._hosts += 1
        mount = self.fake.host(f"host-{self._hosts}")
        folder = self.root / f"disk-{self._hosts}"
        store = LocalStore.open(folder, tables=tables, clock=self.clock, **limits)
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

    def plain_adopter(self, folder: Path, server: Any, **changes: Any) -> Adopter:
        """Adopt from an ordinary folder: the fake Volume looks at every file at each step."""
        given = {"keys": [KEY], "environment": "test", "tables": SESSION_TABLES, **changes}
        scratch = self.root / "scratch"
        return Adopter(Volume(folder), server, scratch, clock=self.clock, **given)

    def deliver(self, host: Host) -> None:
        drain(Flusher(host.store, self.server, clock=self.clock), self.clock, budget_s=60.0)


def create(host: Host, **values: Any) -> str:
    row_id = new_id()
    host.store.write([Insert("sessions", {"id": row_id, **values})], user_id=USER)
    return row_id


def edit(host: Host, row_id: str, **values: Any) -> str:
    receipt = host.store.write([Update("sessions", row_id, values)], user_id=USER)
    return receipt.txn_id


def add_child(host: Host, session_id: str) -> str:
    row_id = new_id()
    values = {"session_id": session_id, "content": "more", "revision_type": "manual_edit"}
    host.store.write([Insert("session_revisions", {"id": row_id, **values})], user_id=USER)
    return row_id
