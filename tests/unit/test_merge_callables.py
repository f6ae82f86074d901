"""Policies that are the application's own code: what they are asked, and what is believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from local_store import Insert, Row
from local_store.ops import Resolution, RowConflict
from syncer.core.merge import Merged, merge
from tests.unit.merge_chains import (
    NOTE_KEY,
    Author,
    changed,
    notes,
    record_keys,
    server_row,
    taken,
    written_back,
)


def met(policy: Any, author: Author, **theirs: Any) -> tuple[Merged, Row]:
    rows = {NOTE_KEY: server_row(**theirs)}
    merged = merge(notes(policy), author.pending, rows)
    row = taken(rows, written_back(author.pending, merged))[NOTE_KEY]
    assert row is not None
    return merged, row


def author_of(*changes: Row) -> Author:
    author = Author(note=server_row())
    for values in changes:
        author.write(changed(**values))
    return author


def test_a_callable_is_asked_per_op_and_sees_what_stands_without_it() -> None:
    asked: list[RowConflict] = []

    def policy(conflict: RowConflict) -> Resolution:
        asked.append(conflict)
        title = f"{conflict.theirs['title']}+{conflict.mine['title']}"
        return Resolution({"title": title}, derived={"counter": conflict.theirs["counter"] + 1})

    author = author_of({"title": "x", "body": "b"}, {"stars": 5}, {"title": "y"})
    merged, row = met(policy, author, title="theirs")
    assert row["title"] == "theirs+x+y"
    assert (row["body"], row["stars"]) == ("b", 5)
    first, second = asked
    assert (first.base, first.mine) == ({"title": "A", "body": "B"}, {"title": "x", "body": "b"})
    assert (first.columns, first.theirs["counter"]) == (frozenset({"title"}), 7)
    assert (second.base, second.theirs["title"], second.theirs["counter"]) == (
        {"title": "x"},
        "theirs+x",
        8,
    )
    [record] = merged.rewritten[0].records
    assert record_keys(merged) == [("t1", ("title",), "merged")]
    assert (record["policy"], record["through"], record["mine"]) == (
        "callable",
        "t3",
        {"title": "y"},
    )


def test_a_column_that_the_answer_leaves_out_stays_theirs() -> None:
    author = author_of({"title": "x", "stars": 5})
    merged, row = met(lambda conflict: {"stars": 6}, author, title="theirs", stars=9)
    assert (row["title"], row["stars"]) == ("theirs", 6)
    assert record_keys(merged) == [("t1", ("stars", "title"), "merged")]


def test_an_answer_that_writes_nothing_is_recorded_as_theirs() -> None:
    merged, row = met(lambda conflict: {}, author_of({"title": "x"}), title="theirs")
    assert row["title"] == "theirs"
    assert record_keys(merged) == [("t1", ("title",), "remote")]


def test_bookkeeping_leaves_no_record() -> None:
    answer = Resolution({"title": "silent"}, surfaced=False)
    merged, row = met(lambda conflict: answer, author_of({"title": "x"}), title="theirs")
    assert row["title"] == "silent"
    assert record_keys(merged) == []


def test_callables_of_columns_are_asked_once_each_about_all_their_columns() -> None:
    calls: list[frozenset[str]] = []

    def mine(conflict: RowConflict) -> Row:
        calls.append(conflict.columns)
        return {name: conflict.mine[name] for name in conflict.columns}

    def silent(conflict: RowConflict) -> Resolution:
        return Resolution(dict(mine(conflict)), surfaced=False)

    policy = {"title": mine, "body": mine, "stars": silent}
    author = author_of({"title": "x", "body": "x", "stars": 5})
    merged, row = met(policy, author, title="t", body="t", stars=9)
    assert (row["title"], row["body"], row["stars"]) == ("x", "x", 5)
    assert sorted(map(sorted, calls)) == [["body", "title"], ["stars"]]
    assert record_keys(merged) == [("t1", ("body", "title"), "merged")]


def test_a_json_column_reaches_the_callable_with_both_sides_other_keys_in_mine() -> None:
    def policy(conflict: RowConflict) -> Row:
        return {"meta": conflict.mine["meta"]}

    author = author_of({"meta": {"a": 2, "b": 1, "c": 1}}, {"meta": {"a": 2, "b": 1, "c": 2}})
    merged, row = met(policy, author, meta={"a": 8, "b": 9})
    assert row["meta"] == {"a": 2, "b": 9, "c": 2}
    assert record_keys(merged) == [("t1", ("meta.a",), "merged")]


def test_a_key_that_one_op_settled_is_not_set_again_by_the_next() -> None:
    def larger(conflict: RowConflict) -> Row:
        sides = (conflict.mine["meta"], conflict.theirs["meta"])
        return {"meta": {**sides[0], "a": max(side["a"] for side in sides)}}

    author = author_of({"meta": {"a": 2, "b": 1}}, {"meta": {"a": 2, "b": 2}})
    _, row = met(larger, author, meta={"a": 8, "b": 1})
    assert row["meta"] == {"a": 8, "b": 2}


def test_siblings_of_the_transaction_get_new_values() -> None:
    def policy(conflict: RowConflict) -> Resolution:
        [index] = [n for n, op in enumerate(conflict.siblings) if op.table == "comments"]
        inserted = {**conflict.siblings[index].values, "title": "for theirs"}
        return Resolution({"title": "merged"}, siblings={index: inserted})

    author = Author(note=server_row())
    comment = Insert("comments", {"id": "c1", "note_id": "n1", "title": "mine", "stars": 1})
    author.write(comment, changed(title="x"))
    author.write(type(changed())("comments", "c1", {"title": "later", "stars": 2}))
    merged, _ = met(policy, author, title="theirs")
    stored = written_back(author.pending, merged)
    assert stored[0].ops[0].values == {"note_id": "n1", "title": "for theirs", "stars": 1}
    assert stored[1].before == ({"title": "for theirs", "stars": 1},)


def test_an_update_among_the_siblings_keeps_what_the_answer_does_not_name() -> None:
    author = Author(note=server_row(), other=server_row(id="n2"))
    other = type(changed())("notes", "n2", {"title": "mine", "stars": 2})
    author.write(changed(title="x"), other)
    answer = Resolution({"title": "merged"}, siblings={1: {"stars": 3}})
    theirs = {NOTE_KEY: server_row(title="theirs")}
    merged = merge(notes(lambda conflict: answer), author.pending, theirs)
    assert merged.rewritten[0].ops[1].values == {"title": "mine", "stars": 3}


def test_an_answer_may_take_back_other_columns_of_its_own_op() -> None:
    answer = Resolution({}, siblings={0: {"body": "theirs"}})
    author = author_of({"title": "x", "body": "b", "stars": 2})
    merged, row = met(
        {"title": lambda conflict: answer}, author, title="t", body="B", updated_at="v2"
    )
    assert (row["title"], row["body"], row["stars"]) == ("t", "theirs", 2)
    same = Resolution({}, siblings={0: {"body": "B"}})
    merged, row = met({"title": lambda conflict: same}, author, title="t")
    assert merged.rewritten[0].ops[0].values == {"stars": 2}


def fails(conflict: RowConflict) -> Row:
    raise LookupError("quotes what users wrote")


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        (fails, "LookupError"),
        (lambda conflict: None, "TypeError"),
        (lambda conflict: 7, "TypeError"),
        (lambda conflict: {"unknown": 1}, "ValueError"),
        (lambda conflict: {"counter": 1}, "ValueError"),
        (lambda conflict: conflict.theirs, "ValueError"),
        (lambda conflict: {"title": ("a", "tuple")}, "TypeError"),
        (lambda conflict: {"title": float("nan")}, "TypeError"),
        (lambda conflict: {"title": object()}, "TypeError"),
        (lambda conflict: {"status": None}, "ValueError"),
        (lambda conflict: Resolution({}, siblings={5: {"title": "x"}}), "ValueError"),
        (lambda conflict: Resolution({}, siblings={1: {"counter": 1}}), "ValueError"),
        (lambda conflict: Resolution({}, siblings={0: {"counter": 1}}), "ValueError"),
        (lambda conflict: Resolution({}, derived={"counter": object()}), "TypeError"),
    ],
)
def test_a_policy_that_fails_leaves_its_conflict_to_a_person(policy: Any, note: str) -> None:
    author = Author(note=server_row(), other=server_row(id="n2"))
    author.write(changed(title="x"), type(changed())("notes", "n2", {"title": "x"}))
    merged, row = met(policy, author, title="theirs")
    assert row["title"] == "theirs"
    [record] = merged.manual["t1"]
    assert (record["policy"], record["outcome"], record["note"]) == ("callable", "manual", note)
    assert merged.rewritten == ()


def test_one_failure_leaves_the_chains_whole_change_to_a_person_and_other_policies_go_on() -> None:
    def once(conflict: RowConflict) -> Row:
        if conflict.mine["title"] == "y":
            raise ValueError
        return {"title": "merged"}

    author = author_of({"title": "x", "body": "mine"}, {"title": "y"})
    merged, row = met({"title": once, "body": "local_wins"}, author, title="theirs", body="theirs")
    assert row["title"] == "theirs"
    assert record_keys(merged) == [("t1", ("body",), "local"), ("t1", ("title",), "manual")]
    [record] = merged.manual["t1"]
    assert (record["mine"], record["through"], record["note"]) == (
        {"title": "y"},
        "t2",
        "ValueError",
    )


def test_a_policy_that_changes_what_it_was_given_changes_nothing_else() -> None:
    def careless(conflict: RowConflict) -> Row:
        conflict.theirs["meta"].clear()
        conflict.mine.clear()
        conflict.base["title"] = "forged"
        return {"title": "merged"}

    author = author_of({"title": "x"}, {"meta": {"a": 1, "b": 2}})
    merged, row = met({"title": careless}, author, title="theirs", meta={"a": 8, "b": 1})
    assert row["meta"] == {"a": 8, "b": 2}
    assert merged.rewritten[0].records[0]["base"] == {"title": "A"}


def test_a_merge_that_meets_a_further_change_asks_again_with_what_stood_then() -> None:
    asked: list[Any] = []

    def policy(conflict: RowConflict) -> Row:
        asked.append((conflict.base["title"], conflict.theirs["title"], conflict.mine["title"]))
        return {"title": conflict.theirs["title"] + "+x"}

    author, tables = author_of({"title": "x"}), notes(policy)
    stored = author.pending
    for theirs in ("one", "two", "two"):
        rows = {NOTE_KEY: server_row(title=theirs)}
        stored = written_back(stored, merge(tables, stored, rows))
    assert asked == [("A", "one", "x"), ("one", "two", "one+x")]
    assert [record["base"] for record in stored[0].records] == [{"title": "A"}]
    assert merge(tables, [replace(stored[0], parked=True)], {NOTE_KEY: server_row()}) == Merged()
