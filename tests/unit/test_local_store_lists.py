"""Flipped bits in what only leads to records: lists, indexes, marks. They have no checksum.

A look may miss an own change then, and see the row as it was before it. Nothing else may happen:
no other content, nobody else's row, nothing that is never sent, no start that fails.
"""

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

import pytest

from local_store import LocalStore, Outcome, Update
from local_store.clock import ManualClock
from local_store.pages import PAGE_BYTES
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all, waiting

FLIPS = int(os.environ.get("FLIPPED_LISTS", "20"))  # in each tree of pages
LEADING = [
    "touches", "touches_position", "touches_of_parent", "touches_settled", "names", "places",
    "turns", "turns_by_position", "totals", "logs", "sqlite_autoindex_logs_1", "_sqlite_migrations",
    "sqlite_autoindex_rows_1", "rows_of_user", "rows_of_parent", "rows_by_age", "rows_by_creation",
    "op_log_held", "op_log_parked", "op_log_settled", "sqlite_autoindex_schemas_1", "schemas",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A buffer with rows of the server, changes of them, new rows, and somebody else's."""
    folder = tmp_path_factory.mktemp("lists") / "buffer"
    numbers = (str(uuid.UUID(int=n)) for n in count(1))  # the same file each time, but its inode

    def new(store: LocalStore, table: str = "notes", user: str = USER, **values: str) -> str:
        return add(store, table, user, id=next(numbers), **values)

    with LocalStore.open(
        folder, tables=TABLES, clock=ManualClock(), ids=lambda: next(numbers)
    ) as store:
        server = [new(store, text=f"server {n}") for n in range(3)]
        new(store, user=OTHER, text="foreign")
        settle_all(store)
        store.write([Update("notes", server[0], {"text": "mine 0"})], user_id=USER)
        own = [new(store, text=f"new {n}") for n in range(3)]
        new(store, "comments", note_id=server[1], text="child")
        store.write([Update("notes", own[0], {"text": "mine 1"})], user_id=USER)
        new(store, user=OTHER, text="foreign too")
        waiting(store)
    return folder


def used_bits(image: bytes, root: int) -> Iterator[tuple[int, int]]:
    """Yield every bit of a page of one tree that is in use; each tree has one page here."""
    start = (root - 1) * PAGE_BYTES
    cells = int.from_bytes(image[start + 3 : start + 5], "big")
    content = int.from_bytes(image[start + 5 : start + 7], "big") or PAGE_BYTES
    for at in (*range(8 + 2 * cells), *range(content, PAGE_BYTES)):
        yield from ((start + at, bit) for bit in range(8))


@pytest.mark.parametrize("tree", LEADING)
def test_a_flipped_bit_in_what_leads_to_records_shows_nothing_wrong_and_stops_nothing(
    folder: Path, tmp_path: Path, tree: str
):
    image = (folder / "buffer.db").read_bytes()
    with closing(sqlite3.connect(folder / "buffer.db")) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (tree,)
        ).fetchone()
    with LocalStore.open(folder, tables=TABLES) as store:
        due = {txn.txn_id for txn in waiting(store)}
        true = {row["id"]: row["text"] for row in store.select("notes", user_id=USER)}
        earlier = {row_id: {text, "server 0", "new 0"} for row_id, text in true.items()}
    bits = list(used_bits(image, root))
    random.Random(7).shuffle(bits)
    for place, bit in bits[:FLIPS]:
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        shutil.copyfile(folder / "acknowledged", damaged / "acknowledged")
        content = bytearray(image)
        content[place] ^= 1 << bit
        (damaged / "buffer.db").write_bytes(content)
        with LocalStore.open(damaged, tables=TABLES) as store:
            for row_id in true:
                row = store.get("notes", row_id, user_id=USER)
                assert row is None or row["text"] in earlier[row_id], (place, bit)
            for row in store.select("notes", user_id=USER):
                assert row["id"] not in true or row["text"] in earlier[row["id"]], (place, bit)
                assert "foreign" not in row["text"], (place, bit)
            add(store)
            sent: set[str] = set()
            for _ in range(6):  # the flusher's passes
                sent |= {txn.txn_id for txn in waiting(store)}
                settle_all(store)
            assert due < sent, (place, bit)
            assert store.stats()["pending"] == 0, (place, bit)
        shutil.rmtree(damaged)


def change(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "buffer.db", isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount == 1


@pytest.mark.parametrize("to", [2, 9])
def test_a_name_that_leads_elsewhere_settles_nobody_else(tmp_path: Path, to: int):
    """What the server said of one transaction, written down at another, would lose that one."""
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for _ in range(3):
            add(store)
        first, second, third = waiting(store)
    change(tmp_path, f"UPDATE names SET position = {to} WHERE txn_id = '{first.txn_id}'")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        store.record([Outcome(first.txn_id, "applied")])
        assert [store.state(txn.txn_id) for txn in (first, second, third)] == [
            "applied", "pending", "pending"
        ]  # fmt: skip
        assert [txn.txn_id for txn in waiting(store)] == [second.txn_id, third.txn_id]


@pytest.mark.parametrize("changed", ["log = 9", "user_id = 'x'", "due_at = 9e18", "position = 99"])
def test_a_turn_that_leads_nowhere_is_made_again_when_nothing_else_is_left(
    tmp_path: Path, changed: str
):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for _ in range(3):
            add(store)
        waiting(store)
    change(tmp_path, f"UPDATE turns SET {changed} WHERE position = 2")
    sent: set[int] = set()
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for _ in range(4):
            sent |= {txn.position for txn in waiting(store)}
            settle_all(store)
        assert sent == {1, 2, 3}
        assert store.stats()["pending"] == 0


def test_turns_are_compared_a_part_at_a_time(tmp_path: Path):
    clock = ManualClock()
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as store:
        for _ in range(1_100):
            add(store)
        held = [Outcome(txn.txn_id, "held", retry_after_s=600.0) for txn in waiting(store)]
        store.record(held)
        assert not waiting(store)
        change(tmp_path, "UPDATE turns SET user_id = 'x' WHERE position = 1050")
        assert not waiting(store)  # the first 500 again, then the next
        assert not waiting(store)
        assert not waiting(store)
        with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection:
            (wrong,) = connection.execute(
                "SELECT count(*) FROM turns WHERE user_id = 'x'"
            ).fetchone()
        assert wrong == 0


def test_a_list_that_names_bytes_in_place_of_an_id_is_made_anew(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store, text="mine")
        assert len(waiting(store)) == 1  # so it is listed
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection:
        roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_master"))
    content = bytearray((tmp_path / "buffer.db").read_bytes())
    text, blob = 13 + 2 * 36, 12 + 2 * 36  # SQLite's types of an id
    notes = 13 + 2 * len("notes")
    for name in ("touches", "touches_position"):
        start = (roots[name] - 1) * PAGE_BYTES
        at = content.index(bytes([notes, text]), start, start + PAGE_BYTES)
        content[at + 1] = blob
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        (tmp_path / "buffer.db").write_bytes(content)
        [row] = store.select("notes", user_id=USER)
        assert (row["id"], row["text"], row["_pending"]) == (row_id, "mine", True)
        assert [txn.ops[0].id for txn in waiting(store)] == [row_id]


def test_a_file_whose_migration_turned_into_another_is_carried_over(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store)
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection, connection:
        connection.execute("UPDATE _sqlite_migrations SET name = 'create_buffes'")
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in waiting(store)] == [row_id]
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1"]}
