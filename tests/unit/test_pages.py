"""Reading SQLite's pages without its tree: the same records as SQLite gives, and no stumbling."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from local_store import LocalStore, Update
from local_store.pages import PAGE_BYTES, Pages
from syncer.testkit.disk_faults import flip_bits
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting

KINDS = ["INTEGER", "INTEGER", "REAL", "TEXT"]
EDGES = [0, 1, 486, 487, 488, 489, 490, 4_043, 4_044, 4_045, 4_046, 4_047, 4_048, 8_136, 40_000]


def read(file: Path, kinds: list[str]) -> list[tuple]:
    with closing(Pages(file, Path(f"{file}-wal"))) as pages:
        return sorted(pages.records(kinds))


def numbers(dice: random.Random) -> Iterator[int]:
    for bits in range(64):
        for sign in (1, -1):
            yield sign * dice.getrandbits(bits)
    yield from (-(2**63), 2**63 - 1, 0, 1, -1, 127, 128, 2**56, -(2**56))


@pytest.mark.parametrize("wal", [True, False])
def test_what_is_read_from_pages_is_what_sqlite_reads(tmp_path: Path, wal: bool):
    dice, file = random.Random(7), tmp_path / "any.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {'WAL' if wal else 'DELETE'}")
        connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, a INTEGER, b REAL, c TEXT)")
        connection.execute("CREATE TABLE other (k INTEGER PRIMARY KEY, a INTEGER, b BLOB, c TEXT)")
        connection.execute("INSERT INTO other VALUES (1, 2, x'00', 'a blob')")
        connection.execute("CREATE TABLE few (k INTEGER PRIMARY KEY, a INTEGER)")
        connection.execute("INSERT INTO few VALUES (1, 2)")
        for number in {*numbers(dice)}:
            text = "é" * dice.choice(EDGES) if number % 3 else None
            real = dice.choice([None, 0.0, 1.0, -7.0, dice.random()])
            row = (number, dice.choice([None, number]), real, text)
            connection.execute("INSERT INTO t VALUES (?, ?, ?, ?)", row)
        for size in range(4_000, 4_100):  # every way in which a record just fits or doesn't
            connection.execute("INSERT INTO t (a, c) VALUES (1, ?)", ("x" * size,))
        assert Path(f"{file}-wal").exists() == wal
        expected = connection.execute("SELECT * FROM t ORDER BY k").fetchall()
        found = read(file, KINDS)
    assert found == expected
    assert [[type(v) for v in row] for row in found] == [[type(v) for v in row] for row in expected]


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, list[tuple], list[str]]:
    """A buffer with records in its file and in its log, and what SQLite reads of it."""
    folder = tmp_path / "buffer"
    with LocalStore.open(folder, tables=TABLES) as store:
        ids = [add(store, text="x" * dice) for dice in range(0, 9_000, 300)]
        settle_all(store)
    with LocalStore.open(folder, tables=TABLES) as store:
        for row_id in ids[::2]:
            store.write([Update("notes", row_id, {"text": "y" * 700})], user_id=USER)
        waiting(store)
        copy = tmp_path / "copy.db"
        for suffix in ("", "-wal"):
            shutil.copyfile(folder / f"buffer.db{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(folder / "buffer.db")) as connection:
            expected = connection.execute("SELECT * FROM op_log ORDER BY position").fetchall()
            shape = connection.execute("PRAGMA table_info(op_log)").fetchall()
    return copy, expected, [kind for _, _, kind, *_ in shape]


def test_a_buffers_records_are_read_with_their_newest_state(images):
    copy, expected, kinds = images
    assert read(copy, kinds) == expected
    assert {row[4] for row in expected} == {"applied", "pending"}


def test_a_damaged_frame_of_the_log_hides_no_other(images):
    """SQLite ends the log there; each frame can be told right or wrong by itself."""
    copy, expected, kinds = images
    wal = Path(f"{copy}-wal")
    original = wal.read_bytes()
    frames = (len(original) - 32) // (24 + PAGE_BYTES)
    for number in range(frames):
        damaged = bytearray(original)
        damaged[32 + number * (24 + PAGE_BYTES) + 24 + 2_000] ^= 4
        wal.write_bytes(damaged)
        found = read(copy, kinds)
        # Of what that frame held an older state is found, or nothing; of all else the newest.
        assert len(set(expected) - set(found)) <= 8
    for at in (32 + 9, 32 + 17):  # a frame's salt, its checksum
        damaged = bytearray(original)
        damaged[at] ^= 1
        wal.write_bytes(damaged)
        assert len(set(expected) - set(read(copy, kinds))) <= 16


def test_what_was_written_and_never_committed_is_not_read(images):
    copy, expected, kinds = images
    wal = Path(f"{copy}-wal")
    content = bytearray(wal.read_bytes())
    commits = [
        at
        for at in range(32, len(content), 24 + PAGE_BYTES)
        if struct.unpack_from(">I", content, at + 4)[0]
    ]
    states = []
    for earlier, later in zip(commits[-9:], commits[-8:], strict=False):
        wal.write_bytes(content[:later])  # a transaction without its last frame
        cut = read(copy, kinds)
        wal.write_bytes(content[: earlier + 24 + PAGE_BYTES])  # nor any of it
        assert read(copy, kinds) == cut
        states.append(cut)
    assert states[0] != expected


@pytest.mark.parametrize("header", [b"", b"no write-ahead log at all, none"])
def test_without_a_readable_log_the_file_alone_is_read(images, header: bytes):
    copy, expected, kinds = images
    Path(f"{copy}-wal").write_bytes(header)
    assert [row[0] for row in read(copy, kinds)] == [row[0] for row in expected][:30]
    copy.write_bytes(b"")
    assert read(copy, kinds) == []


def test_what_was_freed_is_left_out_as_long_as_the_list_of_it_can_be_read(tmp_path: Path):
    file = tmp_path / "any.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")  # as most builds of it have it
        connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, a INTEGER, b REAL, c TEXT)")
        connection.execute("CREATE TABLE u (k INTEGER PRIMARY KEY, a INTEGER, b REAL, c TEXT)")
        for table in "tu":
            for number in range(300):
                row = (number, number, 0.5, table * 100)
                connection.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", row)
        connection.execute("DROP TABLE t")
        kept = connection.execute("SELECT * FROM u").fetchall()
    assert read(file, KINDS) == kept
    content = bytearray(file.read_bytes())
    trunk = int.from_bytes(content[32:36], "big")
    broken = bytearray(content)
    broken[(trunk - 1) * PAGE_BYTES + 4] = 0xFF  # a list longer than a page
    file.write_bytes(broken)
    assert len(read(file, KINDS)) > len(kept)
    for first in (bytes(4), b"\xff" * 4):
        content[32:36] = first
        file.write_bytes(content)
        assert len(read(file, KINDS)) > len(kept)


@pytest.mark.parametrize("kind", [9, 13 + 2 * 40], ids=["a number", "more than there is"])
def test_a_record_whose_text_turned_into_something_else_is_passed_over(tmp_path: Path, kind: int):
    file = tmp_path / "any.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, a INTEGER, b REAL, c TEXT)")
        rows = [(number, number, 0.5, "text") for number in (1, 2, 3)]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
    content = bytearray(file.read_bytes())
    (cell,) = struct.unpack_from(">H", content, PAGE_BYTES + 8 + 2)  # of the second record
    text = PAGE_BYTES + cell + 6  # its size, its key, the header's length; then a type per column
    assert content[text] == 13 + 2 * len("text")
    content[text] = kind
    file.write_bytes(content)
    assert read(file, KINDS) == [rows[0], rows[2]]


class Counting(Pages):
    """Pages that count how many of them were read."""

    reads = 0

    def read(self, number: int) -> bytes:
        self.reads += 1
        return super().read(number)


def test_a_record_that_claims_to_be_larger_than_the_file_is_not_followed(tmp_path: Path):
    file = tmp_path / "any.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        for table in "tu":
            create = f"CREATE TABLE {table} (k INTEGER PRIMARY KEY, a INTEGER, b REAL, c TEXT)"
            connection.execute(create)
        rows = [(number, number, 0.5, "text") for number in (1, 2, 3)]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
    content = bytearray(file.read_bytes())
    page, cell, here = PAGE_BYTES, 100, 489  # the second record is put into the page's free space
    size = here + 10_000 * (PAGE_BYTES - 4)
    struct.pack_into(">H", content, page + 8 + 2, cell)
    varint = [0x80 | size >> shift & 0x7F for shift in (21, 14, 7)] + [size & 0x7F]
    content[page + cell : page + cell + 5] = bytes([*varint, 2])
    struct.pack_into(">I", content, page + cell + 5 + here, 3)  # it goes on in the third page
    struct.pack_into(">I", content, 2 * PAGE_BYTES, 3)  # and that one in itself
    file.write_bytes(content)
    with closing(Counting(file, Path(f"{file}-wal"))) as pages:
        assert sorted(pages.records(KINDS)) == [rows[0], rows[2]]
        assert pages.reads <= 2 * pages.count


def test_no_damage_makes_the_reader_stumble(images):
    copy, expected, kinds = images
    file, wal = copy.read_bytes(), Path(f"{copy}-wal").read_bytes()
    for seed in range(150):
        copy.write_bytes(file)
        Path(f"{copy}-wal").write_bytes(wal)
        flip_bits(copy, seed=seed, count=1 + seed % 200)
        flip_bits(Path(f"{copy}-wal"), seed=seed, count=seed % 5 + 1)
        found = read_all(copy, kinds)
        if seed < 10:
            assert len(found & set(expected)) > len(expected) // 2


def read_all(file: Path, kinds: list[str]) -> set[tuple]:
    with closing(Pages(file, Path(f"{file}-wal"))) as pages:
        return set(pages.records(kinds))
