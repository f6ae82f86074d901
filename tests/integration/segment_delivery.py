"""Delivering what a container shipped, by a worker that has nothing else of it."""

from __future__ import annotations

from pathlib import Path

from local_store.segments import SegmentKey
from syncer.adopter import Adopter
from syncer.shipper import Shipper
from syncer.testkit import BufferedApp
from syncer.volume import Volume

KEY = SegmentKey.derive("a secret of the deployment")


def deliver_by_segments(app: BufferedApp, folder: Path) -> None:
    """Ship what is undelivered and let a worker deliver it that has nothing but the segments."""
    (folder / "volume").mkdir(parents=True)
    volume, tables = Volume(folder / "volume"), list(app.store.tables.values())
    assert Shipper(app.store, volume, KEY, environment="test").ship().state == "committed"
    made = Adopter(
        volume, app.remote, folder / "scratch", tables=tables, keys=[KEY], environment="test"
    )
    report = made.adopt(older_than_s=0.0, budget_s=60.0)
    assert (report.quarantined, report.left, report.remaining) == ((), (), 0)
    assert report.collected == report.segments
    volume.close()
