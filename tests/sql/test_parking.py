"""Dead letters on the server: parked once, held dependants, retried, edited, discarded, audited."""

from __future__ import annotations

import psycopg
import pytest

from local_store.door import digest_of
from local_store.ops import Row, WireOp

from .conftest import Database, delete, insert, new, revision, update
from .parking import dead, held, park, parked_states, poison, results, sent


def kinds(verdicts: list[Row]) -> list[str]:
    return [verdict["verdict"] for verdict in verdicts]


def waiting_behind(db: Database, user: str) -> tuple[str, Row, Row, Row]:
    """A dead insert, and behind it an update of the row and a child; all parked."""
    row_id, first = poison(db, user)
    after = [first["txn_id"]]
    edit = db.transaction(
        user, update("sessions", row_id, "chained", metadata={"n": 1}), after=after
    )
    child = db.transaction(user, revision(row_id), after=[edit["txn_id"]])
    assert [v["blocked_by"] for v in db.send(edit, child)] == [*after, edit["txn_id"]]
    verdicts = park(db, held(edit, first["txn_id"]), held(child, edit["txn_id"]))
    assert kinds(verdicts) == ["parked"] * 2
    return row_id, first, edit, child


def edited(db: Database, transaction: Row, **values: object) -> tuple[str, Row]:
    """Edit the first op of a parked transaction."""
    [op, *others] = transaction["ops"]
    ops = [{**op, "values": {**op["values"], **values}}, *others]
    wire = [WireOp(o["table"], o["kind"], o["id"], o["values"]) for o in ops]
    txn_id = new()
    asked = {"txn_id": transaction["txn_id"], "new_txn_id": txn_id, "ops": ops}
    return txn_id, db.call("sync_edit_v1", {**asked, "digest": digest_of(wire)})


def audit_of(db: Database, log_id: str | None = None) -> Row:
    [log] = db.call("sync_audit_v1", {"log_id": log_id or db.log_id})["logs"]
    return log


def test_parking_is_idempotent_and_a_resend_hears_that_it_is_parked(db, user):
    _, transaction = poison(db, user)
    assert kinds(park(db, dead(transaction))) == ["parked"]
    [verdict] = db.send(transaction)
    assert (verdict["verdict"], verdict["state"], verdict["sqlstate"]) == (
        "parked", "dead", "23514",
    )  # fmt: skip
    assert db.one("select count(*) from sync.parked where txn_id = %s", transaction["txn_id"]) == 1


def test_what_was_applied_is_never_parked(db, user):
    transaction = db.transaction(user, insert("sessions", new()))
    db.send(transaction)
    assert kinds(park(db, dead(transaction))) == ["duplicate"]
    assert parked_states(db, transaction) == [None]


def test_a_held_transaction_is_parked_only_while_what_it_waits_for_is(db, user):
    transaction = db.transaction(user, insert("sessions", new()), after=[new()])
    [verdict] = park(db, held(transaction, transaction["after"][0]))
    assert verdict["verdict"] == "held"
    assert parked_states(db, transaction) == [None]


def test_an_edited_dead_letter_is_applied_with_all_that_waited_for_it(db, user):
    row_id, first, edit, child = waiting_behind(db, user)
    new_id, reply = edited(db, first, status="active")
    assert results(reply) == [("parked", "dead")]
    assert db.send(first)[0]["state"] == "dead"  # not discarded before its successor is there
    assert results(db.call("sync_retry_v1", {"txn_ids": [new_id]})) == [("applied", None)] * 3
    assert parked_states(db, first, edit, child) == [None] * 3
    assert kinds(db.send(edit, child)) == ["duplicate"] * 2
    [resent] = db.send(first)
    assert (resent["verdict"], resent["state"]) == ("parked", "discarded")
    assert resent["rows"][f"sessions/{row_id}"]["metadata"] == {"n": 1}
    assert db.one("select revision_count from sessions where id = %s", row_id) == 1


def test_an_edit_of_what_was_applied_meanwhile_is_refused(db, user):
    transaction = db.transaction(user, insert("sessions", new()))
    db.send(transaction)
    with pytest.raises(psycopg.Error, match="already_applied"):
        edited(db, transaction, status="finalized")


def test_an_edit_may_not_add_ops(db, user):
    _, transaction = poison(db, user)
    asked = {"txn_id": transaction["txn_id"], "new_txn_id": new(), "digest": "", "ops": []}
    with pytest.raises(psycopg.Error, match="can't add or remove"):
        db.call("sync_edit_v1", asked)


def test_a_retry_that_is_refused_again_stays_and_counts_its_attempts(db, user):
    _, transaction = poison(db, user)
    reply = db.call("sync_retry_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(reply) == [("rejected", None)]
    [row] = db.query("select * from sync.parked where txn_id = %s", transaction["txn_id"])
    assert (row["state"], row["sqlstate"], row["attempts"]) == ("dead", "23514", 2)


def test_a_retry_takes_effect_as_the_author(db, user, stranger):
    row_id = db.session(user)
    op = update("sessions", row_id, db.version("sessions", row_id), status="finalized")
    theft = db.transaction(stranger, op)
    assert kinds(park(db, dead(theft))) == ["parked"]
    reply = db.call("sync_retry_v1", {"txn_ids": [theft["txn_id"]]})
    assert reply["results"][0]["sqlstate"] == "42501"
    assert db.one("select status from sessions where id = %s", row_id) == "active"


def test_a_discarded_transaction_never_takes_effect_however_late_it_arrives(db, user):
    row_id, transaction = poison(db, user)
    reply = db.call("sync_discard_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(reply) == [("parked", "discarded")]
    [late] = db.send(transaction)
    assert (late["verdict"], late["state"]) == ("parked", "discarded")
    assert late["rows"] == {f"sessions/{row_id}": None}
    with pytest.raises(psycopg.Error, match="already_discarded"):
        db.call("sync_discard_v1", {"txn_ids": [transaction["txn_id"]]})


def test_what_waited_for_a_discarded_update_goes_on_from_where_that_one_began(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    bad = db.transaction(user, update("sessions", row_id, base, status="bogus"))
    op = update("sessions", row_id, "chained", metadata={"n": 2})
    good = db.transaction(user, op, after=[bad["txn_id"]])
    park(db, dead(bad), held(good, bad["txn_id"]))
    reply = db.call("sync_discard_v1", {"txn_ids": [bad["txn_id"]]})
    assert results(reply) == [("parked", "discarded"), ("applied", None)]
    [row] = db.query("select status, metadata from sessions where id = %s", row_id)
    assert row == {"status": "active", "metadata": {"n": 2}}


def test_what_waited_for_a_discarded_insert_is_left_for_a_person(db, user):
    _, first, edit, child = waiting_behind(db, user)
    db.call("sync_discard_v1", {"txn_ids": [first["txn_id"]]})
    assert parked_states(db, first, edit, child) == [None, "dead", "held"]


def test_a_delete_by_the_author_supersedes_what_is_parked_on_its_rows(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    bad = db.transaction(user, update("sessions", row_id, base, status="bogus"))
    child = db.transaction(user, revision(row_id), after=[bad["txn_id"]])
    park(db, dead(bad), held(child, bad["txn_id"]))
    end = db.transaction(user, delete("sessions", row_id, "chained"), after=[child["txn_id"]])
    end["after"] = [bad["txn_id"]]
    assert kinds(db.send(end)) == ["applied"]
    assert parked_states(db, bad, child) == ["superseded"] * 2
    [resent] = db.send(bad)
    assert (resent["state"], resent["rows"]) == ("superseded", {f"sessions/{row_id}": None})


def test_a_delete_of_a_row_that_only_a_dead_insert_made_is_applied(db, user):
    row_id, first = poison(db, user)
    end = db.transaction(user, delete("sessions", row_id, "chained"), after=[first["txn_id"]])
    assert kinds(db.send(end)) == ["applied"]
    assert parked_states(db, first) == ["superseded"]


def test_a_delete_behind_a_dead_change_of_an_applied_row_finds_that_row(db, user):
    row_id = new()
    made = db.transaction(user, insert("sessions", row_id, metadata={}))
    bad = db.transaction(
        user, update("sessions", row_id, "chained", status="poison"), after=[made["txn_id"]]
    )
    assert kinds(db.send(made, bad)) == ["applied", "rejected"]
    assert kinds(park(db, dead(bad))) == ["parked"]
    gone = db.transaction(user, delete("sessions", row_id, "chained"), after=[bad["txn_id"]])
    assert kinds(db.send(gone)) == ["applied"]
    assert db.one("select count(*) from public.sessions where id = %s", row_id) == 0


def test_a_delete_whose_ground_the_ledger_forgot_is_a_conflict_and_stops_nobody(db, user):
    row_id = new()
    made = db.transaction(user, insert("sessions", row_id, metadata={}))
    bad = db.transaction(
        user, update("sessions", row_id, "chained", status="poison"), after=[made["txn_id"]]
    )
    db.send(made, bad)
    park(db, dead(bad))
    db.one("delete from sync.ledger where txn_id = %s returning 1", made["txn_id"])
    gone = db.transaction(user, delete("sessions", row_id, "chained"), after=[bad["txn_id"]])
    other = db.transaction(user, insert("sessions", new(), metadata={}))
    assert kinds(db.send(gone, other)) == ["conflict", "applied"]


def test_a_strangers_delete_supersedes_nothing(db, user, stranger):
    _, first = poison(db, user)
    theirs = db.session(stranger)
    end = db.transaction(
        stranger, delete("sessions", theirs, db.version("sessions", theirs)),
        after=[first["txn_id"]],
    )  # fmt: skip
    assert kinds(db.send(end)) == ["held"]
    assert parked_states(db, first) == ["dead"]


def test_a_transaction_parked_through_one_log_is_recognised_through_another(db, user):
    _, transaction = poison(db, user)
    other = new()
    [verdict] = db.send({**transaction, "seq": 9}, log_id=other)
    assert (verdict["verdict"], verdict["state"]) == ("parked", "dead")
    assert audit_of(db, other)["dead"] == 1


def test_a_duplicate_through_another_log_has_a_place_in_that_log_too(db, user):
    transaction = db.transaction(user, insert("sessions", new()))
    other = new()
    db.send(transaction)
    assert kinds(db.send({**transaction, "seq": 1}, log_id=other)) == ["duplicate"]
    assert audit_of(db, other)["applied"] == 1
    fresh = db.transaction(user, insert("sessions", new()), seq=1)
    [verdict] = db.send(fresh, log_id=other)
    assert verdict["sqlstate"] == "SYT02"


def test_the_audit_counts_each_position_once_in_its_state(db, user):
    log_id = db.log_id
    _, first, _, _ = waiting_behind(db, user)
    db.session(user)
    _, gone = poison(db, user)
    db.call("sync_discard_v1", {"txn_ids": [gone["txn_id"]]})
    new_id, _ = edited(db, first, status="active")
    log = audit_of(db, log_id)
    assert {name: log[name] for name in ("applied", "dead", "held", "discarded")} == {
        "applied": 1, "dead": 0, "held": 2, "discarded": 2,
    }  # fmt: skip
    assert log["acknowledged_seq"] == 5
    db.call("sync_retry_v1", {"txn_ids": [new_id]})
    assert audit_of(db, log_id)["applied"] == 3


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize(
    "function",
    ["park", "retry", "discard", "edit", "resolve", "list_parked", "list_conflicts", "prune"],
)
def test_nobody_but_the_service_role_may_touch_parked_work(db, user, role, function):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.as_role(role, user, f"select public.sync_{function}_v1('{{}}'::jsonb)")


def test_a_list_without_full_shows_no_values(db, user):
    _, transaction = poison(db, user)
    asked: Row = {"txn_ids": [transaction["txn_id"]]}
    [brief] = db.call("sync_list_parked_v1", asked)["parked"]
    assert brief["item"] is None
    [whole] = db.call("sync_list_parked_v1", {**asked, "full": True})["parked"]
    assert whole["item"]["ops"] == sent(transaction)["ops"]


def test_a_list_without_full_shows_no_message_that_quotes_a_value(db, user):
    transaction = db.transaction(user, insert("sessions", new(), finalized_at="private words"))
    [verdict] = db.send(transaction)
    assert "private words" in verdict["message"]
    park(db, {**dead(transaction), "sqlstate": verdict["sqlstate"], "message": verdict["message"]})
    asked: Row = {"txn_ids": [transaction["txn_id"]]}
    [brief] = db.call("sync_list_parked_v1", asked)["parked"]
    assert (brief["sqlstate"], brief["message"]) == ("22007", None)
    [whole] = db.call("sync_list_parked_v1", {**asked, "full": True})["parked"]
    assert "private words" in whole["message"]
