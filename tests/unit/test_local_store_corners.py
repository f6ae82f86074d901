"""Corners of the buffer: a full group, rows that meet in one, damage met in use, odd questions."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from local_store import BufferFull, Delete, Insert, LocalStore, Outcome, StoreCorrupt, Update
from local_store.clock import new_id
from local_store.ops import TransactionState
from local_store.schema import seal
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all, waiting


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def together(store: LocalStore, *transactions: list[Any]) -> list[Any]:
    """Write them at once; the first may go alone, the others share a commit in this order."""

    async def main() -> list[Any]:
        calls = [store.write_async(ops, user_id=USER) for ops in transactions]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(main())


def damage(folder: Path, statement: str) -> None:
    """Change the file behind the store's back, as a disk would: no trigger seals it anew."""
    with closing(sqlite3.connect(folder / "buffer.db", isolation_level=None)) as connection:
        connection.create_function("seal", -1, seal, deterministic=True)
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        known = triggers.fetchall()
        connection.execute("BEGIN IMMEDIATE")
        for name, _ in known:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement)
        for _, definition in known:
            connection.execute(definition)
        connection.execute("COMMIT")


# -- groups ---------------------------------------------------------------------------------------


def test_a_group_of_more_than_one_statement_is_one_commit(store: LocalStore):
    receipts = together(store, *([Insert("notes", {"number": n})] for n in range(250)))
    assert [receipt.seq for receipt in receipts] == list(range(1, 251))
    assert [txn.seq for txn in waiting(store)] == list(range(1, 251))


def test_a_child_and_its_parents_end_in_one_group_leave_neither(store: LocalStore):
    note, comment = add(store), new_id()
    together(
        store,
        [Insert("notes", {})],
        [Insert("comments", {"id": comment, "note_id": note})],
        [Delete("notes", note)],
        [Insert("notes", {})],
    )
    assert store.get("notes", note, user_id=USER) is None
    assert store.get("comments", comment, user_id=USER) is None
    assert len(waiting(store)) == 5


def test_a_child_that_moved_to_another_parent_outlives_its_first_one(store: LocalStore):
    first, second = add(store), add(store)
    moved, kept = (add(store, "comments", note_id=first) for _ in range(2))
    settle_all(store)
    store.write([Update("comments", moved, {"note_id": second})], user_id=USER)
    store.write([Delete("notes", first)], user_id=USER)
    assert store.get("comments", moved, user_id=USER)["note_id"] == second
    assert store.get("comments", kept, user_id=USER) is None
    assert waiting(store)[-1].children == ({f"comments/{kept}": "v1"},)


def test_in_a_group_the_one_beyond_the_limit_of_bytes_is_refused_alone(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, buffer_bytes_max=20_000) as store:
        sizes = [10, 10, 30_000, 10, 10]
        told = together(store, *([Insert("notes", {"text": "x" * size})] for size in sizes))
        assert [isinstance(one, BufferFull) for one in told] == [size > 10 for size in sizes]
        assert [txn.seq for txn in waiting(store)] == [1, 2, 3, 4]


def test_rows_beyond_what_is_remembered_are_made_anew(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, views_bytes_max=500) as store:
        ids = [add(store, text="x" * 200) for _ in range(5)]
        settle_all(store)
        for n in range(3):
            assert store.get("notes", ids[0], user_id=USER)  # so the last round is listed by now
            for row_id in ids:
                store.write([Update("notes", row_id, {"number": n})], user_id=USER)
        for row_id in ids:
            row = store.get("notes", row_id, user_id=USER)
            assert (row["number"], row["_version"], len(row["text"])) == (2, 4, 200)


def test_a_write_wakes_the_flusher_from_both_kinds_of_caller(store: LocalStore):
    calls: list[int] = []
    store.on_write(lambda: calls.append(1))
    add(store)
    together(store, [Insert("notes", {})])
    assert len(calls) == 2


def test_a_loop_that_ended_meanwhile_leaves_its_transaction_and_hinders_nobody(store: LocalStore):
    async def leave() -> None:
        asyncio.create_task(store.write_async([Insert("notes", {})], user_id=USER))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    add(store)
    assert [txn.seq for txn in waiting(store)] == [1, 2]


# -- damage met in use ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda store, ids: waiting(store),
        lambda store, ids: store.get("notes", ids[1], user_id=USER),
        lambda store, ids: store.select("notes", user_id=USER),
        lambda store, ids: store.entries(),
        lambda store, ids: store.undelivered(),
        lambda store, ids: settle_all(store),
        lambda store, ids: "sXcond" not in str(store.chains([("notes", ids[1])], user_id=USER)),
    ],
)
def test_a_record_that_is_damaged_in_use_is_set_aside_by_whoever_meets_it(
    store: LocalStore, tmp_path: Path, look: Callable[[LocalStore, list[str]], object]
):
    ids = [add(store, text=text) for text in ("first", "second", "third")]
    assert len(waiting(store)) == 3
    damage(tmp_path, "UPDATE op_log SET ops = replace(ops, 'second', 'sXcond') WHERE position = 2")
    assert look(store, ids) is not False
    assert [txn.position for txn in store.undelivered()] in ([1, 3], [])
    assert store.damage()["quarantined"] == 1
    assert store.get("notes", ids[1], user_id=USER) is None
    assert store.write([Insert("notes", {})], user_id=USER).seq == 4


@pytest.mark.parametrize(
    ("column", "state"), [("ops = '[]'", "applied"), ("attempts = 99", "held")]
)
def test_a_reply_to_a_record_that_is_damaged_meanwhile_is_recorded_for_the_others(
    store: LocalStore, tmp_path: Path, column: str, state: TransactionState
):
    for text in ("first", "second", "third"):
        add(store, text=text)
    sent = waiting(store)
    damage(tmp_path, f"UPDATE op_log SET {column} WHERE position = 2")
    store.record([Outcome(txn.txn_id, state) for txn in sent])
    states = [store.state(txn.txn_id) for txn in sent]
    assert states == [state, None, state]
    assert store.damage()["quarantined"] == 1


def test_a_damaged_copy_of_a_row_is_not_shown_in_part_either(store: LocalStore, tmp_path: Path):
    good, bad = add(store, text="right"), add(store, text="wrong")
    settle_all(store)
    damage(tmp_path, "UPDATE rows SET body = replace(body, 'wrong', 'wrXng')")
    found = store.select("notes", user_id=USER, columns=["text"])
    assert [(row["id"], row["text"]) for row in found] == [(good, "right")]
    assert not store.is_held("notes", bad, user_id=USER)  # dropped: the next read brings it


def test_a_touch_that_leads_to_no_record_is_none(store: LocalStore, tmp_path: Path):
    row_id = add(store, text="a")
    assert store.get("notes", row_id, user_id=USER)
    damage(tmp_path, f"INSERT INTO touches (tbl, id, position) VALUES ('notes', '{row_id}', 99)")
    assert store.get("notes", row_id, user_id=USER)["text"] == "a"


@pytest.mark.parametrize(
    "look",
    [
        lambda store, row_id: waiting(store),
        lambda store, row_id: store.get("notes", row_id, user_id=USER),
        lambda store, row_id: store.change_counter(),
        lambda store, row_id: store.record([Outcome(new_id(), "applied")]),
        lambda store, row_id: store.tidy(),
        lambda store, row_id: add(store),
    ],
)
def test_when_the_totals_are_lost_in_use_whoever_looks_first_has_them_counted_anew(
    store: LocalStore, tmp_path: Path, look: Callable[[LocalStore, str], object]
):
    done, row_id = add(store, text="done"), add(store, text="first")
    store.record([Outcome(waiting(store)[0].txn_id, "applied", {f"notes/{done}": "v1"})])
    damage(tmp_path, "DELETE FROM totals")
    look(store, row_id)
    [first, *rest] = store.undelivered()
    assert (first.seq, first.ops[0].id, len(rest)) == (2, row_id, store.stats()["pending"] - 1)
    assert store.get("notes", row_id, user_id=USER)["text"] == "first"
    assert store.get("notes", done, user_id=USER)["updated_at"] == "v1"
    assert store.damage() == {"quarantined": 0, "lost": 0, "files": ["1"]}


def test_a_disk_that_damages_what_was_carried_over_is_told_of_and_the_rest_flows_when_it_ends(
    tmp_path: Path,
):
    broken: list[int] = []

    def ids() -> str:  # asked for a new log's name whenever a file was carried over
        if broken:
            damage(tmp_path, f"UPDATE op_log SET ops = ops || ' ' WHERE position = {broken.pop()}")
        return new_id()

    with LocalStore.open(tmp_path, tables=TABLES, ids=ids) as store:
        rows = [add(store, text=text) for text in "abc"]
        waiting(store)
        damage(tmp_path, "DELETE FROM totals")
        broken.append(1)
        with pytest.raises(StoreCorrupt, match="damaged again"):
            waiting(store)
        assert not broken
        assert [txn.ops[0].id for txn in waiting(store)] == rows[1:]
        assert store.damage() == {"quarantined": 1, "lost": 0, "files": ["1"]}


def test_a_callers_mistake_is_not_taken_for_damage(store: LocalStore):
    add(store)
    with pytest.raises(sqlite3.Error, match="type 'object' is not supported"):
        store.reply(object())  # type: ignore[arg-type]
    assert store.damage() == {"quarantined": 0, "lost": 0, "files": []}
    assert len(waiting(store)) == 1


def test_a_file_whose_pages_are_overwritten_in_use_is_replaced_by_what_it_holds(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        written = {str(n) + "x" * 900 for n in range(400)}
        for text in written:
            add(store, text=text)
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as connection:
        (page,) = connection.execute("SELECT max(rootpage) FROM sqlite_master").fetchone()
    with open(tmp_path / "buffer.db", "r+b") as file:  # some leaves of the log, far behind
        for number in range(page + 60, page + 64):
            file.seek((number - 1) * 4_096)
            file.write(random.Random(number).randbytes(4_096))
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store, text="after")
        waiting(store)
        found = {row["text"] for row in store.select("notes", user_id=USER, limit=1_000)}
        assert "after" in found
        assert found <= {*written, "after"}
        assert len(found) > 300
        assert store.damage()["files"] == ["1"]


# -- questions ------------------------------------------------------------------------------------


def test_rows_are_ordered_by_key_by_version_and_by_any_column(store: LocalStore):
    ids = [add(store, number=number) for number in (2, 1, 3)]
    add(store, user=OTHER)
    settle_all(store)

    def order(by: str) -> list[str]:
        return [row["id"] for row in store.select("notes", user_id=USER, order_by=by)]

    assert order("id") == sorted(ids)
    assert order("-id") == sorted(ids, reverse=True)
    assert order("updated_at") == sorted(ids)  # one version for all: then by id
    assert order("number") == [ids[1], ids[0], ids[2]]


def test_an_id_that_is_none_finds_nothing(store: LocalStore):
    add(store)
    assert store.get("notes", "no id", user_id=USER) is None
    assert not store.is_held("notes", "no id", user_id=USER)
    assert store.select("notes", user_id=USER, where={"id": "no id"}) == []
