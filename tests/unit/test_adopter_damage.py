"""Segments that can't be trusted: set aside and told of; everything else is delivered."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from local_store.segment_files import load, scan
from local_store.segment_names import SegmentName
from local_store.segments import SegmentHeader, SegmentKey, seal
from syncer.audit import audit
from tests.unit.shipping_world import KEY, World, create

OTHER_KEY = SegmentKey.derive("the secret of another deployment")


class Volume:
    """A plain folder with two logs' segments, three each, and what the server is left with."""

    def __init__(self, root: Path) -> None:
        self.world = World(root)
        self.folder = root / "plain"
        self.folder.mkdir()
        self.hosts = [self.world.host(), self.world.host()]
        for host in self.hosts:
            for _ in range(3):
                create(host)
                host.shipper._write()
            shutil.copytree(host.mount.folder, self.folder, dirs_exist_ok=True)
            host.die()
        self.names = [item for item in scan(self.folder) if isinstance(item, SegmentName)]
        self.paths = [self.folder / name.path for name in self.names]

    def work(self, **changes):
        adopter = self.world.plain_adopter(self.folder, self.world.server, **changes)
        return adopter.adopt(older_than_s=0.0, budget_s=60.0)

    @property
    def delivered(self) -> int:
        return len(self.world.server.ledger)

    def left(self) -> list[Path]:
        return sorted(self.folder.rglob("*.seg*"))


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    made = Volume(tmp_path)
    assert len(made.paths) == 6
    return made


def test_a_sound_volume_is_delivered_and_emptied(volume):
    report = volume.work()
    assert (volume.delivered, report.collected, report.quarantined, report.left) == (6, 6, (), ())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def link(path: Path) -> None:
    target = path.with_name("elsewhere.tmp")
    path.rename(target)
    path.symlink_to(target)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def bomb(path: Path) -> None:
    """Announce little, inflate to much."""
    data = path.read_bytes()
    path.write_bytes(data[:30] + zlib.compress(bytes(200_000_000), 9))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, empty, zeros, link, folder, bomb, pipe])
def test_a_damaged_segment_is_set_aside_and_the_other_five_are_delivered(
    volume: Volume, damage: Callable[[Path], None]
):
    damage(volume.paths[1])
    report = volume.work()
    assert (volume.delivered, report.collected) == (5, 5)
    assert len(report.quarantined) == 1
    assert report.quarantined[0].startswith("quarantine/")
    assert os.path.lexists(volume.folder / report.quarantined[0])
    assert volume.work().quarantined == ()


@pytest.mark.parametrize("step", range(0, 100, 7))
def test_a_segment_cut_anywhere_is_set_aside(volume: Volume, step: int):
    path = volume.paths[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * step // 100])
    report = volume.work()
    assert (volume.delivered, len(report.quarantined)) == (5, 1)


def test_segments_swapped_between_two_logs_are_both_set_aside(volume: Volume):
    first, second = volume.paths[0], volume.paths[3]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    report = volume.work()
    assert (volume.delivered, len(report.quarantined)) == (4, 2)


def test_a_segment_replayed_from_another_log_is_set_aside(volume: Volume):
    forged = volume.paths[0].parent / volume.paths[3].name
    forged.write_bytes(volume.paths[3].read_bytes())
    report = volume.work()
    assert volume.delivered == 5
    assert len(report.quarantined) == 1


def test_a_segment_of_another_key_or_environment_is_left_where_it_is_and_told_of(volume: Volume):
    report = volume.work(keys=[OTHER_KEY])
    assert (volume.delivered, report.quarantined, len(report.left)) == (0, (), 6)
    report = volume.work(environment="production")
    assert (volume.delivered, report.quarantined, len(report.left)) == (0, (), 6)
    assert len(volume.left()) == 6
    assert volume.work(keys=[OTHER_KEY, KEY]).collected == 6


def test_a_missing_segment_is_counted_as_lost_and_stops_no_other(volume: Volume):
    volume.paths[1].unlink()
    report = volume.work()
    assert (volume.delivered, report.collected, report.remaining) == (5, 5, 0)
    found = audit(volume.world.server)
    assert not found.balanced
    assert (found.total.applied, found.total.lost) == (5, 1)


def test_strange_names_are_set_aside_and_unfinished_files_left_alone(volume: Volume):
    segments = volume.folder / "segments"
    (segments / "not-a-log").mkdir()
    (segments / "README").write_text("hello")
    (volume.paths[0].parent / "notes.txt").write_text("hello")
    (volume.paths[0].parent / "x.seg.tmp").write_text("under way")
    report = volume.work()
    assert (volume.delivered, len(report.quarantined)) == (6, 3)
    assert list(segments.rglob("*.tmp"))


def test_a_segment_forged_without_the_key_never_reaches_the_server(volume: Volume):
    name = volume.names[0]
    sound = load(volume.folder, name, [KEY], environment="test")
    forged = seal(sound.transactions, SegmentHeader(name, name.last_seq, "test"), OTHER_KEY)
    volume.paths[0].write_bytes(forged.data)
    report = volume.work()
    assert (volume.delivered, len(report.left)) == (5, 1)
