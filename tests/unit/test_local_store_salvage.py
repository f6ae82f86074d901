"""A log whose tree of pages is damaged: every record comes back that is on a page of its own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from local_store import LocalStore, Update
from local_store.clock import ManualClock
from local_store.pages import PAGE_BYTES
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting

MANY = 400


def filled(folder: Path) -> tuple[list[str], list[str]]:
    """Make a buffer whose log is a tree of pages; returns ids of settled and of waiting rows."""
    with LocalStore.open(folder, tables=TABLES) as store:
        settled = [add(store, text=f"{n} " + "s" * 300) for n in range(MANY // 4)]
        settle_all(store)
        pending = [add(store, text=f"{n} " + "p" * 300) for n in range(MANY)]
        pending.append(add(store, text="large" * 20_000))
        change = Update("notes", settled[0], {"text": "changed"})
        store.write([change], user_id=USER)
    return settled, pending


def pages_of(folder: Path, table: str = "op_log") -> tuple[int, list[int]]:
    """Return a table's root page and the other pages of its tree that point to pages."""
    with closing(sqlite3.connect(folder / "buffer.db")) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
    content = (folder / "buffer.db").read_bytes()
    start = (root - 1) * PAGE_BYTES
    assert content[start] == 5  # it points to others
    cells = int.from_bytes(content[start + 3 : start + 5], "big")
    pointers = [int.from_bytes(content[start + 12 + 2 * n : start + 14 + 2 * n], "big")
                for n in range(cells)]  # fmt: skip
    below = [int.from_bytes(content[start + at : start + at + 4], "big") for at in pointers]
    return root, below


def destroy(folder: Path, page: int, content: bytes = b"\xa5" * PAGE_BYTES) -> None:
    with open(folder / "buffer.db", "r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(content)


def report(folder: Path, number: int = 1) -> dict[str, object]:
    found: dict[str, object] = orjson.loads(
        (folder / "quarantine" / str(number) / "report.json").read_bytes()
    )
    return found


@pytest.mark.parametrize("content", [b"\xa5" * PAGE_BYTES, bytes(PAGE_BYTES)])
def test_with_the_root_of_the_log_gone_every_record_is_taken_from_its_pages(
    tmp_path: Path, content: bytes
):
    settled, pending = filled(tmp_path)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        log_id, known = store.log_id, waiting(store)
    destroy(tmp_path, pages_of(tmp_path)[0], content)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert waiting(store) == known  # content, seq, log, and before
        assert {txn.log_id for txn in known} == {log_id}
        assert [txn.ops[0].id for txn in known] == [*pending, settled[0]]
        assert store.damage()["lost"] == 0
        rows = store.select("notes", user_id=USER, limit=-1)
        assert {row["id"] for row in rows} == {*settled, *pending}
        assert store.get("notes", settled[0], user_id=USER)["text"] == "changed"
        add(store)
        assert store.log_id != log_id
    found = report(tmp_path)
    assert (found["records"], found["from_pages"]) == (0, MANY + MANY // 4 + 2)


def test_with_root_header_and_names_gone_too_every_record_is_taken_from_its_pages(tmp_path: Path):
    settled, pending = filled(tmp_path)
    root, _ = pages_of(tmp_path)
    for page in range(1, root + 1):
        destroy(tmp_path, page)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.ops[0].id for txn in waiting(store)] == [*pending, settled[0]]
        assert store.damage()["lost"] == 0


def test_a_damaged_page_takes_along_what_stands_on_it_alone(tmp_path: Path):
    filled(tmp_path)
    root, below = pages_of(tmp_path)
    destroy(tmp_path, below[len(below) // 2])
    destroy(tmp_path, root)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        found = len(waiting(store))
        assert MANY + 2 - PAGE_BYTES // 300 < found < MANY + 2
        seqs = [txn.seq for txn in waiting(store)]
        assert seqs == sorted(set(seqs))


def count_of(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "buffer.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM op_log").fetchone()[0])


def test_what_was_tidied_away_stays_away(tmp_path: Path):
    clock = ManualClock()
    options = {"tables": TABLES, "clock": clock, "settled_retention_s": 1.0}
    with LocalStore.open(tmp_path, **options) as store:
        for n in range(MANY):
            add(store, text=f"{n} " + "s" * 300)
        settle_all(store)
        clock.advance(60)
        while store.tidy():
            pass
        pending = [add(store, text=f"{n} " + "p" * 300) for n in range(MANY // 4)]
    before = count_of(tmp_path)
    assert before < MANY
    destroy(tmp_path, pages_of(tmp_path)[0])
    with LocalStore.open(tmp_path, **options) as store:
        assert [txn.ops[0].id for txn in waiting(store)] == pending
        assert store.stats()["pending"] == MANY // 4
    assert count_of(tmp_path) == before
