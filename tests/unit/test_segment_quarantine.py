"""What becomes of segments that can't be trusted, and of those that are done."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import pytest

from local_store.segment_files import (
    quarantine,
    remove,
    scan,
    write_file,
)
from local_store.segment_folders import SAME_NAME_MAX
from local_store.segment_names import SegmentCorrupt
from tests.unit.segment_samples import (
    ONE,
    Crashed,
    Watched,
    file_of,
    files,
    log_folder,
    name_of,
    sealed,
    seqs,
)


def test_quarantine_moves_and_never_overwrites(tmp_path: Path):
    contents = [b"first", b"second", b"third"]
    moved = []
    for content in contents:
        log_folder(tmp_path).mkdir(parents=True, exist_ok=True)
        file_of(tmp_path).write_bytes(content)
        moved.append(quarantine(tmp_path, ONE.name.path))
    assert [(tmp_path / path).read_bytes() for path in moved] == contents
    assert list(scan(tmp_path)) == []


def test_a_crash_at_any_step_of_a_quarantine_loses_nothing(tmp_path: Path):
    write_file(tmp_path, ONE)
    whole = Watched()
    shutil.copytree(tmp_path / "segments", tmp_path / "whole" / "segments")
    quarantine(tmp_path / "whole", ONE.name.path, whole.calls())
    for step in range(whole.changes):
        folder = tmp_path / f"crash-{step}"
        shutil.copytree(tmp_path / "segments", folder / "segments")
        with pytest.raises(Crashed):
            quarantine(folder, ONE.name.path, Watched(crash_before=step).calls())
        assert [(folder / path).read_bytes() for path in files(folder)] == [ONE.data]


@pytest.mark.parametrize(
    "path",
    ["buffer.db", "quarantine/x", "segments/../buffer.db", "/etc/passwd", ".", "segments/a/b/c"],
)
def test_only_what_lies_below_segments_goes_into_quarantine(tmp_path: Path, path: str):
    (tmp_path / "buffer.db").write_text("x")
    with pytest.raises(ValueError, match="segments/"):
        quarantine(tmp_path, PurePosixPath(path))
    assert (tmp_path / "buffer.db").exists()


def test_a_linked_quarantine_is_not_followed(tmp_path: Path):
    write_file(tmp_path, ONE)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "quarantine").symlink_to(outside)
    with pytest.raises(SegmentCorrupt, match="link"):
        quarantine(tmp_path, ONE.name.path)
    assert files(outside) == set()
    assert seqs(tmp_path) == [1, 2]


def test_the_longest_names_find_room_in_quarantine(tmp_path: Path):
    folder = tmp_path / "segments" / ("x" * 255)
    folder.mkdir(parents=True)
    (folder / ("y" * 255)).touch()
    for _ in range(2):
        (folder / ("y" * 255)).touch()
        quarantine(tmp_path, PurePosixPath("segments", "x" * 255, "y" * 255))
    assert len(files(tmp_path / "quarantine")) == 2


def test_removal_takes_one_segment_and_an_empty_logs_folder(tmp_path: Path):
    write_file(tmp_path, ONE)
    write_file(tmp_path, sealed(3, 4))
    remove(tmp_path, ONE.name)
    remove(tmp_path, ONE.name)
    assert list(scan(tmp_path)) == [name_of(3, 4)]
    remove(tmp_path, name_of(3, 4))
    assert not log_folder(tmp_path).exists()
    remove(tmp_path, name_of(3, 4))
    write_file(tmp_path, ONE)
    assert seqs(tmp_path) == [1, 2]


def test_behind_a_thousand_files_of_one_name_quarantine_refuses_and_leaves_the_file(
    tmp_path: Path,
):
    write_file(tmp_path, ONE)
    flat = "_".join(ONE.name.path.parts[1:])
    (tmp_path / "quarantine").mkdir()
    for number in range(SAME_NAME_MAX):
        (tmp_path / "quarantine" / (f"{flat}.{number}" if number else flat)).touch()
    with pytest.raises(FileExistsError, match="too many files of one name"):
        quarantine(tmp_path, ONE.name.path)
    assert seqs(tmp_path) == [1, 2]
    (tmp_path / "quarantine" / f"{flat}.7").unlink()
    assert quarantine(tmp_path, ONE.name.path).name == f"{flat}.7"
