"""The three-way merge of a row's pending chain: what is merged, what conflicts, what is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from local_store import Column, Row, TableSpec
from local_store.ops import Resolution, RowConflict, StoredTransaction, WireOp
from syncer.core.merge import Merged, merge

COLUMNS = {
    "id": Column("text"),
    "user_id": Column("uuid"),
    "updated_at": Column("timestamp"),
    "a": Column("text"),
    "b": Column("text"),
    "at": Column("timestamp"),
    "meta": Column("json"),
    "counter": Column("int"),
    "note_id": Column("text"),
}
NOTES = TableSpec(
    "notes", COLUMNS, server_owned=frozenset({"counter"}), json_merge=frozenset({"meta"})
)
COMMENTS = TableSpec("comments", COLUMNS, parent=("note_id", "notes"))
KEY = "notes/n"


class Chain:
    """A row's pending changes, made one after the other on a copy of it."""

    def __init__(self, spec: TableSpec = NOTES, **row: Any) -> None:
        self.spec = spec
        self.row: Row | None = row or None
        self.made: list[StoredTransaction] = []

    def _add(self, op: WireOp, before: Row | None) -> Chain:
        number = len(self.made) + 1
        self.made.append(StoredTransaction(f"t{number}", number, "u", (op,), (before,)))
        return self

    def update(self, **values: Any) -> Chain:
        assert self.row is not None
        before = {name: self.row.get(name) for name in values}
        self.row = {**self.row, **values}
        return self._add(WireOp("notes", "update", "n", values), before)

    def delete(self) -> Chain:
        before, self.row = self.row, None
        return self._add(WireOp("notes", "delete", "n", {}), before)

    def insert(self, **values: Any) -> Chain:
        self.row = values
        return self._add(WireOp("notes", "insert", "n", values), None)

    def merge(self, theirs: Row | None) -> Merged:
        return merge({"notes": self.spec, "comments": COMMENTS}, self.made, {KEY: theirs})

    def after(self, theirs: Row | None) -> list[StoredTransaction]:
        """The transactions as they go on after the merge."""
        new = {item.txn_id: item for item in self.merge(theirs).rewritten}
        return [
            item
            if item.txn_id not in new
            else replace(
                item,
                ops=new[item.txn_id].ops,
                before=new[item.txn_id].before,
                records=new[item.txn_id].records,
            )
            for item in self.made
        ]

    def final(self, theirs: Row) -> Row:
        """The row that the merged chain leaves."""
        row: Row | None = dict(theirs)
        for item in self.after(theirs):
            for op in item.ops:
                row = None if op.kind == "delete" else {**(row or {}), **op.values}
        return row or {}


def records(merged: Merged) -> list[Row]:
    automatic = [record for item in merged.rewritten for record in item.records]
    return automatic + [record for found in merged.manual.values() for record in found]


# -- no conflict --


def test_different_columns_merge_without_a_word():
    chain = Chain(a="a0", b="b0").update(b="mine")
    assert chain.final({"a": "theirs", "b": "b0"}) == {"a": "theirs", "b": "mine"}
    assert records(chain.merge({"a": "theirs", "b": "b0"})) == []


def test_five_own_edits_of_one_column_are_one_change():
    chain = Chain(a="a0", b="b0")
    for number in range(5):
        chain.update(a=f"edit {number}")
    merged = chain.merge({"a": "a0", "b": "theirs"})
    assert records(merged) == []
    assert chain.final({"a": "a0", "b": "theirs"})["a"] == "edit 4"


def test_a_change_taken_back_is_no_change():
    chain = Chain(a="a0").update(a="other").update(a="a0")
    assert chain.final({"a": "theirs"}) == {"a": "theirs"}
    assert records(chain.merge({"a": "theirs"})) == []


def test_both_sides_having_the_same_idea_is_no_conflict():
    chain = Chain(a="a0").update(a="same", b="mine")
    assert records(chain.merge({"a": "same", "b": None})) == []
    assert chain.final({"a": "same", "b": None}) == {"a": "same", "b": "mine"}


def test_one_moment_in_two_spellings_is_the_same_value():
    chain = Chain(at="2026-01-01T10:00:00.100000+00:00").update(at="2026-01-02T00:00:00Z")
    theirs = {"at": "2026-01-01T11:00:00.1+01:00"}
    assert records(chain.merge(theirs)) == []


def test_columns_of_the_server_are_nobodys_change():
    chain = Chain(a="a0", counter=1).update(a="mine")
    assert records(chain.merge({"a": "a0", "counter": 9, "updated_at": "v2"})) == []


def test_what_lost_all_its_columns_is_still_sent():
    chain = Chain(a="a0").update(a="same")
    [item] = chain.after({"a": "same"})
    assert item.ops == ()


def test_merging_with_the_same_row_again_changes_nothing():
    chain = Chain(replace(NOTES, policy="local_wins"), a="a0", b="b0").update(a="mine", b="m")
    theirs = {"a": "theirs", "b": "b0"}
    chain.made = chain.after(theirs)
    assert chain.merge(theirs) == Merged((), {})


# -- conflicts and policies --


def test_the_same_column_is_left_to_a_person_with_one_record():
    chain = Chain(a="a0", b="b0").update(b="mine").update(a="first").update(a="last")
    merged = chain.merge({"a": "theirs", "b": "b0"})
    assert merged.manual == {
        "t2": (
            {
                "table": "notes", "id": "n", "columns": ["a"], "policy": "merge",
                "base": {"a": "a0"}, "mine": {"a": "last"}, "theirs": {"a": "theirs"},
                "outcome": "manual", "through": "t3",
            },
        )
    }  # fmt: skip
    assert [item.ops[0].values for item in chain.after({"a": "theirs", "b": "b0"})] == [
        {"b": "mine"}, {"a": "first"}, {"a": "last"},
    ]  # fmt: skip


def test_what_a_person_decides_keeps_saying_what_its_author_knew():
    chain = Chain(a="a0", b="b0").update(a="mine", b="m")
    theirs = {"a": "theirs", "b": "new"}
    assert chain.merge(theirs).manual
    [item] = chain.after(theirs)
    assert item.before == ({"a": "a0", "b": "b0"},)


def test_remote_wins_drops_mine_with_a_record():
    chain = Chain(replace(NOTES, policy="remote_wins"), a="a0").update(a="mine", b="kept")
    theirs = {"a": "theirs", "b": None}
    assert chain.final(theirs) == {"a": "theirs", "b": "kept"}
    [record] = records(chain.merge(theirs))
    assert (record["outcome"], record["mine"]) == ("remote", {"a": "mine"})


def test_local_wins_keeps_mine_with_a_record_of_theirs():
    chain = Chain(replace(NOTES, policy="local_wins"), a="a0").update(a="x").update(a="mine")
    assert chain.final({"a": "theirs"}) == {"a": "mine"}
    [record] = records(chain.merge({"a": "theirs"}))
    assert (record["outcome"], record["theirs"], record["mine"]) == (
        "local", {"a": "theirs"}, {"a": "mine"},
    )  # fmt: skip


def test_columns_may_have_policies_of_their_own():
    spec = replace(NOTES, policy={"a": "remote_wins", "b": "local_wins"})
    chain = Chain(spec, a="a0", b="b0").update(a="mine", b="mine")
    theirs = {"a": "theirs", "b": "theirs"}
    assert chain.final(theirs) == {"a": "theirs", "b": "mine"}
    assert sorted(r["outcome"] for r in records(chain.merge(theirs))) == ["local", "remote"]


def test_a_table_left_to_a_person_asks_even_where_columns_differ():
    chain = Chain(replace(NOTES, policy="manual"), a="a0", b="b0").update(b="mine")
    assert list(chain.merge({"a": "theirs", "b": "b0"}).manual) == ["t1"]


def test_a_second_conflict_replaces_the_record_and_keeps_the_oldest_base():
    chain = Chain(replace(NOTES, policy="local_wins"), a="a0").update(a="mine")
    chain.made = chain.after({"a": "theirs 1"})
    [record] = records(chain.merge({"a": "theirs 2"}))
    assert (record["base"], record["theirs"]) == ({"a": "a0"}, {"a": "theirs 2"})


# -- JSON by key --


def test_different_keys_of_one_object_merge():
    chain = Chain(meta={"x": 1, "y": 1}).update(meta={"x": 2, "y": 1})
    theirs = {"meta": {"x": 1, "y": 2, "z": None}}
    assert chain.final(theirs) == {"meta": {"x": 2, "y": 2, "z": None}}
    assert records(chain.merge(theirs)) == []


def test_a_removed_key_and_a_null_are_different_things():
    chain = Chain(meta={"x": 1, "y": 1}).update(meta={"y": None})
    assert chain.final({"meta": {"x": 1, "y": 1, "z": 1}}) == {"meta": {"y": None, "z": 1}}


def test_only_the_keys_that_both_changed_are_in_conflict():
    chain = Chain(meta={"x": 1, "y": 1}).update(meta={"x": 2, "y": 2})
    theirs = {"meta": {"x": 3, "y": 1}}
    [record] = records(chain.merge(theirs))
    assert (record["columns"], record["base"], record["mine"], record["theirs"]) == (
        ["meta.x"], {"meta.x": 1}, {"meta.x": 2}, {"meta.x": 3},
    )  # fmt: skip
    spec = replace(NOTES, policy="remote_wins")
    winner = Chain(spec, meta={"x": 1, "y": 1}).update(meta={"x": 2, "y": 2})
    assert winner.final(theirs) == {"meta": {"x": 3, "y": 2}}


def test_every_step_of_a_chain_carries_their_keys():
    chain = Chain(meta={"x": 1}).update(meta={"x": 2}).update(meta={"x": 2, "y": 1})
    values = [item.ops[0].values["meta"] for item in chain.after({"meta": {"x": 1, "z": 9}})]
    assert values == [{"x": 2, "z": 9}, {"x": 2, "y": 1, "z": 9}]


# -- callables --


def asking(answer: Callable[[RowConflict], Any]) -> TableSpec:
    return replace(NOTES, policy=answer)


def test_a_callable_is_asked_with_all_three_sides():
    seen: list[RowConflict] = []

    def longest(conflict: RowConflict) -> Row:
        seen.append(conflict)
        return {name: max(conflict.mine[name], conflict.theirs[name], key=len) for name in "a"}

    chain = Chain(asking(longest), a="a0", b="b0").update(a="mine", b="kept")
    theirs = {"a": "longer theirs", "b": "b0"}
    assert chain.final(theirs) == {"a": "longer theirs", "b": "kept"}
    [conflict] = seen[:1]
    assert (conflict.base, conflict.mine, conflict.columns) == (
        {"a": "a0", "b": "b0"}, {"a": "mine", "b": "kept"}, frozenset("a"),
    )  # fmt: skip
    [record] = records(chain.merge(theirs))
    assert (record["outcome"], record["policy"]) == ("merged", "callable")


def test_each_change_of_a_chain_builds_on_the_answer_before():
    def joined(conflict: RowConflict) -> Row:
        return {"a": f"{conflict.theirs['a']}+{conflict.mine['a']}"}

    chain = Chain(asking(joined), a="0").update(a="1").update(a="2")
    assert chain.final({"a": "T"}) == {"a": "T+1+2"}
    assert len(records(chain.merge({"a": "T"}))) == 1


def test_a_column_that_a_callable_leaves_out_stays_theirs():
    chain = Chain(asking(lambda conflict: {}), a="a0").update(a="mine")
    assert chain.final({"a": "theirs"}) == {"a": "theirs"}


def test_a_silent_answer_leaves_no_record():
    chain = Chain(asking(lambda c: Resolution({"a": "x"}, surfaced=False)), a="a0").update(a="m")
    assert records(chain.merge({"a": "theirs"})) == []


@pytest.mark.parametrize(
    "answer", [None, {"counter": 1}, {"nonsense": 1}, Resolution({"updated_at": "x"})]
)
def test_an_unusable_answer_is_left_to_a_person(answer: Any):
    chain = Chain(asking(lambda conflict: answer), a="a0").update(a="mine")
    merged = chain.merge({"a": "theirs"})
    [record] = merged.manual["t1"]
    assert (record["policy"], record["outcome"]) == ("callable", "manual")
    assert record["note"] in ("TypeError", "ValueError")


def test_a_callable_that_raises_is_left_to_a_person_without_its_message():
    def broken(conflict: RowConflict) -> Row:
        raise KeyError("a user's words")

    [record] = records(Chain(asking(broken), a="a0").update(a="mine").merge({"a": "theirs"}))
    assert record["note"] == "KeyError"
    assert "words" not in str(record)


# -- deletes, inserts, children --


def test_my_delete_of_an_unchanged_row_stands():
    chain = Chain(a="a0").update(a="mine").delete()
    theirs = {"a": "a0", "counter": 5, "updated_at": "v2"}
    assert records(chain.merge(theirs)) == []
    assert chain.after(theirs)[1].ops[0].kind == "delete"


def test_their_change_is_kept_over_my_delete_with_one_record():
    chain = Chain(a="a0", b="b0").delete()
    [item] = chain.after({"a": "theirs", "b": "b0"})
    assert item.ops == ()
    [record] = item.records
    assert (record["outcome"], record["columns"], record["base"], record["theirs"]) == (
        "remote", ["a"], {"a": "a0"}, {"a": "theirs"},
    )  # fmt: skip


@pytest.mark.parametrize(("on_delete", "outcome"), [("delete", "deleted"), ("manual", "manual")])
def test_a_delete_may_win_or_wait_instead(on_delete: str, outcome: str):
    chain = Chain(replace(NOTES, on_delete=on_delete), a="a0").delete()
    [record] = records(chain.merge({"a": "theirs"}))
    assert (record["outcome"], record["theirs"]) == (outcome, {"a": "theirs"})
    assert chain.after({"a": "theirs"})[0].ops[0].kind == "delete"


def test_my_updates_of_a_row_they_deleted_are_told_and_dropped():
    chain = Chain(a="a0").update(a="first").update(a="last")
    merged = chain.merge(None)
    assert all(item.ops == () for item in chain.after(None))
    [record] = records(merged)
    assert (record["outcome"], record["base"], record["mine"], record["theirs"]) == (
        "deleted", {"a": "a0"}, {"a": "last"}, None,
    )  # fmt: skip


def test_a_row_that_both_deleted_is_no_conflict():
    chain = Chain(a="a0").update(a="mine").delete()
    assert records(chain.merge(None)) == []
    assert all(item.ops == () for item in chain.after(None))


def test_a_row_that_i_insert_again_comes_back():
    chain = Chain(a="a0").delete().insert(a="again").update(a="and more")
    kinds = [[op.kind for op in item.ops] for item in chain.after(None)]
    assert kinds == [[], ["insert"], ["update"]]


def test_an_insert_that_meets_the_same_content_vanishes():
    chain = Chain().insert(a="same")
    assert records(chain.merge({"a": "same", "b": None})) == []
    assert chain.after({"a": "same", "b": None})[0].ops == ()


def test_an_insert_that_meets_other_content_is_left_to_a_person_as_it_was():
    chain = Chain().insert(a="mine", b="same")
    merged = chain.merge({"a": "theirs", "b": "same"})
    [record] = merged.manual["t1"]
    assert (record["columns"], record["mine"], record["theirs"]) == (
        ["a"], {"a": "mine"}, {"a": "theirs"},
    )  # fmt: skip
    assert chain.after({"a": "theirs", "b": "same"})[0].ops[0].kind == "insert"


def test_an_insert_that_wins_becomes_an_update():
    chain = Chain(replace(NOTES, policy="local_wins")).insert(a="mine", b="same")
    [item] = chain.after({"a": "theirs", "b": "same"})
    assert (item.ops[0].kind, item.ops[0].values) == ("update", {"a": "mine"})


def test_a_child_of_a_parent_they_deleted_is_told_and_dropped():
    child = WireOp("comments", "insert", "c", {"note_id": "n", "a": "on it"})
    edit = WireOp("comments", "update", "c", {"a": "edited"})
    made = [
        StoredTransaction("t1", 1, "u", (child,), (None,)),
        StoredTransaction("t2", 2, "u", (edit,), ({"a": "on it"},)),
    ]
    merged = merge({"notes": NOTES, "comments": COMMENTS}, made, {KEY: None})
    assert [item.ops for item in merged.rewritten] == [(), ()]
    [record] = records(merged)
    assert (record["table"], record["outcome"], record["mine"]) == (
        "comments", "deleted", {"note_id": "n", "a": "edited"},
    )  # fmt: skip


# -- what others decide --


def test_parked_work_and_what_is_behind_it_is_left_alone():
    chain = Chain(a="a0", b="b0").update(a="mine").update(b="mine")
    chain.made[0] = replace(chain.made[0], parked=True)
    assert chain.merge({"a": "theirs", "b": "theirs"}) == Merged((), {})


def test_what_already_waits_for_a_person_gets_no_second_record():
    chain = Chain(a="a0").update(a="mine")
    chain.made[0] = replace(chain.made[0], records=({"outcome": "manual"},))
    assert chain.merge({"a": "theirs"}) == Merged((), {})


def test_other_rows_of_a_transaction_stay_as_they_were():
    other = WireOp("notes", "update", "m", {"a": "untouched"})
    mine = WireOp("notes", "update", "n", {"a": "same"})
    made = [StoredTransaction("t1", 1, "u", (other, mine), ({"a": "x"}, {"a": "a0"}))]
    [item] = merge({"notes": NOTES}, made, {KEY: {"a": "same"}}).rewritten
    assert (item.ops, item.before) == ((other,), ({"a": "x"},))
