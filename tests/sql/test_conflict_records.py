"""Conflict records on the server: written with the effect, decided by a person, read later."""

from __future__ import annotations

import psycopg
import pytest

from local_store.door import digest_of
from local_store.ops import Row, WireOp

from .conftest import Database, new, update
from .parking import conflict_of, held, in_conflict, park, parked_states, results


def resolve(db: Database, record: Row, choice: str, **more: object) -> Row:
    return db.call("sync_resolve_v1", {"id": record["id"], "choice": choice, **more})


def row_of(db: Database, row_id: str) -> Row:
    [row] = db.query("select status, metadata, finalized_at from sessions where id = %s", row_id)
    return row


def status_conflict(db: Database, user: str, **more: object) -> tuple[str, Row]:
    mine = {"status": "finalized", **more}
    return in_conflict(db, user, mine=mine, theirs="status = 'abandoned'")


def test_the_record_of_an_automatic_outcome_is_written_with_its_effect_once(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    record = {
        "table": "sessions", "id": row_id, "columns": ["status"], "policy": "remote_wins",
        "base": {"status": "active"}, "mine": {"status": "finalized"},
        "theirs": {"status": "abandoned"}, "outcome": "remote",
    }  # fmt: skip
    op = update("sessions", row_id, base, metadata={"n": 1})
    transaction = db.transaction(user, op, records=[record])
    db.send(transaction)
    db.send(transaction)
    found = conflict_of(db, transaction)
    assert (found["outcome"], found["mine"], found["theirs"]) == (
        "remote", {"status": "finalized"}, {"status": "abandoned"},
    )  # fmt: skip


def test_a_refused_transaction_leaves_no_record(db, user):
    row_id = db.session(user)
    record = {"table": "sessions", "id": row_id, "outcome": "local", "policy": "local_wins"}
    op = update("sessions", row_id, db.version("sessions", row_id), status="bogus")
    transaction = db.transaction(user, op, records=[record])
    assert db.send(transaction)[0]["verdict"] == "rejected"
    asked = {"txn_ids": [transaction["txn_id"]]}
    assert db.call("sync_list_conflicts_v1", asked)["conflicts"] == []


@pytest.mark.parametrize(("choice", "status"), [("mine", "finalized"), ("theirs", "abandoned")])
def test_a_person_takes_a_side_and_the_rest_of_the_transaction_goes_on(db, user, choice, status):
    row_id, transaction = status_conflict(db, user)
    record = conflict_of(db, transaction)
    assert results(resolve(db, record, choice)) == [("applied", None)]
    assert row_of(db, row_id)["status"] == status
    found = conflict_of(db, transaction)
    assert (found["resolution"], found["mine"], found["theirs"]) == (
        choice, {"status": "finalized"}, {"status": "abandoned"},
    )  # fmt: skip
    assert db.send(transaction)[0]["verdict"] == "duplicate"


def test_theirs_drops_only_the_columns_in_conflict(db, user):
    row_id, transaction = status_conflict(db, user, finalized_at="2026-01-01T00:00:00+00:00")
    record = conflict_of(db, transaction)
    db.query("update sync.conflicts set columns = '{status}' where id = %s", record["id"])
    resolve(db, record, "theirs")
    row = row_of(db, row_id)
    assert (row["status"], row["finalized_at"] is not None) == ("abandoned", True)


def test_a_person_writes_a_third_version(db, user):
    row_id, transaction = status_conflict(db, user)
    ops = [WireOp("sessions", "update", row_id, {"status": "active"})]
    more = {"row": {"status": "active"}, "new_txn_id": new(), "digest": digest_of(ops)}
    assert results(resolve(db, conflict_of(db, transaction), "edited", **more)) == [
        ("applied", None)
    ]
    assert row_of(db, row_id)["status"] == "active"
    [resent] = db.send(transaction)
    assert (resent["verdict"], resent["state"]) == ("parked", "discarded")


def test_a_decision_on_a_row_that_moved_again_comes_back_with_the_new_row(db, user):
    row_id, transaction = status_conflict(db, user)
    record = conflict_of(db, transaction)
    db.as_user(user, "update sessions set status = 'active' where id = %s", row_id)
    db.as_user(user, "update sessions set metadata = '{}' where id = %s", row_id)
    reply = resolve(db, record, "mine")
    # Only mine changed the status against what it was made on, so it goes through.
    assert results(reply) == [("applied", None)]
    assert row_of(db, row_id)["status"] == "finalized"


def test_a_decision_that_meets_another_third_value_needs_a_new_one(db, user):
    row_id, transaction = in_conflict(
        db, user, mine={"metadata": {"a": 1}}, theirs="""metadata = '{"a": 2}'"""
    )
    record = conflict_of(db, transaction)
    db.as_user(user, """update sessions set metadata = '{"a": 3}' where id = %s""", row_id)
    assert results(resolve(db, record, "mine")) == [("conflict", None)]
    assert parked_states(db, transaction) == ["conflict"]
    asked = {"txn_ids": [transaction["txn_id"]], "open": True}
    [again] = db.call("sync_list_conflicts_v1", asked)["conflicts"]
    assert (again["theirs"], again["mine"]) == ({"metadata": {"a": 3}}, {"metadata": {"a": 1}})
    assert results(resolve(db, again, "mine")) == [("applied", None)]
    assert row_of(db, row_id)["metadata"] == {"a": 1}


def waiting(db: Database, user: str, row_id: str, behind: Row, **values: object) -> Row:
    op = update("sessions", row_id, "chained", **values)
    transaction = db.transaction(user, op, after=[behind["txn_id"]])
    [verdict] = park(
        db, held(transaction, behind["txn_id"], before=[{"status": "finalized", "metadata": {}}])
    )
    assert verdict["verdict"] == "parked"
    return transaction


def test_mine_frees_what_waits_in_order(db, user):
    row_id, transaction = status_conflict(db, user)
    later = waiting(db, user, row_id, transaction, status="active", metadata={"n": 1})
    reply = resolve(db, conflict_of(db, transaction), "mine")
    assert results(reply) == [("applied", None)] * 2
    assert row_of(db, row_id)["status"] == "active"
    assert db.send(later)[0]["verdict"] == "duplicate"


def test_theirs_covers_the_chain_that_the_record_showed(db, user):
    row_id, transaction = status_conflict(db, user)
    later = waiting(db, user, row_id, transaction, status="active", metadata={"n": 1})
    record = conflict_of(db, transaction)
    db.query("update sync.conflicts set through = %s where id = %s", later["txn_id"], record["id"])
    assert results(resolve(db, record, "theirs")) == [("applied", None)] * 2
    row = row_of(db, row_id)
    assert (row["status"], row["metadata"]) == ("abandoned", {"n": 1})


def test_theirs_is_not_overwritten_by_a_waiting_change_that_nobody_was_shown(db, user):
    row_id, transaction = status_conflict(db, user)
    later = waiting(db, user, row_id, transaction, status="active")
    resolve(db, conflict_of(db, transaction), "theirs")
    assert row_of(db, row_id)["status"] == "abandoned"
    assert parked_states(db, later) == ["conflict"]
    record = conflict_of(db, later)
    assert (record["mine"], record["theirs"]) == ({"status": "active"}, {"status": "abandoned"})


def test_a_record_is_decided_once(db, user):
    _, transaction = status_conflict(db, user)
    record = conflict_of(db, transaction)
    resolve(db, record, "mine")
    with pytest.raises(psycopg.Error, match="already_resolved"):
        resolve(db, record, "theirs")
    with pytest.raises(psycopg.Error, match="no_such_conflict"):
        resolve(db, {"id": new()}, "theirs")


def test_an_update_cannot_win_against_a_row_that_is_gone(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    transaction = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    record = {
        "table": "sessions", "id": row_id, "columns": ["status"], "policy": "manual",
        "base": {"status": "active"}, "mine": {"status": "finalized"}, "outcome": "manual",
    }  # fmt: skip
    asked = {"transaction": {**transaction, "before": [None]}, "state": "conflict"}
    park(db, {**asked, "records": [record]})
    with pytest.raises(psycopg.Error, match="row_is_gone"):
        resolve(db, conflict_of(db, transaction), "mine")
    assert results(resolve(db, conflict_of(db, transaction), "theirs")) == [("applied", None)]


def test_a_retry_of_a_dead_letter_on_a_row_that_moved_merges_what_does_not_overlap(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    transaction = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    asked = {**transaction, "before": [{"status": "active"}]}
    park(db, {"transaction": asked, "state": "dead"})
    db.as_user(user, "update sessions set metadata = '{\"x\": 1}' where id = %s", row_id)
    reply = db.call("sync_retry_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(reply) == [("applied", None)]
    assert row_of(db, row_id)["metadata"] == {"x": 1}


@pytest.mark.parametrize(
    ("choice", "knows", "verdict"),
    [
        ("mine", True, "applied"),
        ("mine", False, "conflict"),  # sealed before its container had met theirs
        ("theirs", True, "conflict"),
    ],
)
def test_a_change_that_arrives_after_the_decision_builds_on_it_only_if_it_was_for_its_author(
    db, user, choice, knows, verdict
):
    row_id, transaction = status_conflict(db, user)
    record = conflict_of(db, transaction)
    op = update("sessions", row_id, "chained", status="active")
    met = {f"sessions/{row_id}": record["theirs_version"]} if knows else {}
    late = db.transaction(user, op, after=[transaction["txn_id"]], met=met)
    resolve(db, record, choice)
    assert [item["verdict"] for item in db.send(late)] == [verdict]


def test_theirs_takes_the_disputed_keys_only(db, user):
    row_id, transaction = in_conflict(
        db, user, mine={"metadata": {"x": "mine", "y": "mine"}},
        theirs="""metadata = '{"x": "theirs"}'""",
    )  # fmt: skip
    record = conflict_of(db, transaction)
    db.query(
        "update sync.conflicts set columns = %s, theirs = %s::jsonb where id = %s",
        ["metadata.x", "metadata.z"], '{"metadata.x": "theirs"}', record["id"],
    )  # fmt: skip
    assert results(resolve(db, record, "theirs")) == [("applied", None)]
    assert row_of(db, row_id)["metadata"] == {"x": "theirs", "y": "mine"}


def test_records_are_listed_page_by_page(db, user):
    for _ in range(3):
        status_conflict(db, user)
    asked: Row = {"user_id": user, "limit": 2}
    first, second = db.call("sync_list_conflicts_v1", asked)["conflicts"]
    asked |= {"after_at": second["recorded_at"], "after_id": second["id"]}
    [third] = db.call("sync_list_conflicts_v1", asked)["conflicts"]
    assert len({first["id"], second["id"], third["id"]}) == 3
