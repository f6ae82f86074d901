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
from local_store.segment_names import SEGMENTS
from local_store.segments import SegmentKey
from syncer.adopter import Adopter, AdoptionReport
from syncer.shipper import Shipper
from syncer.testkit.fake_volume import CommitFault, FakeMount, FakeVolume
from syncer.volume import Volume
from tests.simulation.machine import Container, EdgeClock, Edges, Line, Network, new_id_of

KEY = SegmentKey.derive("a secret of the simulated deployment")
ENVIRONMENT = "simulation"
PASSES_MAX = 20
EDGES_MAX = 60  # of a worker that is to end: looks at the clock, parts of a call
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


class Harbour:
    """The Volume, the containers' mounts of it, and the job that delivers what they left.

    A method named like an action of the world is that action.
    """

    def __init__(
        self,
        fake: FakeVolume,
        tables: Sequence[TableSpec],
        world: tuple[ManualClock, Network, Random],
        spares: Sequence[Path],
    ) -> None:
        self._fake, self._tables, self._spares = fake, tables, list(spares)
        self._world_clock, self._network, self._dice = world
        clock, network, _ = world
        self._quays: dict[int, Quay] = {}
        self.edges = Edges(network.step, lambda: None)
        self._clock = EdgeClock(clock, self.edges)
        self._line = Line(network, self.edges)
        self._mounts = 0

    def _quay(self, container: Container) -> Quay:
        """Return the mount of the container's process, made when it is first needed."""
        key = id(container)
        if key not in self._quays:
            self._mounts += 1
            self._quays[key] = Quay(self._fake, f"host-{self._mounts}", container.store)
        return self._quays[key]

    def leave(self, container: Container) -> None:
        """Let the container's process end."""
        quay = self._quays.pop(id(container), None)
        if quay is not None:
            quay.leave()

    def ship(self, container: Container) -> None:
        """Seal and commit; not every commit goes well."""
        quay = self._quay(container)
        if self._dice.random() < 0.3:
            quay.mount.faults(self._dice.choice(FAULTS))
        self._network.step(f"shipped: {quay.shipper.ship().state}")
        container.edges.pass_by("shipped")

    def background(self, container: Container) -> None:
        """Let Modal commit a part of what was written, at a moment of its own."""
        done = self._quay(container).mount.background_commit()
        self._network.step(f"{done} committed behind")

    def lose(self, container: Container) -> None:
        """Lose a disk whose container was told that all of it is on the Volume."""
        shipper = self._quay(container).shipper
        if self._spares and shipper.ship().state == "committed" and not shipper.at_risk():
            self._network.step("disk lost")
            self.leave(container)
            container.lose(self._spares.pop())

    def work(self, _container: Container) -> None:
        """Deliver in the containers' stead, whether they live or not."""
        if self._dice.random() < 0.3:
            self.edges.left = self._dice.randint(1, EDGES_MAX)
        report = self._adopt(self._dice.choice([0.0, 30.0]))
        self.edges.left = -1
        self._network.step(f"adopted {report.adopted}, {report.collected} collected")

    def clear(self, pause_s: float) -> list[str]:
        """Deliver all that is there; returns what is wrong if something stays."""
        for _ in range(PASSES_MAX):
            # What was sealed anew after a merge leaves its older form in quarantine.
            left = [path for path in self._fake.files() if path.startswith(f"{SEGMENTS}/")]
            if not left:
                return []
            self._world_clock.advance(pause_s)
            self._adopt(0.0)
        return [f"stuck: {sorted(left)} stay on the Volume"]

    def _adopt(self, older_than_s: float) -> AdoptionReport:
        """Take in and deliver what the Volume has; may end in the middle."""
        self._mounts += 1
        mount = self._fake.host(f"worker-{self._mounts}")
        volume, scratch = opened(mount), mount.folder.with_name("scratch")
        adopter = Adopter(
            volume,
            self._line,
            scratch,
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
            shutil.rmtree(scratch, ignore_errors=True)
