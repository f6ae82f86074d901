"""Segments on a disk: whole or absent after a crash at any step, and never outside their folder."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path, PurePosixPath

import pytest

from local_store.segment_files import (
    Stranger,
    load,
    quarantine,
    scan,
    write_file,
)
from local_store.segment_names import SegmentCorrupt, SegmentName
from tests.unit.segment_samples import (
    KEY,
    LOG,
    ONE,
    OTHER_LOG,
    Crashed,
    Watched,
    fault,
    file_of,
    files,
    log_folder,
    name_of,
    sealed,
    seqs,
)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- writing --------------------------------------------------------------------------------------


def test_a_written_segment_is_found_and_read(tmp_path: Path):
    written = write_file(tmp_path, ONE)
    assert (written.path, written.existed, written.displaced) == (ONE.name.path, False, None)
    assert list(scan(tmp_path)) == [ONE.name]
    assert seqs(tmp_path) == [1, 2]


def test_only_its_owner_may_read_it(tmp_path: Path):
    write_file(tmp_path, ONE)
    assert stat.S_IMODE(file_of(tmp_path).stat().st_mode) == 0o600
    assert stat.S_IMODE(log_folder(tmp_path).stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "segments").stat().st_mode) == 0o700


def test_the_steps_go_in_the_order_that_power_loss_needs(tmp_path: Path):
    watched = Watched()
    write_file(tmp_path, ONE, watched.calls())
    steps = [step for step in watched.done if not step.startswith(("open", "unlink"))]
    name = ONE.name.file_name
    temporary = next(step.split()[1] for step in steps if step.startswith("write"))
    writes = [f"write {temporary}"] * -(-len(ONE.data) // 100)
    assert steps == [
        "mkdir segments",
        f"mkdir {LOG}",
        f"fsync {tmp_path.name}",  # the entries of newly made folders
        "fsync segments",
        *writes,
        f"fsync {temporary}",
        "close",
        f"rename {temporary}",
        f"fsync {LOG}",
        *["close"] * 3,
    ]
    assert temporary.startswith(name)
    assert temporary.endswith(".tmp")


def test_a_crash_at_any_step_leaves_it_whole_or_absent_and_the_next_try_writes_it(tmp_path: Path):
    whole = Watched()
    write_file(tmp_path, ONE, whole.calls())
    assert whole.changes > 12
    for step in range(whole.changes):
        folder = tmp_path / f"crash-{step}"
        folder.mkdir()
        with pytest.raises(Crashed):
            write_file(folder, ONE, Watched(crash_before=step).calls())
        found = list(scan(folder))
        assert found in ([], [ONE.name])
        if found:
            assert seqs(folder) == [1, 2]
        retry = Watched()
        write_file(folder, ONE, retry.calls())
        assert seqs(folder) == [1, 2]
        assert f"fsync {LOG}" in retry.done  # also when the file was there already


def test_folders_whose_entries_a_crash_left_unsynced_are_synced_by_the_next_try(tmp_path: Path):
    log_folder(tmp_path).mkdir(parents=True)
    watched = Watched()
    write_file(tmp_path, ONE, watched.calls())
    synced = [step for step in watched.done if step.startswith("fsync")]
    assert synced[:2] == [f"fsync {tmp_path.name}", "fsync segments"]


def test_later_segments_of_a_log_cost_two_syncs(tmp_path: Path):
    write_file(tmp_path, ONE)
    watched = Watched()
    write_file(tmp_path, sealed(3, 4), watched.calls())
    assert sum(step.startswith("fsync") for step in watched.done) == 2


def test_writing_it_again_changes_nothing(tmp_path: Path):
    write_file(tmp_path, ONE)
    before = file_of(tmp_path).stat()
    again = write_file(tmp_path, ONE)
    assert (again.existed, again.displaced) == (True, None)
    assert file_of(tmp_path).stat() == before


@pytest.mark.parametrize("other", [b"", b"torn", sealed(1, 2, acknowledged_seq=9).data])
def test_what_else_had_its_name_is_kept_in_quarantine(tmp_path: Path, other: bytes):
    write_file(tmp_path, sealed(3, 4))
    file_of(tmp_path).write_bytes(other)
    written = write_file(tmp_path, ONE)
    assert written.displaced is not None
    assert (tmp_path / written.displaced).read_bytes() == other
    assert seqs(tmp_path) == [1, 2]


def test_a_file_that_is_replaced_is_there_at_every_step(tmp_path: Path):
    write_file(tmp_path, ONE)
    newer = sealed(1, 2, acknowledged_seq=9)
    whole = Watched()
    shutil.copytree(tmp_path, tmp_path / "whole")
    write_file(tmp_path / "whole", newer, whole.calls())
    for step in range(whole.changes):
        folder = tmp_path / f"crash-{step}"
        shutil.copytree(tmp_path / "segments", folder / "segments")
        with pytest.raises(Crashed):
            write_file(folder, newer, Watched(crash_before=step).calls())
        assert seqs(folder) == [1, 2]
        kept = (
            list((folder / "quarantine").glob("*.seg")) if (folder / "quarantine").exists() else []
        )
        old = file_of(folder).read_bytes() == ONE.data
        assert old or [path.read_bytes() for path in kept] == [ONE.data]


def test_a_disk_that_fails_leaves_no_temporary_file_and_nothing_open(tmp_path: Path):
    for what in ("write", "fsync", "rename"):
        folder = tmp_path / what
        folder.mkdir()
        write_file(folder, ONE)
        before = descriptors()

        def failing(*_args: object, **_kwargs: object) -> int:
            raise OSError(28, "No space left on device")

        calls = type(Watched().calls())(**{what: failing})
        with pytest.raises(OSError, match="No space"):
            write_file(folder, sealed(3, 4), calls)
        assert files(folder) == {str(ONE.name.path)}
        assert descriptors() <= before  # others may be closed meanwhile


def test_a_left_over_temporary_file_of_our_own_number_is_no_obstacle(tmp_path: Path):
    watched = Watched()
    write_file(tmp_path, ONE, watched.calls())
    temporary = next(step.split()[1] for step in watched.done if step.startswith("write"))
    file_of(tmp_path).unlink()
    (log_folder(tmp_path) / temporary).symlink_to(tmp_path / "outside")
    write_file(tmp_path, ONE)
    assert not (tmp_path / "outside").exists()
    assert seqs(tmp_path) == [1, 2]


# -- links and strangers --------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["segments", LOG])
def test_nothing_is_written_or_read_through_a_linked_folder(tmp_path: Path, level: str):
    outside = tmp_path / "outside"
    write_file(tmp_path, ONE)
    target = tmp_path / "segments" if level == "segments" else log_folder(tmp_path)
    target.rename(outside)
    target.symlink_to(outside)
    before = files(outside)
    with pytest.raises(SegmentCorrupt, match="link"):
        write_file(tmp_path, sealed(3, 4))
    assert fault(tmp_path) == "not_a_file"
    assert files(outside) == before
    [found] = scan(tmp_path)
    assert isinstance(found, Stranger)
    moved = quarantine(tmp_path, found.path)
    assert (tmp_path / moved).is_symlink()
    assert files(outside) == before
    write_file(tmp_path, ONE)
    assert seqs(tmp_path) == [1, 2]


def test_a_linked_file_is_not_read_and_not_written_through(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_bytes(ONE.data)
    log_folder(tmp_path).mkdir(parents=True)
    file_of(tmp_path).symlink_to(outside)
    assert fault(tmp_path) == "not_a_file"
    assert list(scan(tmp_path)) == [Stranger(ONE.name.path, "a link in place of a file")]
    written = write_file(tmp_path, ONE)
    assert outside.read_bytes() == ONE.data
    assert not file_of(tmp_path).is_symlink()
    assert written.displaced is not None
    assert (tmp_path / written.displaced).is_symlink()


def test_a_pipe_or_socket_in_place_of_a_file_blocks_nobody(tmp_path: Path):
    log_folder(tmp_path).mkdir(parents=True)
    os.mkfifo(file_of(tmp_path))
    assert fault(tmp_path) == "not_a_file"
    other = name_of(3, 4)
    server = socket.socket(socket.AF_UNIX)
    where = os.getcwd()
    os.chdir(log_folder(tmp_path))  # a socket's path is short
    try:
        server.bind(other.file_name)
    finally:
        os.chdir(where)
        server.close()
    assert fault(tmp_path, other) == "not_a_file"
    assert [type(item) for item in scan(tmp_path)] == [Stranger, Stranger]


def test_a_folder_in_place_of_a_file_is_a_stranger_and_makes_room(tmp_path: Path):
    file_of(tmp_path).mkdir(parents=True)
    assert fault(tmp_path) == "not_a_file"
    assert list(scan(tmp_path)) == [Stranger(ONE.name.path, "a folder in place of a file")]
    write_file(tmp_path, ONE)
    assert seqs(tmp_path) == [1, 2]


def test_an_endless_file_is_read_up_to_the_limit(tmp_path: Path):
    log_folder(tmp_path).mkdir(parents=True)
    with open(file_of(tmp_path), "wb") as file:
        file.truncate(10 * 1024**3)  # sparse
    assert fault(tmp_path) == "too_large"


def test_strangers_are_told_and_temporary_files_are_left_out(tmp_path: Path):
    write_file(tmp_path, ONE)
    (tmp_path / "segments" / "README").write_text("x")
    (tmp_path / "segments" / "not-a-log").mkdir()
    (log_folder(tmp_path) / "1-2.seg").write_text("x")
    (log_folder(tmp_path) / "x.tmp").write_text("x")
    (tmp_path / "segments" / "x.tmp").mkdir()
    (log_folder(tmp_path) / os.fsdecode(b"\xff")).write_text("x")
    found = list(scan(tmp_path))
    assert [item for item in found if isinstance(item, SegmentName)] == [ONE.name]
    strangers = {item.path.name: item.reason for item in found if isinstance(item, Stranger)}
    assert strangers == {
        "README": "a file in place of a folder",
        "not-a-log": "no log_id is spelt so",
        "1-2.seg": "no segment is called so",
        os.fsdecode(b"\xff"): "no segment is called so",
    }
    for item in found:
        if isinstance(item, Stranger):
            quarantine(tmp_path, item.path)
    assert list(scan(tmp_path)) == [ONE.name]


def test_a_logs_folder_that_becomes_a_file_while_others_are_listed_is_a_stranger(tmp_path: Path):
    write_file(tmp_path, ONE)
    write_file(tmp_path, sealed(1, 1, OTHER_LOG))
    found = scan(tmp_path)
    assert next(found) == ONE.name
    folder = tmp_path / "segments" / OTHER_LOG
    shutil.rmtree(folder)
    folder.write_text("x")
    [stranger] = found
    assert stranger == Stranger(
        PurePosixPath("segments", OTHER_LOG), "a link or file in place of a folder"
    )


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path):
    assert list(scan(tmp_path)) == []
    assert list(scan(tmp_path / "absent")) == []


def test_segments_come_by_log_and_first_seq(tmp_path: Path):
    for first, last, log_id in [(11, 12, LOG), (1, 1, OTHER_LOG), (2, 10, LOG), (1, 1, LOG)]:
        write_file(tmp_path, sealed(first, last, log_id))
    assert list(scan(tmp_path)) == [
        name_of(1, 1),
        name_of(2, 10),
        name_of(11, 12),
        name_of(1, 1, OTHER_LOG),
    ]


def test_ten_thousand_segments_are_listed_with_nothing_open_between_two(tmp_path: Path):
    write_file(tmp_path, ONE)
    for number in range(10, 10_009):
        (log_folder(tmp_path) / name_of(number, number).file_name).touch()
    before = descriptors()
    count = 0
    for _ in scan(tmp_path):
        count += 1
        if count in (1, 5_000):
            assert descriptors() <= before  # others may be closed meanwhile
    assert count == 10_000


def test_reading_leaves_nothing_open(tmp_path: Path):
    write_file(tmp_path, ONE)
    file_of(tmp_path, sealed(3, 4)).write_bytes(b"torn")
    before = descriptors()
    seqs(tmp_path)
    fault(tmp_path, name_of(3, 4))
    with pytest.raises(FileNotFoundError):
        load(tmp_path, name_of(5, 6), [KEY], environment="prod")
    assert descriptors() <= before  # others may be closed meanwhile
