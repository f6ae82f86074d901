"""A Volume before the modelled server: containers that ship, a worker that delivers in their stead.

A container's disk is lost only when the container was told that all it acknowledged is committed:
then nothing of it may be missing in the end. What was not committed is lost by right, and is tested
in tests/unit/test_shipping.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

from local_store import LocalStore
from local_store.clock import ManualClock
from local_store.ops import TableSpec
from local_store.segments import SegmentKey
from syncer.adopter import Adopter, AdoptionReport
from syncer.shipper import Shipper
from syncer.testkit.fake_volume import CommitFault, FakeMount, FakeVolume
from syncer.volume import Volume
from tests.simulation.machine import EdgeClock, Edges, Line, Network, new_id_of

KEY = SegmentKey.derive("a secret of the simulated deployment")
ENVIRONMENT = "simulation"
FAULTS = (
    CommitFault(error="504"),
    CommitFault(error="504", takes_effect=True),
    CommitFault(delay_s=3.0),
)


class Quay:
    """One process's mount of the Volume, and its shipper."""

    def __init__(self, fake: FakeVolume, name: str, store: LocalStore) -> None:
        self.mount = fake.host(name)
        self.volume = opened(self.mount)
        self.shipper = Shipper(store, self.volume, KEY, environment=ENVIRONMENT)

    def leave(self) -> None:
        """End with the process."""
        self.volume.close()
        self.mount.die()


def opened(mount: FakeMount) -> Volume:
    """Return the Volume as syncer sees it."""
    return Volume(mount.folder, commit=mount.commit, reload=mount.reload)


class Worker:
    """The job that delivers what containers left; a new process for each pass."""

    def __init__(
        self,
        fake: FakeVolume,
        tables: Sequence[TableSpec],
        world: tuple[ManualClock, Network, Random],
        scratch: Path,
    ) -> None:
        self._fake, self._tables, self._scratch = fake, tables, scratch
        clock, network, self._dice = world
        self.edges = Edges(network.step, lambda: None)
        self._clock = EdgeClock(clock, self.edges)
        self._line = Line(network, self.edges)
        self._passes = 0

    def adopt(self, older_than_s: float) -> AdoptionReport:
        """Take in and deliver what the Volume has; may end in the middle."""
        self._passes += 1
        mount = self._fake.host(f"worker-{self._passes}")
        volume = opened(mount)
        adopter = Adopter(
            volume,
            self._line,
            self._scratch,
            tables=self._tables,
            keys=[KEY],
            environment=ENVIRONMENT,
            clock=self._clock,
            jitter=self._dice.random,
            ids=lambda: new_id_of(self._clock, self._dice),
        )
        try:
            return adopter.adopt(older_than_s=older_than_s, budget_s=30.0)
        finally:
            volume.close()
            mount.die()
            shutil.rmtree(self._scratch, ignore_errors=True)
