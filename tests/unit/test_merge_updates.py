"""Updates that meet somebody else's: what merges without a word, what policies make of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from local_store.ops import Row
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


def met(
    author: Author, policy: Any = "merge", base: Row | None = None, **theirs: Any
) -> tuple[Merged, Row]:
    """Merge what is pending with a row whose `theirs` columns changed; returns the row then."""
    rows = {NOTE_KEY: {**(base or server_row()), **theirs}}
    merged = merge(notes(policy), author.pending, rows)
    row = taken(rows, written_back(author.pending, merged))[NOTE_KEY]
    assert row is not None
    return merged, row


def author_of(*changes: Row, base: Row | None = None) -> Author:
    author = Author(note=base or server_row())
    for values in changes:
        author.write(changed(**values))
    return author


def only_record(merged: Merged) -> Row:
    """Return the single record of a merge, wherever it is."""
    found = [record for item in merged.rewritten for record in item.records]
    found += [record for records in merged.manual.values() for record in records]
    [record] = found
    return record


def test_disjoint_columns_merge_without_a_record() -> None:
    merged, row = met(author_of({"title": "mine"}), body="theirs")
    assert (row["title"], row["body"], merged) == ("mine", "theirs", Merged())


def test_what_moved_without_a_user_column_changing_is_nothing() -> None:
    merged, row = met(author_of({"title": "mine"}), counter=9, updated_at="v2")
    assert (row["title"], merged) == ("mine", Merged())


@pytest.mark.parametrize(
    ("column", "known", "shown"),
    [
        ("due", "2026-01-01T12:00:00.500+00:00", "2026-01-01T12:00:00.5+00:00"),
        ("due", "2026-01-01T12:00:00Z", "2026-01-01T12:00:00+00:00"),
        ("due", "2026-01-01t12:00:00z", "2026-01-01T13:00:00+01:00"),
        ("due", "2026-01-01T12:00:00.1234567Z", "2026-01-01T12:00:00.123457+00:00"),
        ("ref", "ABCDEF00-0000-4000-8000-000000000000", "abcdef00-0000-4000-8000-000000000000"),
        ("stars", 1, 1.0),
        ("meta", {"a": [1, {"b": 2}]}, {"a": [1.0, {"b": 2}]}),
    ],
)
def test_the_servers_spelling_of_a_value_is_no_change(column: str, known: Any, shown: Any) -> None:
    base = server_row(**{column: known})
    mine = {"due": "2030-01-01T00:00:00Z", "ref": None, "stars": 5, "meta": None}[column]
    merged, row = met(author_of({column: mine}, base=base), **{column: shown})
    assert row[column] == mine
    assert record_keys(merged) == []


@pytest.mark.parametrize(("known", "shown"), [(1, True), (0, False), ({"a": 1}, {"a": True})])
def test_true_is_not_one(known: Any, shown: Any) -> None:
    base = server_row(meta=known)
    merged, row = met(author_of({"meta": "mine"}, base=base), "remote_wins", meta=shown)
    assert row["meta"] is shown
    assert only_record(merged)["outcome"] == "remote"


def test_five_own_edits_are_one_conflict() -> None:
    author = author_of(*[{"title": f"mine {n}"} for n in range(5)])
    merged, row = met(author, "remote_wins", title="theirs")
    assert row["title"] == "theirs"
    assert only_record(merged) == {
        "table": "notes",
        "id": "n1",
        "columns": ["title"],
        "base": {"title": "A"},
        "mine": {"title": "mine 4"},
        "theirs": {"title": "theirs"},
        "policy": "remote_wins",
        "outcome": "remote",
        "through": "t5",
    }
    assert [item.txn_id for item in merged.rewritten if item.records] == ["t1"]
    assert all(item.ops == () for item in merged.rewritten)


def test_change_and_change_back_leaves_theirs_and_no_record() -> None:
    merged, row = met(author_of({"title": "x"}, {"title": "A"}), "local_wins", title="theirs")
    assert row["title"] == "theirs"
    assert record_keys(merged) == []
    assert [item.ops for item in merged.rewritten] == [(), ()]


def test_the_same_value_from_both_sides_is_no_conflict() -> None:
    merged, row = met(author_of({"title": "x"}, {"title": "same"}), title="same")
    assert row["title"] == "same"
    assert (record_keys(merged), merged.manual) == ([], {})


def test_local_wins_keeps_mine_and_says_what_it_went_over() -> None:
    merged, row = met(author_of({"title": "mine"}), "local_wins", title="theirs")
    assert row["title"] == "mine"
    record = only_record(merged)
    assert (record["outcome"], record["theirs"]) == ("local", {"title": "theirs"})
    assert merged.rewritten[0].before == ({"title": "theirs"},)


def test_columns_of_one_outcome_share_a_record_and_each_column_has_its_policy() -> None:
    policy = {"title": "remote_wins", "stars": "remote_wins", "body": "local_wins"}
    author = author_of({"stars": 2}, {"title": "mine", "body": "mine"})
    merged, row = met(author, policy, title="x", body="x", stars=9)
    assert (row["title"], row["body"], row["stars"]) == ("x", "mine", 9)
    assert record_keys(merged) == [("t1", ("stars", "title"), "remote"), ("t2", ("body",), "local")]


# -- what a person must decide --


def test_an_overlap_is_left_to_a_person_with_the_whole_chains_change_in_one_record() -> None:
    author = author_of({"body": "b"}, {"title": "x", "stars": 2}, {"title": "mine"}, {"stars": 3})
    merged, row = met(author, title="theirs")
    assert (row["body"], row["title"]) == ("b", "theirs")
    assert merged.rewritten == ()  # nobody disputes anything else
    [(txn_id, [record])] = merged.manual.items()
    assert (txn_id, record["through"]) == ("t2", "t3")
    assert (record["base"], record["mine"]) == ({"title": "A"}, {"title": "mine"})
    assert (record["policy"], record["outcome"]) == ("merge", "manual")


def test_a_change_that_is_taken_back_behind_what_waits_is_no_change() -> None:
    # Left as it is, the way back would one day go over their title.
    author = author_of({"title": "x"}, {"body": "mine"}, {"title": "A"})
    merged, row = met(author, title="theirs", body="theirs")
    assert (row["title"], row["body"]) == ("theirs", "theirs")
    assert [item.ops for item in merged.rewritten] == [(), ()]
    assert record_keys(merged) == [("t2", ("body",), "manual")]


def test_what_waits_behind_a_disputed_key_keeps_their_other_keys() -> None:
    author = author_of({"meta": {"a": 2, "b": 1}}, {"meta": {"a": 2, "b": 1, "c": 1}})
    merged, _ = met(author, meta={"a": 8, "b": 9})
    assert [item.ops[0].values["meta"] for item in merged.rewritten] == [
        {"a": 2, "b": 9},
        {"a": 2, "b": 9, "c": 1},
    ]
    assert merged.rewritten[1].before == ({"meta": {"a": 2, "b": 9}},)


def test_what_is_parked_and_what_waits_behind_it_stays_untouched() -> None:
    author = author_of({"title": "x"})
    author.write(changed(body="mine"), parked=True)
    author.write(changed(title="mine"))
    merged, _ = met(author, "remote_wins", title="theirs", body="theirs")
    [rewritten] = merged.rewritten
    assert rewritten.txn_id == "t1"
    assert rewritten.records[0]["mine"] == {"title": "x"}


def test_a_transaction_that_a_person_must_decide_already_is_not_asked_about_again() -> None:
    author = author_of({"title": "mine"})
    tables, theirs = notes(), {NOTE_KEY: server_row(title="theirs")}
    stored = written_back(author.pending, merge(tables, author.pending, theirs))
    assert merge(tables, stored, {NOTE_KEY: server_row(title="other")}) == Merged()


def test_a_manual_table_leaves_any_change_of_a_row_that_moved_to_a_person() -> None:
    merged, row = met(author_of({"title": "mine"}), "manual", body="theirs")
    assert row["title"] == "A"
    record = only_record(merged)
    assert (record["policy"], record["columns"]) == ("manual", ["title"])


def test_a_manual_table_lets_a_row_pass_that_nobody_else_is_known_to_have_changed() -> None:
    author = author_of({"title": "mine"})
    assert merge(notes("manual"), author.pending, {NOTE_KEY: server_row()}, moved=()) == Merged()


# -- JSON columns by key --


def test_keys_merge_as_columns_do_and_absent_is_not_null() -> None:
    base = server_row(meta={"mine": 1, "theirs": 1, "gone": 1, "back": 1, "null": None})
    author = author_of(
        {"meta": {"mine": 2, "theirs": 1, "gone": 1, "back": 7, "null": None, "new": None}},
        {"meta": {"mine": 3, "theirs": 1, "back": 1, "null": None, "new": None}},
        base=base,
    )
    theirs = {"mine": 1, "theirs": 2, "gone": 1, "back": 8, "other": 5}
    merged, row = met(author, base=base, meta=theirs)
    assert row["meta"] == {"mine": 3, "theirs": 2, "back": 8, "other": 5, "new": None}
    assert record_keys(merged) == []
    first = merged.rewritten[0].ops[0].values["meta"]
    assert first == {"mine": 2, "theirs": 2, "gone": 1, "back": 8, "other": 5, "new": None}


@pytest.mark.parametrize(
    ("policy", "stands", "outcome"), [("remote_wins", 8, "remote"), ("local_wins", 2, "local")]
)
def test_an_overlapping_key_goes_to_the_policy_under_its_own_name(
    policy: str, stands: int, outcome: str
) -> None:
    author = author_of({"meta": {"a": 2, "b": 1, "c": 1}})
    merged, row = met(author, policy, meta={"a": 8, "b": 9})
    assert row["meta"] == {"a": stands, "b": 9, "c": 1}
    record = only_record(merged)
    assert (record["columns"], record["outcome"]) == (["meta.a"], outcome)
    assert (record["base"], record["mine"], record["theirs"]) == (
        {"meta.a": 1},
        {"meta.a": 2},
        {"meta.a": 8},
    )


def test_a_removed_key_that_they_changed_overlaps_and_is_left_out_of_mine() -> None:
    merged, row = met(author_of({"meta": {"b": 1}}), "local_wins", meta={"a": 8, "b": 1})
    assert row["meta"] == {"b": 1}
    assert only_record(merged)["mine"] == {}


def test_deep_values_are_compared_whole() -> None:
    base = server_row(meta={"a": {"x": 1, "y": 1}})
    author = author_of({"meta": {"a": {"x": 2, "y": 1}}}, base=base)
    merged, _ = met(author, base=base, meta={"a": {"x": 1, "y": 2}})
    assert only_record(merged)["columns"] == ["meta.a"]


def test_true_and_one_under_a_key_are_written_as_they_are() -> None:
    base = server_row(meta={"a": 1, "b": 1})
    merged, row = met(author_of({"meta": {"a": 1, "b": 2}}, base=base), meta={"a": True, "b": 1})
    assert row["meta"]["a"] is True
    assert merged.rewritten[0].ops[0].values["meta"]["a"] is True


def test_what_a_person_may_choose_as_mine_holds_their_other_keys() -> None:
    merged, _ = met(author_of({"meta": {"a": 2, "b": 1}}), meta={"a": 8, "b": 9})
    assert only_record(merged)["columns"] == ["meta.a"]
    [parked] = merged.rewritten
    assert parked.ops[0].values["meta"] == {"a": 2, "b": 9}
    assert parked.before == ({"meta": {"a": 1, "b": 1}},)


@pytest.mark.parametrize("known", [None, [], "text"])
def test_a_json_value_that_is_no_object_is_one_column(known: Any) -> None:
    author = author_of({"meta": {"a": 1}}, base=server_row(meta=known))
    merged, _ = met(author, meta={"a": 2})
    assert only_record(merged)["columns"] == ["meta"]


def test_a_manual_column_is_not_merged_by_key() -> None:
    merged, _ = met(author_of({"meta": {"a": 2, "b": 1}}), {"meta": "manual"}, meta={"a": 1})
    record = only_record(merged)
    assert (record["columns"], record["policy"]) == (["meta"], "manual")


# -- several rows, several merges --


def test_each_row_of_a_transaction_is_merged_by_itself() -> None:
    author = Author(note=server_row(), other=server_row(id="n2"))
    other = changed(title="mine")
    author.write(changed(title="mine"), type(other)("notes", "n2", {"body": "mine"}))
    rows: dict[str, Row | None] = {
        NOTE_KEY: server_row(title="theirs"),
        "notes/n2": server_row(id="n2", title="theirs"),
    }
    merged = merge(notes(), author.pending, rows)
    assert [record["id"] for record in merged.manual["t1"]] == ["n1"]
    assert merged.rewritten == ()


def test_rows_that_were_not_met_stay_as_they_are() -> None:
    author = author_of({"title": "mine"})
    assert merge(notes("remote_wins"), author.pending, {}) == Merged()
    assert merge(notes("remote_wins"), author.pending, {"strange/n1": None}) == Merged()


def test_a_further_conflict_renews_the_record_and_keeps_the_oldest_base() -> None:
    author = author_of({"body": "b"}, {"title": "mine"})
    tables = notes("local_wins")
    stored = author.pending
    for theirs in ("one", "two", "two"):
        rows = {NOTE_KEY: server_row(title=theirs)}
        stored = written_back(stored, merge(tables, stored, rows))
    [record] = [record for item in stored for record in item.records]
    assert (record["base"], record["theirs"]) == ({"title": "A"}, {"title": "two"})
    assert stored[1].records == (record,)


def test_records_of_one_outcome_become_one_on_the_first_transaction_concerned() -> None:
    author = author_of({"body": "mine"}, {"title": "mine"})
    tables = notes("local_wins")
    first = written_back(
        author.pending, merge(tables, author.pending, {NOTE_KEY: server_row(title="x")})
    )
    assert [len(item.records) for item in first] == [0, 1]
    theirs = {NOTE_KEY: server_row(title="x", body="y")}
    second = written_back(first, merge(tables, first, theirs))
    [record] = second[0].records
    assert second[1].records == ()
    assert (record["columns"], record["through"]) == (["body", "title"], "t2")
    assert record["theirs"] == {"body": "y", "title": "x"}


def test_a_column_that_is_left_to_a_person_loses_its_older_automatic_record() -> None:
    author = author_of({"title": "mine", "body": "mine"})
    theirs = {NOTE_KEY: server_row(title="x", body="x")}
    first = written_back(author.pending, merge(notes("local_wins"), author.pending, theirs))
    stricter = notes({"title": "manual", "body": "local_wins"})
    again = {NOTE_KEY: server_row(title="y", body="x")}
    merged = merge(stricter, first, again)
    [rewritten] = merged.rewritten
    assert [record["columns"] for record in rewritten.records] == [["body"]]
    assert merged.manual["t1"][0]["base"] == {"title": "A"}
