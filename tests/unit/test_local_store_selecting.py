"""Asking for rows: any of several values, and some columns only; clean and changed rows alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local_store import Delete, InvalidWrite, LocalStore, Row, Update
from local_store.clock import ManualClock, new_id
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def leave_as_they_are(store: LocalStore) -> None:
    pass


@pytest.fixture(params=[settle_all, leave_as_they_are], ids=["clean", "pending"])
def reach(request: pytest.FixtureRequest) -> Callable[[LocalStore], None]:
    """Bring rows into the state that is tested."""
    return request.param  # type: ignore[no-any-return]


def ids(store: LocalStore, table: str = "notes", **where: object) -> set[str]:
    return {row["id"] for row in store.select(table, user_id=USER, where=where, limit=-1)}


def test_a_list_stands_for_any_of_its_values(store: LocalStore, reach: Callable):
    a, b, _c = (add(store, text=text, number=n) for n, text in enumerate("abc"))
    theirs = add(store, user=OTHER, text="a")
    reach(store)
    assert ids(store, text=["a", "b"]) == {a, b}
    assert ids(store, text=("a", "x")) == {a}
    assert ids(store, id=[a, b.upper(), theirs, "no id", new_id()]) == {a, b}
    assert ids(store, id=[a, b], number=[1, 2]) == {b}
    assert ids(store, text=[]) == ids(store, id=[]) == set()


def test_children_of_several_parents_come_in_one_question(store: LocalStore, reach: Callable):
    parents = [add(store) for _ in range(3)]
    children = [add(store, "comments", note_id=parent) for parent in parents]
    reach(store)
    assert ids(store, "comments", note_id=parents[:2]) == set(children[:2])
    store.write([Update("comments", children[0], {"text": "x"})], user_id=USER)
    store.write([Delete("notes", parents[1])], user_id=USER)
    assert ids(store, "comments", note_id=parents) == {children[0], children[2]}


def test_some_columns_are_those_of_the_whole_row(store: LocalStore, reach: Callable):
    values = {
        "text": 'a"ü',
        "number": 2**60,
        "score": 0.1,
        "done": True,
        "body": {"a": [1, None]},
        "tags": ["x"],
    }
    add(store, **values)
    add(store, number=1)
    reach(store)
    columns = (*values, "created_at", "due")
    marks = ("id", "updated_at", "_version", "_pending")
    whole = store.select("notes", user_id=USER, order_by="-number")
    some = store.select("notes", user_id=USER, order_by="-number", columns=columns)
    assert some == [{name: row[name] for name in (*marks, *columns)} for row in whole]
    assert [row["number"] for row in some] == [2**60, 1]


@pytest.mark.parametrize("order_by", ["created_at", "-created_at", "number", "-number", None])
def test_pages_follow_one_another_without_gap_or_repeat(
    tmp_path: Path, reach: Callable[[LocalStore], None], order_by: str | None
):
    clock = ManualClock()
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as store:
        for turn in range(8):
            add(store, number=turn // 2)
            clock.advance(turn % 2)
        reach(store)
        add(store, number=1)
        how = {"user_id": USER, "order_by": order_by}
        whole = store.select("notes", limit=-1, **how)
        column = (order_by or "id").removeprefix("-")
        paged: list[Row] = []
        while page := store.select(
            "notes",
            limit=2,
            after=(paged[-1][column], paged[-1]["id"]) if paged else None,
            **how,
        ):
            paged += page
        assert paged == whole
        assert len(whole) == 9


def test_behind_a_value_there_is_no_row_without_one(store: LocalStore, reach: Callable):
    add(store)
    row_id = add(store, number=1)
    reach(store)
    for order_by, behind in (("number", 0), ("-number", 2), ("number", None)):
        found = store.select(
            "notes", user_id=USER, order_by=order_by, after=(behind, "0"), limit=-1
        )
        assert [row["id"] for row in found] == ([] if behind is None else [row_id])


def test_a_column_that_is_not_there_is_refused(store: LocalStore):
    with pytest.raises(InvalidWrite, match="no such column"):
        store.select("notes", user_id=USER, columns=["x' || body || '"])


@pytest.mark.parametrize("order_by", ["number", "-number"])
def test_rows_without_the_value_that_orders_come_before_all_others(
    store: LocalStore, order_by: str
):
    numbers = [None, 2, None, 1]
    made = [add(store, number=number) for number in numbers[:2]]
    settle_all(store)
    made += [add(store, number=number) for number in numbers[2:]]
    found = [row["id"] for row in store.select("notes", user_id=USER, order_by=order_by)]
    in_order = [made[0], made[2], made[3], made[1]]
    assert found == (in_order if order_by == "number" else in_order[::-1])
