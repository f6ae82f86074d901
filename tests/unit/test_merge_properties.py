"""Random chains against a reference that looks at each column and key by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from local_store import Row
from syncer.core.merge import Merged
from tests.unit.test_merge import NOTES, Chain, records

LEAVES = ("a", "b", "meta.x", "meta.y")
"""What a person would call a field: a column, or a key of the object that merges by key."""
VALUES = st.sampled_from(["0", "1", "2", None])
STATES = st.fixed_dictionaries(dict.fromkeys(LEAVES, VALUES))
CHAINS = st.lists(
    st.dictionaries(st.sampled_from(LEAVES), VALUES, min_size=1), min_size=1, max_size=5
)
POLICIES = st.sampled_from(["merge", "remote_wins", "local_wins"])
MANY = settings(max_examples=400, deadline=None)


def row_of(state: Row) -> Row:
    row = {name: value for name, value in state.items() if "." not in name}
    return {**row, "meta": {name[5:]: value for name, value in state.items() if "." in name}}


def leaves_of(row: Row) -> Row:
    keys = {f"meta.{key}": value for key, value in row["meta"].items()}
    return {**{name: row[name] for name in ("a", "b")}, **keys}


def chain_of(policy: str, base: Row, edits: list[Row]) -> Chain:
    chain = Chain(replace(NOTES, policy=policy), **row_of(base))
    state = dict(base)
    for edit in edits:
        state.update(edit)
        row = row_of(state)
        changed = {name.partition(".")[0] for name in edit}
        chain.update(**{name: row[name] for name in sorted(changed)})
    return chain


def conflicting(base: Row, edits: list[Row], theirs: Row) -> dict[str, Any]:
    """The fields that both sides changed to different values, with mine."""
    mine = dict(base)
    for edit in edits:
        mine.update(edit)
    return {
        leaf: mine[leaf]
        for leaf in LEAVES
        if mine[leaf] != base[leaf] and theirs[leaf] not in (base[leaf], mine[leaf])
    }


def expected(policy: str, base: Row, edits: list[Row], theirs: Row) -> Row:
    """What should stand there in the end, field by field."""
    mine = dict(base)
    for edit in edits:
        mine.update(edit)
    clash = conflicting(base, edits, theirs)
    final = {}
    for leaf in LEAVES:
        changed = mine[leaf] != base[leaf]
        take_mine = changed and (leaf not in clash or policy != "remote_wins")
        final[leaf] = mine[leaf] if take_mine else theirs[leaf]
    return final


@MANY
@given(POLICIES, STATES, CHAINS, STATES)
def test_nothing_that_only_one_side_changed_is_lost(policy, base, edits, theirs):
    chain = chain_of(policy, base, edits)
    assert leaves_of(chain.final(row_of(theirs))) == expected(policy, base, edits, theirs)


@MANY
@given(POLICIES, STATES, CHAINS, STATES)
def test_every_conflict_is_told_exactly_once_with_all_three_sides(policy, base, edits, theirs):
    merged = chain_of(policy, base, edits).merge(row_of(theirs))
    clash = conflicting(base, edits, theirs)
    told = [leaf for record in records(merged) for leaf in record["columns"]]
    assert sorted(told) == sorted(clash)
    for record in records(merged):
        for leaf in record["columns"]:
            sides = (record["base"][leaf], record["mine"][leaf], record["theirs"][leaf])
            assert sides == (base[leaf], clash[leaf], theirs[leaf])
    assert bool(merged.manual) == (policy == "merge" and bool(clash))


@MANY
@given(st.sampled_from(["remote_wins", "local_wins"]), STATES, CHAINS, STATES)
def test_merging_twice_is_merging_once(policy, base, edits, theirs):
    chain = chain_of(policy, base, edits)
    chain.made = chain.after(row_of(theirs))
    assert chain.merge(row_of(theirs)) == Merged((), {})


@MANY
@given(POLICIES, STATES, CHAINS, STATES)
def test_how_a_change_is_split_into_transactions_makes_no_difference(policy, base, edits, theirs):
    whole: Row = {}
    for edit in edits:
        whole.update(edit)
    split, joined = (chain_of(policy, base, chosen) for chosen in (edits, [whole]))
    assert split.final(row_of(theirs)) == joined.final(row_of(theirs))
    assert [r["columns"] for r in records(split.merge(row_of(theirs)))] == [
        r["columns"] for r in records(joined.merge(row_of(theirs)))
    ]


@MANY
@given(POLICIES, STATES, CHAINS, STATES)
def test_each_step_says_what_it_replaces(policy, base, edits, theirs):
    chain = chain_of(policy, base, edits)
    if chain.merge(row_of(theirs)).manual:
        return
    row = row_of(theirs)
    for item in chain.after(row_of(theirs)):
        for op, before in zip(item.ops, item.before, strict=True):
            assert before == {name: row[name] for name in op.values}
            row.update(op.values)


@MANY
@given(STATES, CHAINS, CHAINS)
def test_two_authors_who_both_win_by_key_end_the_same_whoever_comes_first(base, mine, yours):
    """Without a conflict the order of delivery doesn't show."""
    theirs = dict(base)
    for edit in yours:
        theirs.update(edit)
    if conflicting(base, mine, theirs):
        return
    ours = dict(base)
    for edit in mine:
        ours.update(edit)
    first = leaves_of(chain_of("merge", base, mine).final(row_of(theirs)))
    second = leaves_of(chain_of("merge", base, yours).final(row_of(ours)))
    assert first == second
