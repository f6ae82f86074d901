"""What each verdict asks for: written down, parked, merged, renumbered, waited for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from local_store.ops import Chains, PendingTransaction, Rewritten, StoredTransaction, WireOp
from syncer.core.merge import Merged
from syncer.core.sorting import (
    Sorted,
    SortingLimits,
    conflict_park,
    needs_person,
    rewritten_for,
    sort_out,
)
from syncer.core.verdict import VERDICT_KINDS, Verdict
from tests.unit.test_core import transaction
from tests.unit.test_flusher import TABLES

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROWS = {"notes/a": {"id": "a", "text": "theirs"}}


def sorted_of(verdict: Verdict, sent: PendingTransaction | None = None) -> Sorted:
    sent = sent or transaction(1)
    verdict = replace(verdict, txn_id=sent.txn_id)
    return sort_out([sent], [verdict], NOW, lambda: 0.5, SortingLimits())


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat(timespec="microseconds")


@pytest.mark.parametrize("kind", sorted(VERDICT_KINDS))
def test_every_verdict_asks_for_something(kind: str):
    found = sorted_of(Verdict("", kind, state="dead" if kind == "parked" else None, blocked_by="x"))
    asked = (found.outcomes, found.refused, found.waiting, found.met, found.forked)
    assert sum(map(bool, asked)) == 1


@pytest.mark.parametrize("kind", ["applied", "duplicate"])
def test_what_was_applied_is_settled_with_its_versions(kind: str):
    [outcome] = sorted_of(Verdict("", kind, versions={"notes/a": "v2"}, rows=ROWS)).outcomes
    assert (outcome.state, outcome.versions) == ("applied", {"notes/a": "v2"})


def test_a_duplicate_that_was_parked_here_is_merged_with_what_was_decided():
    found = sorted_of(Verdict("", "duplicate", rows=ROWS), transaction(1, parked=True))
    assert [rows for _, rows in found.met] == [ROWS]
    assert sorted_of(Verdict("", "duplicate", rows=ROWS)).met == []


@pytest.mark.parametrize("state", ["dead", "conflict", "held"])
def test_a_parked_transaction_is_asked_about_again_and_keeps_its_evidence(state: str):
    found = sorted_of(Verdict("", "parked", state=state, message="why"))
    [outcome] = found.outcomes
    assert (outcome.state, outcome.parked, outcome.retry_after_s) == (state, True, 60.0)
    assert outcome.reply is not None
    [again] = sorted_of(Verdict("", "parked", state=state), transaction(1, parked=True)).outcomes
    assert again.reply is None


@pytest.mark.parametrize("state", ["discarded", "superseded"])
def test_what_came_to_nothing_is_settled_and_its_rows_are_met(state: str):
    found = sorted_of(Verdict("", "parked", state=state, rows={"notes/a": None}))
    assert [outcome.state for outcome in found.outcomes] == [state]
    assert [rows for _, rows in found.met] == [{"notes/a": None}]


def test_a_refusal_is_parked_with_its_evidence():
    [park] = sorted_of(Verdict("", "rejected", sqlstate="23514", op=1, message="why")).refused
    assert (park.state, park.sqlstate, park.op, park.message) == ("dead", "23514", 1, "why")


def test_a_fenced_transaction_is_parked_and_says_so():
    [park] = sorted_of(Verdict("", "fenced", message="too old")).refused
    assert (park.state, park.message) == ("dead", "fenced: too old")


def test_a_taken_position_means_a_forked_log_and_no_dead_letter():
    found = sorted_of(Verdict("", "rejected", sqlstate="SYT02"))
    assert (found.forked, found.refused) == (["txn-1"], [])


@pytest.mark.parametrize("sqlstate", ["23503", "02000"])
def test_a_missing_row_is_waited_for_a_bounded_time(sqlstate: str):
    verdict = Verdict("", "held", sqlstate=sqlstate)
    for since in (None, ago(3_599)):
        assert sorted_of(verdict, transaction(1, held_since=since)).outcomes[0].state == "held"
    [park] = sorted_of(verdict, transaction(1, held_since=ago(3_600))).refused
    assert (park.state, park.sqlstate) == ("dead", sqlstate)


@pytest.mark.parametrize("sqlstate", ["42703", "42P01", "55P03"])
def test_a_changed_schema_or_a_lock_is_waited_for_however_long(sqlstate: str):
    verdict = Verdict("", "held", sqlstate=sqlstate)
    found = sorted_of(verdict, transaction(1, held_since=ago(10**7)))
    assert (found.refused, found.outcomes[0].state) == ([], "held")


def test_what_is_blocked_says_by_whom():
    [(sent, outcome, blocker)] = sorted_of(Verdict("", "held", blocked_by="other")).waiting
    assert (sent.txn_id, outcome.state, blocker) == ("txn-1", "held", "other")


def test_a_conflict_left_to_a_person_is_parked_with_its_records_only():
    manual, automatic = {"outcome": "manual"}, {"outcome": "local"}
    sent = transaction(1, records=(automatic, manual))
    assert needs_person(sent)
    assert conflict_park(sent).records == (manual,)
    assert not needs_person(transaction(1, records=(automatic,)))


def test_a_merge_becomes_what_the_store_writes():
    insert = WireOp("notes", "insert", "a", {"text": "x"})
    edit = WireOp("notes", "update", "b", {"text": "x"})
    chains = Chains(
        1,
        (
            StoredTransaction("one", 1, "u", (insert,), (None,)),
            StoredTransaction("two", 2, "u", (edit,), ({"text": "w"},)),
        ),
    )
    record = {"table": "notes", "id": "b", "outcome": "manual"}
    merged = Merged((Rewritten("one", (), (), ()),), {"two": (record,)})
    rows = {"notes/b": {"id": "b", "updated_at": "v7"}}
    specs = {spec.name: spec for spec in TABLES}
    rewritten, gone = rewritten_for(specs, chains, merged, rows)
    assert gone == {"notes/a": None}
    [_, two] = rewritten
    assert (two.ops, two.records) == ((edit,), ({**record, "theirs_version": "v7"},))
