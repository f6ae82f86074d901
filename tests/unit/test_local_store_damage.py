"""A damaged record, a damaged file, a lost end: set aside, counted, and the rest goes on."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import orjson
import pytest

from local_store import CommitUnknown, Insert, LocalStore, Update
from local_store.clock import ManualClock, new_id
from local_store.door import canonical_uuid
from local_store.schema import CONTENT, STATUS, seal
from syncer.testkit.disk_faults import flip_bits
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def sql(folder: Path, statement: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(folder / "buffer.db", isolation_level=None)) as connection:
        connection.create_function("seal", -1, seal, deterministic=True)
        return connection.execute(statement, values).fetchall()


def damage(folder: Path, statement: str) -> None:
    """Change a record as a disk would: behind the triggers that seal it."""
    triggers = sql(folder, "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    for name, _ in triggers:
        sql(folder, f"DROP TRIGGER {name}")
    sql(folder, statement)
    for _, definition in triggers:
        sql(folder, definition)


def texts(store: LocalStore) -> set[str]:
    return {row["text"] for row in store.select("notes", user_id=USER, limit=1_000)}


def test_every_single_bit_of_a_record_is_under_its_checksum(store: LocalStore, tmp_path: Path):
    add(store, text="é'🙂", body={"a": [1, None]})
    settle_all(store)  # so that the status is one that changed
    for columns, crc in ((CONTENT, "content_crc"), (STATUS, "status_crc")):
        names = [name.strip() for name in columns.split(",")]
        casts = ", ".join(f"CAST({name} AS BLOB)" for name in names)
        (record,) = sql(tmp_path, f"SELECT {casts} FROM op_log")
        ((stored,),) = sql(tmp_path, f"SELECT {crc} FROM op_log")
        assert seal(*record) == stored
        for number, value in enumerate(record):
            for bit in range(len(value or b"") * 8):
                damaged = bytearray(value)
                damaged[bit // 8] ^= 1 << bit % 8
                changed = [*record[:number], bytes(damaged), *record[number + 1 :]]
                assert seal(*changed) != stored, (names[number], bit)


@pytest.mark.parametrize(
    "change",
    [
        "ops = replace(ops, 'second', 'sXcond')",
        "txn_id = '00000000-0000-7000-8000-000000000000'",
        "state = 'applied'",
        "parked = 1",
        "seq = 99",
        "user_id = 'bad55555-d096-588d-8e1e-0ee7f3d7a711'",
        "before = '{'",
        "ops = CAST(x'ff00' AS TEXT)",
    ],
)
def test_a_damaged_record_is_set_aside_and_the_others_flow(tmp_path: Path, change: str):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for text in ("first", "second", "third"):
            add(store, text=text)
    damage(tmp_path, f"UPDATE op_log SET {change} WHERE position = 2")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.position for txn in waiting(store)] == [1, 3]
        assert texts(store) == {"first", "third"}
        assert store.damage()["quarantined"] == 1
        assert store.stats()["pending"] == 2
        settle_all(store)
        assert store.write([Insert("notes", {"text": "fourth"})], user_id=USER).seq == 4
    ((kept,),) = sql(tmp_path, "SELECT record FROM quarantine")
    assert bytes.fromhex(orjson.loads(kept)["position"]) == b"2"


def test_a_damaged_copy_of_a_row_is_dropped_and_comes_again(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id, other = add(store, text="right"), add(store, text="other")
        settle_all(store)
    damage(tmp_path, "UPDATE rows SET body = replace(body, 'right', 'wrong')")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert store.get("notes", row_id, user_id=USER) is None  # unknown here: read it again
        assert store.get("notes", other, user_id=USER)["text"] == "other"
        served = {"id": row_id, "user_id": USER, "updated_at": "v2", "text": "right"}
        store.refresh(
            "notes", [served], user_id=USER, as_of=store.change_counter(), where={"id": row_id}
        )
        assert store.get("notes", row_id, user_id=USER)["text"] == "right"


@pytest.mark.parametrize("table", ["touches", "turns", "names"])
def test_what_can_be_found_is_made_again_when_it_disagrees_with_the_log(tmp_path: Path, table: str):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store, text="a")
        store.write([Update("notes", row_id, {"text": "b"})], user_id=USER)
        assert len(waiting(store)) == 2
    sql(tmp_path, f"DELETE FROM {table} WHERE position = 2")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        if table == "turns":
            settle_all(store)  # the first; the second is missed when nothing else is left
        if table != "names":
            assert [txn.position for txn in waiting(store)][-1] == 2
            assert texts(store) == {"b"}


# The first two stopped it; the third had a new record set aside in place of a damaged one.
ONCE = (910, 1409, 386)
FLIPPED_FILES = int(os.environ.get("FLIPPED_FILES", "80"))


def test_flipped_bits_never_show_as_content_and_never_stop_the_buffer(tmp_path: Path):
    original = tmp_path / "original"
    numbers = (str(uuid.UUID(int=n)) for n in count(1))  # the same file each time, but its inode
    with LocalStore.open(
        original, tables=TABLES, clock=ManualClock(), ids=lambda: next(numbers)
    ) as store:
        written = [f"{n} " + "x" * 200 for n in range(40)]
        for text in written:
            add(store, text=text, id=next(numbers))
    image, folder = (original / "buffer.db").read_bytes(), tmp_path / "damaged"
    carried, lost = 0, 0
    for seed in [*range(FLIPPED_FILES), *ONCE]:
        folder.mkdir()
        (folder / "buffer.db").write_bytes(image)
        flip_bits(folder / "buffer.db", seed=seed, count=1 + seed % 20)
        with LocalStore.open(folder, tables=TABLES) as store:
            add(store, text="after")
            waiting(store)
            found = texts(store)
            assert "after" in found
            assert found <= {*written, "after"}
            damage = store.damage()
            assert len(found) == 41 or damage["quarantined"] or damage["files"]
        # A damaged page has nothing to tell of its records; each has room for nine.
        assert len(found) > 20, seed
        carried, lost = carried + len(damage["files"]), lost + 41 - len(found)
        shutil.rmtree(folder)
    print(f"{FLIPPED_FILES} files: {carried} carried over, {lost} of {40 * FLIPPED_FILES} lost")
    assert carried > FLIPPED_FILES // 8
    assert lost < 2 * FLIPPED_FILES


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\0" * 256])
def test_a_file_of_garbage_is_moved_aside_as_it_is(tmp_path: Path, content: bytes):
    (tmp_path / "buffer.db").write_bytes(content)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        assert store.damage()["files"] == ["1"]
    assert (tmp_path / "quarantine" / "1" / "buffer.db").read_bytes() == content
    assert (tmp_path / "quarantine").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("size", [100, 4_096])
def test_with_the_header_destroyed_every_record_is_carried_over(tmp_path: Path, size: int):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store, text=str(n)) for n in range(300)]
        settled = waiting(store)[0]
        log_id = store.log_id
    with open(tmp_path / "buffer.db", "r+b") as file:
        file.write(random.Random(1).randbytes(size))
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in waiting(store)] == ids
        assert {txn.log_id for txn in waiting(store)} == {log_id}
        assert waiting(store)[0] == settled
        assert texts(store) == {str(n) for n in range(300)}
        assert store.log_id != log_id  # what is new goes to a log of its own
        report = orjson.loads((tmp_path / "quarantine" / "1" / "report.json").read_bytes())
        assert (report["records"], report["damaged"]) == (300, 0)
        assert store.damage()["lost"] == 0


def test_with_the_names_of_the_logs_unreadable_the_mark_names_the_newest(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store, text=str(n)) for n in range(20)]
        log_id = store.log_id
    damage(tmp_path, "UPDATE logs SET log_id = CAST(x'ff' AS TEXT)")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in store.undelivered()] == ids
        assert {txn.log_id for txn in store.undelivered()} == {log_id}
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1"]}


def test_a_log_whose_name_turned_into_another_valid_one_gets_it_back_from_the_mark(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        ids = [add(store, text=str(n)) for n in range(3)]
        log_id = store.log_id
    flips = 0
    for bit in range(len(log_id) * 8):
        turned = bytearray(log_id.encode())
        turned[bit // 8] ^= 1 << bit % 8
        if canonical_uuid(turned.decode("latin-1")) is None:
            continue  # that it is damaged can be seen
        flips += 1
        sql(tmp_path, "UPDATE logs SET log_id = ?", turned.decode())
        with LocalStore.open(tmp_path, tables=TABLES) as store:
            assert store.log_id == log_id
            assert [txn.ops[0].id for txn in waiting(store)] == ids
            assert {txn.log_id for txn in waiting(store)} == {log_id}
            assert store.damage() == {"quarantined": 0, "lost": 0, "files": []}
    assert flips > 32
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert store.write([Insert("notes", {})], user_id=USER).seq == 4


def test_a_deleted_write_ahead_log_is_counted_as_loss_and_nothing_is_given_out_twice(
    tmp_path: Path,
):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        log_id = store.log_id
        for _ in range(3):
            add(store)
    live = LocalStore.open(tmp_path, tables=TABLES)
    for _ in range(5):
        add(live)
    saved = (tmp_path / "buffer.db").read_bytes()
    live.close()
    (tmp_path / "buffer.db").unlink()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"buffer.db{suffix}").unlink(missing_ok=True)
    with open(tmp_path / "buffer.db", "wb") as file:  # as it was, without the log of writes
        file.write(saved)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert store.damage()["lost"] == 5
        (older, *_) = store.logs()
        assert (older["log_id"], older["last_seq"]) == (log_id, 8)
        assert store.write([Insert("notes", {})], user_id=USER).seq == 1
        assert store.log_id != log_id
        assert len(waiting(store)) in (1, 3)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert store.damage()["lost"] == 5  # counted once


def test_a_deleted_buffer_is_remembered_by_how_far_it_came(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        log_id = store.log_id
        for _ in range(3):
            add(store)
    (tmp_path / "buffer.db").unlink()
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        (older, *_) = store.logs()
        assert (older["log_id"], older["last_seq"]) == (log_id, 3)
        assert store.damage()["lost"] == 3


def test_a_torn_mark_is_no_mark(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    (tmp_path / "acknowledged").write_bytes(b"x" * 28)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": []}
        assert add(store)


def test_a_file_unlinked_while_open_is_put_back_with_all_that_is_in_it(
    store: LocalStore, tmp_path: Path
):
    add(store, text="before")
    log_id = store.log_id
    for name in ("buffer.db", "buffer.db-wal", "buffer.db-shm"):
        (tmp_path / name).unlink()
    add(store, text="acknowledged")
    assert texts(store) == {"before", "acknowledged"}
    assert store.log_id != log_id
    add(store, text="after")
    store.close()
    with LocalStore.open(tmp_path, tables=TABLES) as again:
        assert texts(again) == {"before", "acknowledged", "after"}
        assert [txn.position for txn in again.undelivered()] == [1, 2, 3]


def test_a_file_that_was_replaced_acknowledges_nothing_and_both_are_kept(
    store: LocalStore, tmp_path: Path
):
    add(store, text="mine")
    other = tmp_path / "other"
    with LocalStore.open(other, tables=TABLES) as second:
        add(second, text="theirs")
    os.replace(other / "buffer.db", tmp_path / "buffer.db")
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"buffer.db{suffix}").unlink(missing_ok=True)
    txn_id = new_id()
    with pytest.raises(CommitUnknown, match="quarantine"):
        store.write([Insert("notes", {"text": "mine too"})], user_id=USER, txn_id=txn_id)
    store.write([Insert("notes", {"text": "mine too"})], user_id=USER, txn_id=txn_id)
    assert texts(store) == {"theirs", "mine too"}
    with closing(sqlite3.connect(tmp_path / "quarantine" / "1" / "buffer.db")) as kept:
        assert kept.execute("SELECT count(*) FROM op_log").fetchone() == (2,)
