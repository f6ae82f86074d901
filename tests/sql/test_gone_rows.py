"""Rows that are gone, rows that aren't there yet, and what a delete takes along."""

from __future__ import annotations

import pytest

from local_store.ops import Row

from .conftest import Database, delete, insert, new, revision, update
from .parking import conflict_of

LONG_AGO = "2020-01-01T00:00:00+00:00"


def send_one(db: Database, user: str, op: Row, **changes: object) -> Row:
    [verdict] = db.send(db.transaction(user, op, **changes))
    return verdict


def deleted_session(db: Database, user: str) -> tuple[str, str]:
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    return row_id, base


def test_an_update_of_a_deleted_row_is_a_conflict_without_a_row(db, user):
    row_id, base = deleted_session(db, user)
    verdict = send_one(db, user, update("sessions", row_id, base, status="finalized"))
    assert (verdict["verdict"], verdict["rows"]) == ("conflict", {f"sessions/{row_id}": None})


def test_a_delete_of_a_deleted_row_is_applied(db, user):
    row_id, base = deleted_session(db, user)
    verdict = send_one(db, user, delete("sessions", row_id, base))
    assert verdict["verdict"] == "applied"


@pytest.mark.parametrize("make", [delete, update])
def test_a_row_that_never_was_is_waited_for(db, user, make):
    verdict = send_one(db, user, make("sessions", new(), LONG_AGO))
    assert (verdict["verdict"], verdict["sqlstate"], verdict["op"]) == ("held", "02000", 0)


def test_somebody_elses_deleted_row_looks_like_one_that_never_was(db, user, stranger):
    row_id, base = deleted_session(db, user)
    verdict = send_one(db, stranger, update("sessions", row_id, base, status="finalized"))
    assert (verdict["verdict"], verdict["sqlstate"]) == ("held", "02000")


def test_a_conflict_outranks_a_missing_row(db, user):
    row_id, base = deleted_session(db, user)
    absent = update("sessions", new(), LONG_AGO, status="finalized")
    [verdict] = db.send(db.transaction(user, absent, update("sessions", row_id, base)))
    assert verdict["verdict"] == "conflict"


def test_a_child_of_a_deleted_parent_is_a_conflict_that_names_the_parent(db, user):
    row_id, _ = deleted_session(db, user)
    verdict = send_one(db, user, revision(row_id))
    assert (verdict["verdict"], verdict["rows"]) == ("conflict", {f"sessions/{row_id}": None})


def test_a_child_of_a_parent_that_never_was_is_waited_for(db, user):
    verdict = send_one(db, user, revision(new()))
    assert (verdict["verdict"], verdict["sqlstate"]) == ("held", "23503")


def test_a_cascade_leaves_a_tombstone_for_each_child(db, user):
    row_id, child_id = db.session(user), new()
    send_one(db, user, revision(row_id, child_id))
    base = db.version("session_revisions", child_id)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    op = update("session_revisions", child_id, base, content="late")
    verdict = send_one(db, user, op)
    assert verdict["rows"] == {f"session_revisions/{child_id}": None}


def test_a_re_insert_clears_the_tombstone(db, user):
    row_id, _ = deleted_session(db, user)
    assert send_one(db, user, insert("sessions", row_id))["verdict"] == "applied"
    assert db.query("select 1 from sync.tombstones where row_id = %s", row_id) == []


def test_a_delete_records_the_children_that_its_author_did_not_know(db, user):
    row_id, known, strange = db.session(user), new(), new()
    send_one(db, user, revision(row_id, known))
    send_one(db, user, revision(row_id, strange, content="from elsewhere"))
    op = delete("sessions", row_id, db.version("sessions", row_id))
    version = db.version("session_revisions", known)
    op["children"] = {f"session_revisions/{known}": version}
    transaction = db.transaction(user, op)
    assert db.send(transaction)[0]["verdict"] == "applied"
    record = conflict_of(db, transaction)
    assert record["outcome"] == "deleted"
    assert set(record["theirs"]) == {f"session_revisions/{strange}"}
    assert record["theirs"][f"session_revisions/{strange}"]["content"] == "from elsewhere"


def test_a_delete_records_a_child_that_changed_since_its_author_saw_it(db, user):
    row_id, child = db.session(user), new()
    send_one(db, user, revision(row_id, child))
    version = db.version("session_revisions", child)
    db.as_user(user, "update session_revisions set content = 'edited' where id = %s", child)
    op = delete("sessions", row_id, db.version("sessions", row_id))
    op["children"] = {f"session_revisions/{child}": version}
    transaction = db.transaction(user, op)
    db.send(transaction)
    assert set(conflict_of(db, transaction)["theirs"]) == {f"session_revisions/{child}"}


def test_a_delete_of_known_children_records_nothing(db, user):
    row_id, child, pending = db.session(user), new(), new()
    send_one(db, user, revision(row_id, child))
    send_one(db, user, revision(row_id, pending))
    op = delete("sessions", row_id, db.version("sessions", row_id))
    version = db.version("session_revisions", child)
    op["children"] = {
        f"session_revisions/{child}": version, f"session_revisions/{pending}": None,
    }  # fmt: skip
    transaction = db.transaction(user, op)
    db.send(transaction)
    asked = {"txn_ids": [transaction["txn_id"]]}
    assert db.call("sync_list_conflicts_v1", asked)["conflicts"] == []
