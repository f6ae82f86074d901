"""A machine in trouble, on real files: a pinned log, a slow disk, no descriptors, a cut log."""

from __future__ import annotations

import logging
import os
import resource
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from local_store import BufferFull, LocalStore, LocalStoreError
from local_store.clock import SystemClock
from local_store.opening import WAL_BYTES_KEPT
from local_store.write_ahead import PINNED_PAGES_MAX
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting

DEADLINE_S = 30
PAGE_BYTES = 4_096
TEXT = "x" * 60_000  # 15 pages


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def wal_bytes(folder: Path) -> int:
    return (folder / "buffer.db-wal").stat().st_size


def test_a_long_reader_is_told_of_once_stops_no_write_and_leaves_a_short_log_behind(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    add(store, text="before")
    writes = PINNED_PAGES_MAX // 15 + 150
    with caplog.at_level(logging.WARNING, "local_store"):
        with closing(sqlite3.connect(tmp_path / "buffer.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM op_log").fetchone() == (1,)
            for n in range(writes):
                add(store, text=f"{n}{TEXT}")
            assert reader.execute("SELECT count(*) FROM op_log").fetchone() == (1,)  # still pinned
        assert [record.name for record in caplog.records] == ["local_store.write_ahead"]
        assert wal_bytes(tmp_path) > PINNED_PAGES_MAX * PAGE_BYTES > WAL_BYTES_KEPT
        for n in range(150):  # the next checkpoint is whole, and the commit after it begins anew
            add(store, text=f"{n}{TEXT}")
    assert len(caplog.records) == 1
    assert wal_bytes(tmp_path) <= WAL_BYTES_KEPT
    assert store.stats()["last_seq"] == 1 + writes + 150


def test_a_disk_that_syncs_for_half_a_second_is_shared_by_all_and_waited_for_by_no_reader(
    tmp_path: Path,
):
    clock = SystemClock()
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store, text="before")
        assert len(waiting(store)) == 1  # listed, so that a read needs nothing but the file
        before = disk.count("sync", "-wal")
        slow = disk.slow_sync(0.5, "-wal")
        together = threading.Barrier(33)

        def write() -> None:
            together.wait(DEADLINE_S)
            add(store)

        began = clock.monotonic()
        threads = [threading.Thread(target=write) for _ in range(32)]
        for thread in threads:
            thread.start()
        together.wait(DEADLINE_S)
        while not slow.met:
            threads[0].join(0.001)
        assert store.select("notes", user_id=USER)[0]["text"] == "before"
        assert disk.count("sync", "-wal") == before  # the first is still under way
        for thread in threads:
            thread.join(DEADLINE_S)
        assert disk.count("sync", "-wal") - before <= 4  # and not 32
        assert clock.monotonic() - began < 8
        slow.release()
        assert store.stats()["last_seq"] == 33


@pytest.mark.parametrize("damage", ["cut", "zeroed", "deleted"])
def test_a_write_ahead_log_that_lost_its_end_is_counted_and_no_seq_is_given_twice(
    tmp_path: Path, damage: str
):
    store = LocalStore.open(tmp_path, tables=TABLES)
    for n in range(10):
        add(store, text=str(n))
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    log_id = store.log_id
    store.close()
    log = bytearray(content["buffer.db-wal"])
    kept = 32 + 5 * (24 + PAGE_BYTES) - 100  # its head and five frames, the last one torn
    if damage == "cut":
        del log[kept:]
    elif damage == "zeroed":
        log[kept:] = bytes(len(log) - kept)
    else:
        log.clear()
    for name, found in {**content, "buffer.db-wal": bytes(log)}.items():
        (tmp_path / name).write_bytes(found)  # in place: the file keeps its identity
    (tmp_path / "buffer.db-shm").unlink()
    with LocalStore.open(tmp_path, tables=TABLES) as again:
        left = {txn.seq for txn in waiting(again)}
        assert left == set(range(1, len(left) + 1))
        assert (again.damage()["lost"], len(left) < 10) == (10 - len(left), True)
        assert again.log_id != log_id
        add(again, text="after")
        assert again.stats()["last_seq"] == 1


def test_without_descriptors_an_open_store_goes_on_and_a_new_one_is_a_clean_error(
    store: LocalStore, tmp_path: Path
):
    add(store)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        add(store)
        assert store.stats()["last_seq"] == 2
        with pytest.raises((OSError, LocalStoreError)):
            LocalStore.open(tmp_path / "another", tables=TABLES)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    add(store)
    assert [txn.seq for txn in waiting(store)] == [1, 2, 3]
    with LocalStore.open(tmp_path / "another", tables=TABLES) as another:
        assert add(another)


def test_a_full_disk_at_a_start_reads_what_is_there_and_takes_more_when_space_returns(
    tmp_path: Path,
):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store, text="kept")
    with DiskFaults(tmp_path) as disk:
        with disk.full(), suppress(BufferFull):
            with LocalStore.open(tmp_path, tables=TABLES) as store:
                assert store.get("notes", row_id, user_id=USER)
                with pytest.raises(BufferFull):
                    add(store)
        with LocalStore.open(tmp_path, tables=TABLES) as store:
            add(store)
            assert [txn.seq for txn in waiting(store)] == [1, 2]
