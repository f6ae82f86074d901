"""What the buffer lets go, what it copies, and what older and newer code make of its content."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_store import (
    BufferFull,
    Delete,
    Insert,
    LocalStore,
    SchemaTooNew,
    Update,
    VersionMismatch,
)
from local_store.clock import ManualClock, new_id
from local_store.high_water import HighWater
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(
        tmp_path, tables=TABLES, clock=clock, settled_retention_s=60, cache_bytes_max=20_000
    ) as opened:
        yield opened


def tidy(store: LocalStore) -> None:
    while store.tidy():
        pass


def test_settled_transactions_are_kept_their_time_and_then_let_go(
    store: LocalStore, clock: ManualClock
):
    ids = [add(store, text=str(n)) for n in range(10)]
    settle_all(store)
    add(store, text="pending")
    clock.advance(59)
    assert store.tidy() == 0
    clock.advance(2)
    tidy(store)
    assert [entry.seq for entry in store.entries()] == [11]
    assert store.stats()["pending"] == 1
    assert store.get("notes", ids[0], user_id=USER)["text"] == "0"  # the rows stay
    assert store.write([Insert("notes", {})], user_id=USER).seq == 12


def test_the_newest_record_stays_so_that_no_seq_is_given_out_twice(
    store: LocalStore, clock: ManualClock
):
    for _ in range(5):
        add(store)
    settle_all(store)
    clock.advance(61)
    tidy(store)
    assert store.write([Insert("notes", {})], user_id=USER).seq == 6


def test_above_the_files_limit_the_oldest_settled_go_before_their_time(
    tmp_path: Path, clock: ManualClock
):
    limits: dict[str, Any] = {"file_bytes_max": 400_000, "settled_retention_s": 1e6}
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock, **limits) as store:
        for n in range(100):
            add(store, text=f"{n}" + "x" * 4_000)
        settle_all(store)
        tidy(store)
        left = [entry.seq for entry in store.entries()]
        assert 0 < len(left) < 100
        assert left[-1] == 100


def test_a_deleted_row_is_known_to_be_deleted_as_long_as_its_transaction(
    store: LocalStore, clock: ManualClock
):
    row_id = add(store, text="a")
    settle_all(store)
    store.write([Delete("notes", row_id)], user_id=USER)
    settle_all(store)
    add(store)
    assert store.is_held("notes", row_id, user_id=USER)
    clock.advance(61)
    tidy(store)
    assert not store.is_held("notes", row_id, user_id=USER)


def test_clean_rows_above_the_limit_go_least_recently_changed_first(store: LocalStore):
    ids = []
    for n in range(30):
        ids.append(add(store, text=f"{n}" + "x" * 1_000))
        settle_all(store)
    kept = add(store, text="pending" + "x" * 1_000)
    tidy(store)
    found = [row["id"] for row in store.select("notes", user_id=USER)]
    assert found == [*ids[-(len(found) - 1) :], kept]
    assert 5 < len(found) < 20


def test_a_row_that_was_let_go_never_gets_a_version_that_it_had(store: LocalStore):
    row_id = add(store, text="0")
    for n in range(1, 4):
        store.write([Update("notes", row_id, {"text": str(n)})], user_id=USER)
    settle_all(store)
    seen = store.get("notes", row_id, user_id=USER)
    for n in range(30):
        add(store, text=f"{n}" + "x" * 1_000)
    settle_all(store)
    tidy(store)
    assert store.get("notes", row_id, user_id=USER) is None
    served = {"id": row_id, "user_id": USER, "updated_at": "v9", "text": "theirs"}
    as_of = store.change_counter()
    store.refresh("notes", [served], user_id=USER, as_of=as_of, where={"id": row_id})
    with pytest.raises(VersionMismatch):
        store.write(
            [Update("notes", row_id, {"text": "x"}, expected_version=seen["_version"])],
            user_id=USER,
        )


def test_with_little_room_left_writes_are_refused_and_the_rest_goes_on(
    tmp_path: Path, clock: ManualClock
):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store)
    with LocalStore.open(tmp_path, tables=TABLES, free_bytes_min=2**62) as store:
        with pytest.raises(BufferFull, match="free on the disk"):
            add(store)
        assert store.get("notes", row_id, user_id=USER)
        settle_all(store)
        assert store.stats()["pending"] == 0


def test_a_full_disk_is_drained_with_the_ballasts_room(tmp_path: Path):
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        ballast = tmp_path / "ballast"
        assert ballast.stat().st_size == 1024 * 1024
        for _ in range(3):
            add(store)
        transactions = waiting(store)
        rule = disk.fail_write("-wal", times=1, code=13)  # SQLITE_FULL, until the ballast is gone
        settle_all(store)
        assert rule.fired == 1
        assert store.stats()["pending"] == 0
        assert len(transactions) == 3
        assert ballast.stat().st_size == 0
    with LocalStore.open(tmp_path, tables=TABLES):
        assert ballast.stat().st_size == 1024 * 1024  # there is room again


def test_a_backup_under_load_is_one_consistent_state(tmp_path: Path):
    with LocalStore.open(tmp_path / "live", tables=TABLES) as store:
        parent = add(store, text="parent")
        stop = threading.Event()

        def writing() -> None:
            while not stop.is_set():
                store.write(
                    [
                        Update("notes", parent, {"text": new_id()}),
                        Insert("comments", {"note_id": parent}),
                    ],
                    user_id=USER,
                )

        thread = threading.Thread(target=writing)
        thread.start()
        try:
            for number in range(5):
                (tmp_path / str(number)).mkdir()
                store.backup(tmp_path / str(number) / "buffer.db")
        finally:
            stop.set()
            thread.join(30)
        log_id = store.log_id
        with pytest.raises(FileExistsError):
            store.backup(tmp_path / "0" / "buffer.db")
    for number in range(5):
        assert os.stat(tmp_path / str(number) / "buffer.db").st_mode & 0o777 == 0o600
        with LocalStore.open(tmp_path / str(number), tables=TABLES) as copy:
            log = copy.undelivered(limit=100_000)
            assert [txn.seq for txn in log] == list(range(1, len(log) + 1))
            comments = copy.select("comments", user_id=USER, limit=100_000)
            assert len(comments) == len(log) - 1
            assert {txn.log_id for txn in log} == {log_id}
            assert copy.log_id != log_id


def shout(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "text": row["text"].upper()} if row.get("text") else row


NEWER = [replace(TABLES[0], schema_version=2, upcasts={1: shout}), *TABLES[1:]]


def test_queued_changes_and_rows_of_an_older_schema_are_up_cast(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        clean = add(store, text="clean")
        settle_all(store)
        queued = add(store, text="queued")
        store.write([Update("notes", clean, {"text": "changed"})], user_id=USER)
        digests = [txn.digest for txn in waiting(store)]
    with LocalStore.open(tmp_path, tables=NEWER) as store:
        first, second = waiting(store)
        assert first.ops[0].values["text"] == "QUEUED"
        assert second.ops[0].values["text"] == "CHANGED"
        assert second.before == ({"text": "CLEAN"},)
        assert [first.digest, second.digest] == digests  # one content, however it is written
        assert store.get("notes", queued, user_id=USER)["text"] == "QUEUED"
        assert store.get("notes", clean, user_id=USER)["text"] == "CHANGED"
        add(store, text="as it is")
    with LocalStore.open(tmp_path, tables=NEWER) as store:
        assert waiting(store)[-1].ops[0].values["text"] == "as it is"


def test_older_code_refuses_the_file_of_newer_code(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=NEWER) as store:
        add(store, text="a")
    with pytest.raises(SchemaTooNew, match="notes 2"):
        LocalStore.open(tmp_path, tables=TABLES)
    with LocalStore.open(tmp_path, tables=NEWER) as store:
        assert len(waiting(store)) == 1


def test_a_missing_up_cast_is_named(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    with pytest.raises(ValueError, match=r"notes\.upcasts: no function for version 1"):
        LocalStore.open(tmp_path, tables=[replace(TABLES[0], schema_version=2), *TABLES[1:]])


def test_the_write_ahead_log_is_bounded(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for n in range(400):
            add(store, text=f"{n}" + "x" * 40_000)
        assert (tmp_path / "buffer.db-wal").stat().st_size < 12 * 1024 * 1024


def test_when_all_clean_rows_are_gone_what_is_pending_stays_above_the_limit(store: LocalStore):
    clean = [add(store, text="x" * 1_000) for _ in range(3)]
    kept = [add(store, text="y" * 10_000) for _ in range(3)]
    settle_all(store)
    for row_id in kept:
        store.write([Update("notes", row_id, {"number": 1})], user_id=USER)
    assert store.tidy() == len(clean)
    assert [row["id"] for row in store.select("notes", user_id=USER)] == kept
    assert store.tidy() == 0
    assert [row["id"] for row in store.select("notes", user_id=USER)] == kept


def test_a_mark_that_comes_behind_the_end_leaves_the_last_one(tmp_path: Path):
    mark, log_id = HighWater(tmp_path), new_id()
    mark.write(log_id, 1)
    mark.close()
    mark.write(log_id, 2)
    assert HighWater(tmp_path).read() == (log_id, 1)
