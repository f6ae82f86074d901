"""The buffer file when the disk fails at an odd moment: opening, a change, a backup."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import orjson
import pytest

from local_store import BufferFull, CommitUnknown, DiskFailed, LocalStore, StoreCorrupt
from local_store.ops import user_uuid
from syncer.testkit.disk_faults import DiskFaults, Step
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting
from tests.unit.test_disk_faults import exit_status

PAGE_BYTES = 4_096
FILES = ("buffer.db", "buffer.db-wal", "buffer.db-shm")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskFaults]:
    with DiskFaults(tmp_path) as faults:
        yield faults


@pytest.fixture
def store(tmp_path: Path, disk: DiskFaults) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def opened_files() -> list[str]:
    folder = "/proc/self/fd"
    paths = [Path(folder, name) for name in os.listdir(folder)]
    return sorted(os.readlink(path) for path in paths if path.is_symlink())  # listing opened one


def test_a_change_whose_commit_fails_is_unknown_by_its_name_and_can_be_repeated(
    store: LocalStore, disk: DiskFaults
):
    add(store)
    log_id = store.log_id
    disk.fail_sync("-wal")
    with pytest.raises(CommitUnknown, match="disk failed while a new log was committed"):
        store.start_new_log()
    known = store.log_id  # either is right: it is unknown
    assert store.start_new_log() not in (log_id, known)
    assert add(store)
    assert store.stats()["pending"] == 2


def test_a_reply_that_can_not_be_written_down_is_unknown_and_recorded_by_the_next_attempt(
    store: LocalStore, disk: DiskFaults
):
    add(store)
    [txn] = waiting(store)
    disk.fail_write("-wal")
    with pytest.raises(CommitUnknown, match="a recorded reply"):
        settle_all(store)
    settle_all(store)
    assert store.state(txn.txn_id) == "applied"
    before = disk.count("sync", "-wal")
    add(store)
    assert disk.count("sync", "-wal") == before + 1


def test_a_reply_recorded_in_a_file_that_was_unlinked_stands_in_the_one_that_is_put_back(
    store: LocalStore, tmp_path: Path
):
    row_id = add(store, text="a")
    [txn] = waiting(store)
    for name in FILES:
        (tmp_path / name).unlink()
    settle_all(store, "v1")
    store.close()
    with LocalStore.open(tmp_path, tables=TABLES) as again:
        assert again.state(txn.txn_id) == "applied"
        assert again.get("notes", row_id, user_id=USER)["updated_at"] == "v1"


def test_a_large_write_into_an_unlinked_file_leaves_nothing_to_move_into_it(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name in FILES:
        (tmp_path / name).unlink()
    with caplog.at_level(logging.ERROR, "local_store"):
        row_id = add(store, text="x" * 4_100_000)  # more pages than are left in the log
    assert not caplog.records
    assert len(store.get("notes", row_id, user_id=USER)["text"]) == 4_100_000


def test_a_start_whose_reader_finds_no_descriptor_leaves_nothing_open(
    tmp_path: Path, disk: DiskFaults
):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    before = opened_files()
    disk.fail_open("buffer.db", nth=2)
    with pytest.raises(DiskFailed, match="unable to open"):
        LocalStore.open(tmp_path, tables=TABLES)
    assert opened_files() == before
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert len(waiting(store)) == 1


@pytest.mark.parametrize("fault", ["write", "sync"])
def test_a_backup_that_fails_leaves_nothing_and_can_be_repeated(
    store: LocalStore, disk: DiskFaults, tmp_path: Path, fault: str
):
    add(store)
    target = tmp_path / "copies" / "buffer.db"
    target.parent.mkdir()
    rule = (disk.fail_write if fault == "write" else disk.fail_sync)(".part")
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        store.backup(target)
    assert rule.fired == 1
    assert list(target.parent.iterdir()) == []
    store.backup(target)
    with LocalStore.open(target.parent, tables=TABLES) as copy:
        assert len(waiting(copy)) == 1


def test_a_backup_of_an_unsound_file_is_refused_and_leaves_nothing(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        settle_all(store)
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'rows_of_user'"
        ).fetchone()
    author = user_uuid(USER).encode()
    with open(tmp_path / "buffer.db", "r+b") as file:  # an entry of an index names another author
        file.seek((root - 1) * PAGE_BYTES)
        page = file.read(PAGE_BYTES)
        assert page.count(author) == 1
        file.seek((root - 1) * PAGE_BYTES)
        file.write(page.replace(author, author[::-1]))
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        target = tmp_path / "copies" / "buffer.db"
        target.parent.mkdir()
        with pytest.raises(StoreCorrupt, match="index rows_of_user"):
            store.backup(target)
        assert list(target.parent.iterdir()) == []


# -- carrying over --------------------------------------------------------------------------------

TEXTS = {f"{n} " + "x" * 3_000 for n in range(9)}


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Path]:
    """Return what makes a folder whose buffer file has lost its header."""
    original = tmp_path / "original"
    with LocalStore.open(original, tables=TABLES) as store:
        for text in TEXTS:
            add(store, text=text)
    with open(original / "buffer.db", "r+b") as file:
        file.write(bytes(100))

    def copied(name: str) -> Path:
        return Path(shutil.copytree(original, tmp_path / name))

    return copied


def check_carried_over(folder: Path) -> None:
    with LocalStore.open(folder, tables=TABLES) as store:
        assert {row["text"] for row in store.select("notes", user_id=USER)} == TEXTS
        assert store.stats()["pending"] == len(TEXTS)
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1"]}
        add(store)
    left = {path.name for path in (folder / "quarantine" / "1").iterdir()}
    assert left <= {*FILES, "report.json"}


@pytest.mark.parametrize("kind", ["open", "write", "sync"])
def test_a_disk_that_fails_at_any_step_of_carrying_over_leaves_it_to_the_next_start(
    damaged: Callable[[str], Path], kind: str
):
    refused = 0
    for nth in count(1, 5 if kind == "write" else 1):  # of about 200 writes
        folder = damaged(f"{kind}-{nth}")
        with DiskFaults(folder) as disk:
            rule = getattr(disk, f"fail_{kind}")(nth=nth)
            try:
                LocalStore.open(folder, tables=TABLES).close()
            except DiskFailed:
                refused += 1
        check_carried_over(folder)
        if not rule.fired:
            break
    assert refused > 1


def test_a_full_disk_leaves_a_damaged_file_to_the_first_start_that_has_room(
    damaged: Callable[[str], Path],
):
    folder = damaged("full")
    with DiskFaults(folder) as disk, disk.full():
        for _ in range(2):
            with pytest.raises(BufferFull):
                LocalStore.open(folder, tables=TABLES)
    check_carried_over(folder)


@pytest.mark.parametrize("step", ["before write", "before sync"])
def test_a_process_that_dies_while_carrying_over_leaves_it_to_the_next(
    damaged: Callable[[str], Path], step: Step
):
    for nth in count(1, 11):
        folder = damaged(f"{nth}")

        def child(folder: Path = folder, nth: int = nth) -> None:
            with DiskFaults(folder) as disk:
                disk.kill_at(step, nth=nth)
                LocalStore.open(folder, tables=TABLES)

        status = exit_status(child)
        check_carried_over(folder)
        if status != -signal.SIGKILL:
            assert status == 0
            break
    assert nth > 1


@pytest.mark.parametrize("moved", [["-shm"], ["-shm", "-wal"], ["-shm", "-wal", ""]])
def test_a_file_that_was_moved_aside_in_part_is_followed_by_the_rest(
    damaged: Callable[[str], Path], moved: list[str]
):
    folder = damaged("partly")
    (folder / "buffer.db-wal").touch()
    (folder / "buffer.db-shm").touch()
    aside = folder / "quarantine" / "1"
    aside.mkdir(parents=True)
    (aside / "unfinished").touch()
    for suffix in moved:
        (folder / f"buffer.db{suffix}").rename(aside / f"buffer.db{suffix}")
    check_carried_over(folder)


def page_of(folder: Path, table: str) -> int:
    """Return where the first page of a table stands in the closed file."""
    with closing(sqlite3.connect(folder / "buffer.db")) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (root,) = connection.execute(query, (table,)).fetchone()
    return (int(root) - 1) * PAGE_BYTES


def test_each_damaged_file_has_a_folder_of_its_own_in_the_quarantine(
    damaged: Callable[[str], Path],
):
    folder = damaged("twice")
    LocalStore.open(folder, tables=TABLES).close()
    with open(folder / "buffer.db", "r+b") as file:
        file.write(bytes(100))
    with LocalStore.open(folder, tables=TABLES) as store:
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1", "2"]}
        assert {row["text"] for row in store.select("notes", user_id=USER)} == TEXTS


def test_a_copy_of_a_row_that_is_damaged_is_not_carried_over(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        good, bad = add(store, text="right"), add(store, text="wrong")
        settle_all(store)
    content = (tmp_path / "buffer.db").read_bytes()
    at = page_of(tmp_path, "rows")
    page = content[at : at + PAGE_BYTES].replace(b"wrong", b"wrXng")
    (tmp_path / "buffer.db").write_bytes(bytes(100) + content[100:at] + page + content[at + 4096 :])
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [row["id"] for row in store.select("notes", user_id=USER)] == [good]
        assert not store.is_held("notes", bad, user_id=USER)  # the next read brings it
        assert store.damage()["files"] == ["1"]


def test_records_that_damage_put_out_of_order_are_walked_through_once(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store) for _ in range(3)]
    content = bytearray((tmp_path / "buffer.db").read_bytes())
    at = page_of(tmp_path, "op_log")
    (cell,) = struct.unpack_from(">H", content, at + 8 + 2 * 2)  # of the third record
    assert (content[at + cell] > 127, content[at + cell + 2]) == (True, 3)  # two bytes, its number
    content[at + cell + 2] = 0
    (tmp_path / "buffer.db").write_bytes(bytes(100) + content[100:])
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in waiting(store)] == ids[:2]
        assert store.damage()["files"] == ["1"]


def test_behind_the_last_readable_record_the_search_ends(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store, text="x" * 3_000) for _ in range(30)]
    content = (tmp_path / "buffer.db").read_bytes()
    at = page_of(tmp_path, "op_log")
    (last,) = struct.unpack_from(">I", content, at + 8)  # the page of the newest records
    at = (last - 1) * PAGE_BYTES
    destroyed = content[100:at] + bytes(PAGE_BYTES) + content[at + PAGE_BYTES :]
    (tmp_path / "buffer.db").write_bytes(bytes(100) + destroyed)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        found = [txn.ops[0].id for txn in waiting(store)]
        assert found == ids[: len(found)]
        assert 20 < len(found) < 30
        assert store.damage() == {"quarantined": 0, "lost": 30 - len(found), "files": ["1"]}


def test_a_newest_record_that_lost_its_number_in_use_is_set_aside_with_its_file(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    content = bytearray((tmp_path / "buffer.db").read_bytes())
    at = page_of(tmp_path, "op_log")
    (cell,) = struct.unpack_from(">H", content, at + 8)
    header = at + cell + 3  # behind the record's size and number: how long, then a type per column
    one = 9  # the type that stands for the number 1, of the log and of the seq
    assert content[header + 2 : header + 4] == bytes([one, one])
    content[header + 3] = 0  # nothing
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        with open(tmp_path / "buffer.db", "r+b") as file:
            file.seek(at)
            file.write(content[at : at + PAGE_BYTES])
        assert store.change_counter() > 0
        assert store.damage()["files"] == ["1"]
        assert waiting(store) == []
        log_id = store.log_id
        add(store)
        assert [(txn.log_id, txn.seq) for txn in waiting(store)] == [(log_id, 1)]
    report = orjson.loads((tmp_path / "quarantine" / "1" / "report.json").read_bytes())
    assert (report["records"], report["damaged"]) == (0, 1)


@pytest.mark.parametrize("lost", ["an index", "a page"])
def test_a_file_that_opens_and_is_not_what_was_made_is_carried_over(tmp_path: Path, lost: str):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store) for _ in range(3)]
    if lost == "an index":
        with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection:
            connection.execute("DROP INDEX rows_by_age")
    else:
        at = page_of(tmp_path, "logs")
        with open(tmp_path / "buffer.db", "r+b") as file:
            file.seek(at)
            file.write(bytes(PAGE_BYTES))
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in store.undelivered()] == ids
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1"]}
        add(store)
