"""The ledger forgets what is old and final; what it may have forgotten is fenced, not repeated."""

from __future__ import annotations

import pytest

from local_store.ops import Row

from .conftest import Database, insert, new
from .parking import conflict_of, dead, in_conflict, park, results


@pytest.fixture
def db(fresh_supabase):
    """A server of its own: pruning and the audit look at all logs."""
    made = Database(fresh_supabase.database_url)
    yield made
    made.close()


def applied(db: Database, user: str) -> Row:
    transaction = db.transaction(user, insert("sessions", new()))
    assert db.send(transaction)[0]["verdict"] == "applied"
    return transaction


def floor_of(db: Database) -> int:
    return db.one("select floor_seq from sync.logs where log_id = %s", db.log_id)


def prune(db: Database, retention_s: float = 0) -> int:
    return db.call("sync_prune_v1", {"retention_s": retention_s})["pruned"]


def audit_of(db: Database) -> Row:
    [log] = db.call("sync_audit_v1", {"log_id": db.log_id})["logs"]
    return log


def test_old_final_transactions_are_forgotten_and_still_counted(db, user):
    for _ in range(3):
        applied(db, user)
    assert (prune(db), floor_of(db)) == (3, 3)
    assert db.one("select count(*) from sync.ledger where log_id = %s", db.log_id) == 0
    assert audit_of(db)["applied"] == 3


def test_young_ones_stay(db, user):
    applied(db, user)
    assert (prune(db, 3600), floor_of(db)) == (0, 0)


def test_the_floor_stops_below_a_position_that_is_still_under_way(db, user):
    applied(db, user)
    late = db.transaction(user, insert("sessions", new()))
    applied(db, user)
    assert (prune(db), floor_of(db)) == (1, 1)
    assert db.send(late)[0]["verdict"] == "applied"
    assert (prune(db), floor_of(db)) == (2, 3)


def test_the_floor_passes_over_parked_ones_which_stay(db, user):
    bad = db.transaction(user, insert("sessions", new(), status="bogus"))
    park(db, dead(bad))
    applied(db, user)
    assert (prune(db), floor_of(db)) == (1, 2)
    [verdict] = db.send(bad)
    assert (verdict["verdict"], verdict["state"]) == ("parked", "dead")
    log = audit_of(db)
    assert (log["applied"], log["dead"]) == (1, 1)


def test_what_the_ledger_may_have_forgotten_is_fenced_then_parked_and_decided_by_a_person(db, user):
    transaction = applied(db, user)
    prune(db)
    [verdict] = db.send(transaction)
    assert verdict["verdict"] == "fenced"
    park(db, {**dead(transaction), "sqlstate": None, "message": "fenced"})
    log = audit_of(db)
    assert (log["applied"], log["dead"]) == (0, 1)
    reply = db.call("sync_discard_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(reply) == [("parked", "discarded")]
    log = audit_of(db)
    assert (log["applied"], log["dead"], log["discarded"]) == (0, 0, 1)


def test_tombstones_are_forgotten_with_the_ledger(db, user):
    row_id = db.session(user)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    prune(db, 3600)
    assert db.query("select 1 from sync.tombstones where row_id = %s", row_id)
    prune(db)
    assert db.query("select 1 from sync.tombstones where row_id = %s", row_id) == []


def test_what_the_loser_of_a_conflict_wrote_outlives_every_pruning(db, user):
    mine, theirs = {"status": "finalized"}, "status = 'abandoned'"
    _, transaction = in_conflict(db, user, mine=mine, theirs=theirs)
    db.call("sync_resolve_v1", {"id": conflict_of(db, transaction)["id"], "choice": "theirs"})
    assert prune(db) > 0
    assert conflict_of(db, transaction)["mine"] == mine


def test_pruning_without_a_retention_is_refused(db):
    import psycopg

    with pytest.raises(psycopg.Error, match="retention_s"):
        db.call("sync_prune_v1", {})
