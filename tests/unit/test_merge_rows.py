"""Deletes, inserts and children that meet what somebody else did to the row."""

from __future__ import annotations

from typing import Any

import pytest

from local_store import Insert, Row, Update
from local_store.ops import StoredTransaction
from syncer.core.merge import Merged, merge
from tests.unit.merge_chains import (
    NOTE_KEY,
    Author,
    changed,
    deleted,
    inserted,
    notes,
    record_keys,
    server_row,
    taken,
    written_back,
)


def sent(
    author: Author, theirs: Row | None, policy: Any = "merge", **spec: Any
) -> tuple[Merged, list[StoredTransaction], Row | None]:
    """Merge with their row; returns the transactions as stored then, and the row they make."""
    rows = {NOTE_KEY: theirs}
    merged = merge(notes(policy, **spec), author.pending, rows)
    stored = written_back(author.pending, merged)
    return merged, stored, taken(rows, stored)[NOTE_KEY]


def kinds(stored: list[StoredTransaction]) -> list[list[str]]:
    return [[op.kind for op in item.ops] for item in stored]


# -- my delete --


def test_a_delete_of_a_row_that_only_moved_stands() -> None:
    author = Author(note=server_row())
    author.write(deleted())
    merged, _, row = sent(author, server_row(updated_at="v2", counter=8))
    assert row is None
    assert record_keys(merged) == []


def test_a_delete_gives_way_to_their_change_and_earlier_updates_still_merge() -> None:
    author = Author(note=server_row())
    author.write(changed(body="mine"))
    author.write(deleted())
    merged, stored, row = sent(author, server_row(title="theirs"))
    assert row is not None
    assert (row["title"], row["body"], kinds(stored)) == ("theirs", "mine", [["update"], []])
    [record] = stored[1].records
    assert (record["outcome"], record["columns"], record["mine"]) == ("remote", ["title"], {})
    assert (record["base"], record["theirs"]) == ({"title": "A"}, {"title": "theirs"})
    assert merged.manual == {}


def test_own_updates_before_a_delete_are_no_change_of_theirs() -> None:
    author = Author(note=server_row())
    author.write(changed(body="mine"), deleted())
    merged, _, row = sent(author, server_row())
    assert (row, record_keys(merged)) == (None, [])


def test_what_both_sides_set_alike_before_a_delete_was_known_to_the_deleter() -> None:
    author = Author(note=server_row())
    author.write(changed(title="same"))
    author.write(deleted())
    merged, _, row = sent(author, server_row(title="same"))
    assert (row, record_keys(merged)) == (None, [])


def test_a_delete_that_wins_keeps_what_it_destroyed_in_the_record() -> None:
    author = Author(note=server_row())
    author.write(deleted())
    _, stored, row = sent(author, server_row(title="theirs"), on_delete="delete")
    assert row is None
    [record] = stored[0].records
    assert (record["outcome"], record["theirs"]) == ("deleted", {"title": "theirs"})


def test_what_an_insert_left_to_the_servers_default_is_no_change_of_theirs() -> None:
    author = Author()
    author.write(inserted(title="A"))
    author.write(changed(title="mine"), deleted())
    author.pending = author.pending[1:]  # the insert is delivered
    merged, _, row = sent(author, server_row(body="the default"))
    assert (row, record_keys(merged)) == (None, [])


def test_a_manual_delete_is_left_to_a_person_and_stays_as_it_is() -> None:
    author = Author(note=server_row())
    author.write(deleted())
    merged, stored, row = sent(author, server_row(title="theirs"), on_delete="manual")
    assert row is not None
    assert (kinds(stored), merged.rewritten) == ([["delete"]], ())
    assert record_keys(merged) == [("t1", ("title",), "manual")]


def test_what_was_merged_before_a_manual_delete_keeps_its_record() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine"))
    author.write(deleted())
    theirs = server_row(title="theirs")
    merged, _, row = sent(author, theirs, "local_wins", on_delete="manual")
    assert row is not None
    assert row["title"] == "mine"
    assert record_keys(merged) == [("t1", ("title",), "local"), ("t2", ("title",), "manual")]


def test_the_record_of_a_change_tells_what_the_delete_behind_it_would_take_along() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine", meta={"a": 2, "b": 1}))
    author.write(deleted())
    theirs = server_row(title="theirs", stars=5, meta={"a": 3, "b": 4})
    merged, stored, _ = sent(author, theirs)
    [record] = merged.manual["t1"]
    assert kinds(stored) == [["update"], ["delete"]]
    assert record["columns"] == ["meta.a", "meta.b", "stars", "title"]
    assert record["base"] == {"meta.a": 1, "meta.b": 1, "stars": 1, "title": "A"}
    assert record["mine"] == {"meta.a": 2, "title": "mine"}
    assert record["theirs"] == {"meta.a": 3, "meta.b": 4, "stars": 5, "title": "theirs"}
    assert record["through"] == "t2"


def test_both_sides_deleting_is_nothing_even_after_own_updates() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine"))
    author.write(deleted())
    merged, stored, row = sent(author, None)
    assert (row, kinds(stored), record_keys(merged)) == (None, [[], []], [])


# -- their delete --


def test_updates_of_a_row_that_they_deleted_vanish_into_one_record() -> None:
    author = Author(note=server_row())
    author.write(changed(title="x"))
    author.write(changed(title="mine", body="mine"))
    _, stored, row = sent(author, None)
    assert (row, kinds(stored), stored[1].records) == (None, [[], []], ())
    assert stored[0].records == (
        {
            "table": "notes",
            "id": "n1",
            "columns": ["body", "title"],
            "base": {"title": "A", "body": "B"},
            "mine": {"title": "mine", "body": "mine"},
            "theirs": None,
            "policy": "remote_wins",
            "outcome": "deleted",
            "through": "t2",
        },
    )


def test_in_a_manual_table_updates_of_a_row_that_they_deleted_wait_for_a_person() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine"))
    merged, stored, _ = sent(author, None, "manual")
    assert merged.manual["t1"][0]["theirs"] is None
    assert kinds(stored) == [["update"]]


def test_a_row_that_is_inserted_again_goes_on_as_it_is() -> None:
    author = Author(note=server_row())
    author.write(deleted())
    author.write(inserted(title="again"))
    author.write(changed(title="and on"))
    merged, stored, row = sent(author, None)
    assert row == {"title": "and on"}
    assert (kinds(stored), record_keys(merged)) == ([[], ["insert"], ["update"]], [])


def test_an_older_record_that_mine_stands_goes_when_the_row_does() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine"))
    tables = notes("local_wins")
    theirs = {NOTE_KEY: server_row(title="x")}
    first = written_back(author.pending, merge(tables, author.pending, theirs))
    [gone] = merge(tables, first, {NOTE_KEY: None}).rewritten
    assert [(r["outcome"], r["base"]) for r in gone.records] == [("deleted", {"title": "A"})]


# -- my insert --


def test_an_insert_of_what_is_there_already_vanishes_and_updates_go_on() -> None:
    author = Author()
    author.write(inserted(title="A", stars=1))
    author.write(changed(title="mine"))
    merged, stored, row = sent(author, server_row(body="theirs"))
    assert row is not None
    assert (row["title"], row["body"]) == ("mine", "theirs")
    assert (kinds(stored), record_keys(merged)) == ([[], ["update"]], [])


@pytest.mark.parametrize(
    ("policy", "title", "left", "outcome"),
    [
        ("remote_wins", "theirs", [], "remote"),
        ("local_wins", "mine", ["update"], "local"),
        ("merge", "theirs", ["insert"], "manual"),
        ("manual", "theirs", ["insert"], "manual"),
        (lambda conflict: {"title": conflict.mine["title"] + "!"}, "mine!", ["update"], "merged"),
    ],
)
def test_an_insert_that_meets_another_row_goes_to_the_policy_without_a_base(
    policy: Any, title: str, left: list[str], outcome: str
) -> None:
    author = Author()
    author.write(inserted(title="mine", stars=1))
    merged, stored, row = sent(author, server_row(title="theirs"), policy)
    assert row is not None
    assert (row["title"], kinds(stored)) == (title, [left])
    assert record_keys(merged) == [("t1", ("title",), outcome)]
    [record] = [*stored[0].records]
    assert (record["base"], record["mine"]) == ({}, {"title": "mine"})
    for op in stored[0].ops:
        assert outcome == "manual" or list(op.values) == ["title"]


def test_an_insert_and_its_updates_are_one_change_when_they_meet_a_row() -> None:
    author = Author()
    author.write(inserted(title="x"))
    author.write(changed(title="mine"))
    _, stored, row = sent(author, server_row(title="theirs"), "remote_wins")
    assert row is not None
    assert (row["title"], kinds(stored)) == ("theirs", [[], []])
    assert stored[0].records[0]["mine"] == {"title": "mine"}


def test_insert_delete_insert_meets_a_row_and_is_left_to_a_person() -> None:
    author = Author()
    author.write(inserted(title="A"))
    author.write(deleted())
    author.write(inserted(title="again"))
    merged, stored, _ = sent(author, server_row(title="theirs"), "remote_wins")
    assert list(merged.manual) == ["t3"]
    assert kinds(stored) == [[], [], ["insert"]]


def test_a_delete_that_stands_lets_the_insert_after_it_pass() -> None:
    author = Author(note=server_row())
    author.write(deleted())
    author.write(inserted(title="again"))
    merged, stored, row = sent(author, server_row(updated_at="v2"))
    assert (row, kinds(stored), record_keys(merged)) == (
        {"title": "again"},
        [["delete"], ["insert"]],
        [],
    )


def test_a_replacement_in_one_transaction_that_met_a_change_waits_as_a_whole() -> None:
    author = Author(note=server_row())
    author.write(deleted(), inserted(title="again"))
    merged, stored, _ = sent(author, server_row(title="theirs"))
    assert (list(merged.manual), kinds(stored)) == (["t1"], [["delete", "insert"]])
    assert merged.rewritten == ()


# -- children --


def comment(row_id: str = "c1", note: str = "n1") -> Insert:
    return Insert("comments", {"id": row_id, "note_id": note, "title": "mine"})


def test_a_child_under_a_row_that_they_deleted_vanishes_into_a_record_with_its_content() -> None:
    author = Author(note=server_row())
    author.write(changed(title="mine"), comment())
    author.write(Update("comments", "c1", {"title": "mine too"}))
    _, stored, _ = sent(author, None)
    assert kinds(stored) == [[], []]
    [about_note, about_comment] = stored[0].records
    assert (about_note["id"], about_comment["id"]) == ("n1", "c1")
    assert about_comment["mine"] == {"note_id": "n1", "title": "mine too"}
    assert (about_comment["base"], about_comment["theirs"]) == ({}, None)
    assert (about_comment["outcome"], about_comment["through"]) == ("deleted", "t2")


def test_grandchildren_go_the_same_way() -> None:
    author = Author()
    reply = Insert("replies", {"id": "r1", "comment_id": "c1", "title": "mine"})
    author.write(comment(), reply)
    _, stored, _ = sent(author, None)
    assert kinds(stored) == [[]]
    assert [record["id"] for record in stored[0].records] == ["c1", "r1"]


def test_a_child_in_a_manual_table_waits_for_a_person_when_its_parent_is_gone() -> None:
    author = Author()
    author.write(comment())
    merged, stored, _ = sent(author, None, "manual")
    assert kinds(stored) == [["insert"]]
    assert record_keys(merged) == [("t1", ("note_id", "title"), "manual")]


def test_a_child_stays_when_its_parent_is_inserted_again_before_it() -> None:
    author = Author()
    author.write(inserted(title="again"), comment())
    merged, stored, _ = sent(author, None)
    assert (kinds(stored), merged) == ([["insert", "insert"]], Merged())


def test_children_of_rows_that_are_there_stay() -> None:
    author = Author(note=server_row())
    author.write(comment(), comment("c2", "elsewhere"))
    _, stored, _ = sent(author, server_row(title="theirs"))
    assert kinds(stored) == [["insert", "insert"]]


@pytest.mark.parametrize("known", [{}, {"comments/c1": server_row(id="c1", body="theirs")}])
def test_moving_a_child_under_a_row_that_is_gone_is_left_to_a_person(known: Any) -> None:
    # Sent again as it is, it would meet the same refusal for ever.
    author = Author()
    author.write(comment(note="n2"))
    author.pending.clear()
    author.write(Update("comments", "c1", {"note_id": "n1"}))
    merged = merge(notes("local_wins"), author.pending, {**known, NOTE_KEY: None})
    assert record_keys(merged) == [("t1", ("note_id",), "manual")]
    assert merged.rewritten == ()


def test_what_is_left_to_a_person_for_one_row_meets_its_other_rows_too() -> None:
    other = "notes/n2"
    author = Author(note=server_row(), other=server_row(id="n2"))
    author.write(changed(title="mine"), Update("notes", "n2", {"title": "mine too", "stars": 2}))
    first = {NOTE_KEY: server_row(title="theirs")}
    stored = written_back(author.pending, merge(notes(), author.pending, first))
    second = {other: server_row(id="n2", title="theirs too", body="theirs")}
    merged = merge(notes(), stored, second)
    [record] = merged.manual["t1"]
    assert (record["id"], record["columns"]) == ("n2", ["title"])
    assert (record["base"], record["theirs"]) == ({"title": "A"}, {"title": "theirs too"})
    again = merge(notes(), written_back(stored, merged), {**first, **second})
    assert (again.rewritten, again.manual) == ((), {})
