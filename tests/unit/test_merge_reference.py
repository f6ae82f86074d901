"""What a merge promises whatever the chain, against a reference that compares column by column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from local_store import Delete, Insert, Op, Row, Update
from local_store.ops import StoredTransaction
from syncer.core.merge import Merged, merge
from tests.unit.merge_chains import (
    NOTE,
    NOTE_KEY,
    Author,
    changed,
    notes,
    server_row,
    taken,
    written_back,
)

ABSENT = "(absent)"
POLICIES = {"title": "remote_wins", "body": "local_wins", "stars": "remote_wins"}
POLICIES |= {"status": "local_wins", "meta": "remote_wins"}

small = st.integers(0, 2)
metas = st.dictionaries(st.sampled_from("abc"), st.one_of(small, st.none()), max_size=3)
columns = st.fixed_dictionaries(
    {"title": small, "body": small, "stars": small, "status": small, "meta": metas}
)
some_columns = st.fixed_dictionaries(
    {}, optional={"title": small, "body": small, "stars": small, "status": small, "meta": metas}
).filter(bool)
runs = st.lists(some_columns, min_size=1, max_size=4)
quick = settings(max_examples=200, deadline=None)


def flat(row: Row) -> Row:
    """Take a row apart into independent values: a key of a JSON column is one."""
    found = {name: row[name] for name in ("title", "body", "stars", "status")}
    return found | {f"meta.{key}": row["meta"].get(key, ABSENT) for key in "abc"}


def reference(base: Row, mine: Row, theirs: Row) -> tuple[Row, dict[str, str]]:
    """Return the row that has to come out, flat, and the outcome of what overlapped."""
    row, outcomes = {}, {}
    for name, was in flat(base).items():
        my, their = flat(mine)[name], flat(theirs)[name]
        overlap = my != was and their not in (was, my)
        wins = "local" if POLICIES[name.split(".")[0]] == "local_wins" else "remote"
        if overlap:
            outcomes[name] = wins
        row[name] = their if my == was or (overlap and wins == "remote") else my
    return row, outcomes


def chain_of(
    base: Row, run: list[Row], together: bool = False, order: Callable[[Row], Row] = dict
) -> list[StoredTransaction]:
    author = Author(note=base)
    ops = [changed(**order(values)) for values in run]
    for transaction in [ops] if together else [[op] for op in ops]:
        author.write(*transaction)
    return author.pending


def outcomes_of(transactions: list[StoredTransaction]) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in [record for item in transactions for record in item.records]:
        for name in record["columns"]:
            assert name not in found, "two records tell of one column"
            found[name] = record["outcome"]
    return found


@quick
@given(columns, runs, columns, st.booleans())
def test_a_chain_merges_to_what_its_columns_say_with_one_record_per_overlap(
    before: Row, run: list[Row], after: Row, together: bool
) -> None:
    base, theirs = server_row(**before), server_row(**after)
    pending = chain_of(base, run, together)
    merged = merge(notes(POLICIES), pending, {NOTE_KEY: theirs})
    mine = dict(base)
    for values in run:
        mine |= values
    expected, outcomes = reference(base, mine, theirs)
    stored = written_back(pending, merged)
    result = taken({NOTE_KEY: theirs}, stored)[NOTE_KEY]
    assert result is not None
    assert (flat(result), outcomes_of(stored)) == (expected, outcomes)
    assert not merged.manual


@quick
@given(columns, runs, columns)
def test_how_a_chain_is_cut_into_transactions_and_columns_are_ordered_changes_nothing(
    before: Row, run: list[Row], after: Row
) -> None:
    base, theirs = server_row(**before), {NOTE_KEY: server_row(**after)}

    def told(together: bool, order: Callable[[Row], Row]) -> tuple[Any, Any]:
        pending = chain_of(base, run, together, order)
        stored = written_back(pending, merge(notes(POLICIES), pending, theirs))
        return taken(theirs, stored), outcomes_of(stored)

    def turned(values: Row) -> Row:
        return dict(reversed(values.items()))

    assert told(False, dict) == told(True, dict) == told(False, turned)


@quick
@given(columns, runs, columns, columns)
def test_a_second_conflict_leaves_one_record_per_column_with_the_oldest_base(
    before: Row, run: list[Row], after: Row, again: Row
) -> None:
    base, theirs = server_row(**before), server_row(**again)
    pending = chain_of(base, run)
    first = written_back(pending, merge(notes(POLICIES), pending, {NOTE_KEY: server_row(**after)}))
    second = written_back(first, merge(notes(POLICIES), first, {NOTE_KEY: theirs}))
    outcomes = outcomes_of(second)
    for record in [record for item in second for record in item.records]:
        told = {name: record["base"].get(name, ABSENT) for name in record["columns"]}
        assert told == {name: flat(base)[name] for name in record["columns"]}
    result = taken({NOTE_KEY: theirs}, second)[NOTE_KEY]
    assert result is not None
    for name, there in flat(theirs).items():
        assert (
            flat(result)[name] == there
            or flat(theirs)[name] == flat(server_row(**after))[name]
            or name in outcomes
        ), "their value went without a record"


ops = st.lists(st.tuples(st.sampled_from(["update", "update", "delete"]), some_columns), max_size=6)
policies = st.sampled_from(["merge", "remote_wins", "local_wins", "manual", POLICIES])


def life(base: Row | None, wanted: list[tuple[str, Row]], cuts: list[bool]) -> Author:
    """Write a life of the row: what isn't possible at its turn becomes an insert."""
    author = Author(**({} if base is None else {"note": base}))
    there, transaction = base is not None, list[Op]()
    for (kind, values), cut in zip(wanted, cuts, strict=False):
        if not there:
            transaction.append(Insert("notes", {"id": NOTE, "meta": {}, **values}))
        elif kind == "delete":
            transaction.append(Delete("notes", NOTE))
        else:
            transaction.append(Update("notes", NOTE, values))
        there = not there or kind != "delete"
        if cut:
            author.write(*transaction)
            transaction = []
    if transaction:
        author.write(*transaction)
    return author


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(st.none(), columns),
    ops,
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.one_of(st.none(), columns),
    policies,
    st.sampled_from(["keep_remote", "delete", "manual"]),
    st.integers(0, 9),
)
def test_any_life_of_a_row_can_be_sent_after_a_merge_and_merging_again_changes_nothing(
    before: Row | None,
    wanted: list[tuple[str, Row]],
    cuts: list[bool],
    after: Row | None,
    policy: Any,
    on_delete: str,
    parked: int,
) -> None:
    base = None if before is None else server_row(**before)
    theirs = {NOTE_KEY: None if after is None else server_row(**after)}
    pending = life(base, wanted, cuts).pending
    if parked < len(pending):
        pending[parked] = replace(pending[parked], parked=True)
    tables = notes(policy, on_delete=on_delete)
    merged = merge(tables, pending, theirs)
    stored = written_back(pending, merged)
    taken(theirs, stored)  # every op finds what it says it replaces
    # To a manual table the row hasn't moved since: it is the one that was merged with.
    assert merge(tables, stored, theirs, moved=()) == Merged()
    per_outcome = [record["outcome"] for item in stored for record in item.records]
    assert len(per_outcome) == len(set(per_outcome))
    left_alone = pending[parked:]
    assert stored[parked:] == left_alone


@quick
@given(columns, runs, columns)
def test_what_a_person_must_decide_keeps_what_its_author_wrote(
    before: Row, run: list[Row], after: Row
) -> None:
    base, theirs = server_row(**before), server_row(**after)
    pending = chain_of(base, run)
    merged = merge(notes("merge"), pending, {NOTE_KEY: theirs})
    stored = written_back(pending, merged)
    mine = dict(base)
    for values in run:
        mine |= values
    overlapping = set(reference(base, mine, theirs)[1])
    told = {name for records in merged.manual.values() for r in records for name in r["columns"]}
    assert overlapping == told
    for old, new in zip(pending, stored, strict=True):
        for name, value in old.ops[0].values.items():
            assert name not in overlapping or new.ops[0].values[name] == value
            if name in overlapping and new.txn_id in merged.manual:
                assert new.before[0] is not None
                assert old.before[0] is not None
                assert new.before[0][name] == old.before[0][name]
    result = taken({NOTE_KEY: theirs}, stored)[NOTE_KEY]
    assert result is not None
    for name, there in flat(theirs).items():
        assert flat(result)[name] == there or flat(base)[name] == there, "theirs was overwritten"


@quick
@given(columns, runs, columns)
def test_what_waits_for_a_person_holds_whatever_nobody_disputes(
    before: Row, run: list[Row], after: Row
) -> None:
    base, theirs = server_row(**before), server_row(**after)
    pending = chain_of(base, run)
    stored = written_back(pending, merge(notes("merge"), pending, {NOTE_KEY: theirs}))
    mine, shown = dict(base), dict(theirs)
    for values in run:
        mine |= values
    for item in stored:
        for op in item.ops:
            shown |= op.values
    for name, my in flat(mine).items():
        was, there = flat(base)[name], flat(theirs)[name]
        assert flat(shown)[name] == (there if my == was else my)
