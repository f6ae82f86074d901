"""Parked work that comes again: as it was, with other content, or on a row that moved."""

from __future__ import annotations

import pytest

from .conftest import insert, new, update
from .parking import conflict_of, dead, park, parked_states, poison, results


def test_a_retried_insert_that_meets_a_row_is_left_to_a_person(db, user):
    row_id, transaction = poison(db, user)
    assert [v["verdict"] for v in db.send(db.transaction(user, insert("sessions", row_id)))] == [
        "applied"
    ]
    reply = db.call("sync_retry_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(reply) == [("conflict", None)]
    assert parked_states(db, transaction) == ["conflict"]
    assert conflict_of(db, transaction)["columns"] == ["status"]


def test_a_parked_id_with_other_content_is_refused(db, user):
    row_id, transaction = poison(db, user)
    other = {**transaction, "digest": "0" * 64, "ops": [insert("sessions", row_id)]}
    [verdict] = db.send(other)
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "SYT01")
    assert db.query("select 1 from sessions where id = %s", row_id) == []


def test_a_strangers_parked_id_is_refused_as_a_hidden_row_is(db, user, stranger):
    row_id, transaction = poison(db, user)
    other = {**transaction, "user_id": stranger, "ops": [insert("sessions", row_id)]}
    [verdict] = db.send(other)
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "42501")
    assert db.query("select 1 from sessions where id = %s", row_id) == []


@pytest.mark.parametrize("ending", ["applied", "discarded"])
def test_what_was_refused_for_its_id_can_be_discarded(db, user, ending):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    if ending == "applied":
        db.send(first)
    else:
        park(db, dead(first, [{"status": "active"}]))
        db.call("sync_discard_v1", {"txn_ids": [first["txn_id"]]})
    again = db.transaction(user, insert("sessions", new()), txn_id=first["txn_id"])
    assert [v["sqlstate"] for v in db.send(again)] == ["SYT01"]
    assert [v["state"] for v in park(db, dead(again))] == ["dead"]
    reply = db.call("sync_discard_v1", {"txn_ids": [first["txn_id"]]})
    assert results(reply) == [("parked", "discarded")]
    log = db.call("sync_audit_v1", {"log_id": db.log_id, "limit": 100})
    assert again["seq"] in {entry["seq"] for entry in log["entries"]}
    assert db.one("select verdict from sync.ledger where txn_id = %s", first["txn_id"]) == ending
