"""What follows a change that was merged since, or came to nothing: late requests, old segments."""

from __future__ import annotations

import pytest

from local_store.ops import Row

from .conftest import Database, delete, new, revision, update
from .parking import dead, held, park


def kinds(verdicts: list[Row]) -> list[str]:
    return [verdict["verdict"] for verdict in verdicts]


def overtaken(db: Database, user: str) -> tuple[str, list[Row], Row]:
    """Return a row, two changes of it as they were sent first, and the first as it was merged."""
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, metadata={"n": 1}))
    second = db.transaction(
        user, update("sessions", row_id, "chained", status="finalized"), after=[first["txn_id"]]
    )
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", row_id)
    met = db.version("sessions", row_id)
    merged = {
        **first,
        "ops": [update("sessions", row_id, met, metadata={"n": 1})],
        "met": {f"sessions/{row_id}": met},
    }
    return row_id, [first, second], merged


def status_of(db: Database, row_id: str) -> str:
    return db.one("select status from sessions where id = %s", row_id)


def test_what_was_sent_before_a_merge_does_not_follow_what_was_sent_after_it(db, user):
    row_id, late, merged = overtaken(db, user)
    assert kinds(db.send(merged)) == ["applied"]
    verdicts = db.send(*late)
    assert kinds(verdicts) == ["duplicate", "conflict"]
    assert verdicts[1]["rows"][f"sessions/{row_id}"]["status"] == "abandoned"
    assert status_of(db, row_id) == "abandoned"


def test_nor_does_it_when_it_comes_alone(db, user):
    row_id, late, merged = overtaken(db, user)
    db.send(merged)
    assert kinds(db.send(late[1])) == ["conflict"]
    assert status_of(db, row_id) == "abandoned"


def test_a_delete_sent_before_a_merge_does_not_follow_it_either(db, user):
    row_id, late, merged = overtaken(db, user)
    end = {**late[1], "ops": [delete("sessions", row_id, "chained")]}
    db.send(merged)
    assert kinds(db.send(late[0], end)) == ["duplicate", "conflict"]
    assert status_of(db, row_id) == "abandoned"


def test_what_a_merge_dropped_from_its_transaction_is_followed_by_nothing(db, user):
    row_id, late, merged = overtaken(db, user)
    assert kinds(db.send({**merged, "ops": []})) == ["applied"]
    assert kinds(db.send(*late)) == ["duplicate", "conflict"]
    assert status_of(db, row_id) == "abandoned"


@pytest.mark.parametrize("together", [True, False])
def test_what_went_through_the_same_merge_follows(db, user, together):
    row_id, late, merged = overtaken(db, user)
    second = {**late[1], "met": merged["met"]}
    if together:
        assert kinds(db.send(merged, second)) == ["applied", "applied"]
    else:
        assert kinds(db.send(merged)) == ["applied"]
        assert kinds(db.send(merged, second)) == ["duplicate", "applied"]
    assert status_of(db, row_id) == "finalized"


def test_a_mark_ends_with_the_next_change_that_has_none(db, user):
    row_id, late, merged = overtaken(db, user)
    second = {**late[1], "met": merged["met"]}
    db.send(merged, second)
    base = db.version("sessions", row_id)
    third = db.transaction(user, update("sessions", row_id, base, status="active"))
    fourth = db.transaction(
        user, update("sessions", row_id, "chained", metadata={}), after=[third["txn_id"]]
    )
    assert kinds(db.send(merged, third, fourth)) == ["duplicate", "applied", "applied"]


def test_what_waits_behind_a_retried_change_meets_what_that_was_merged_with(db, user):
    row_id, [first, second], _ = overtaken(db, user)
    park(db, dead(first, [{"metadata": {}}]))
    park(db, held(second, first["txn_id"], [{"status": "active"}]))
    results = db.call("sync_retry_v1", {"txn_ids": [first["txn_id"]]})["results"]
    assert kinds(results) == ["applied", "conflict"]
    assert status_of(db, row_id) == "abandoned"
    recorded = db.query("select outcome from sync.conflicts where txn_id = %s", second["txn_id"])
    assert [record["outcome"] for record in recorded] == ["manual"]


def test_what_waits_behind_a_retried_change_goes_along_where_nobody_else_wrote(db, user):
    row_id, [first, _], _ = overtaken(db, user)
    third = db.transaction(
        user,
        update("sessions", row_id, "chained", metadata={"n": 2}),
        after=[first["txn_id"]],
    )
    park(db, dead(first, [{"metadata": {}}]))
    park(db, held(third, first["txn_id"], [{"metadata": {"n": 1}}]))
    results = db.call("sync_retry_v1", {"txn_ids": [first["txn_id"]]})["results"]
    assert kinds(results) == ["applied", "applied"]
    assert db.one("select metadata from sessions where id = %s", row_id) == {"n": 2}


def test_what_waits_behind_a_change_that_a_retry_merged_in_vain_meets_the_row_by_itself(db, user):
    row_id, [first, second], _ = overtaken(db, user)
    bad = {**first, "ops": [{**first["ops"][0], "values": {"source": "bogus"}}]}
    park(db, dead(bad, [{"source": "prompt"}]))
    park(db, held(second, bad["txn_id"], [{"status": "active"}]))
    results = db.call("sync_retry_v1", {"txn_ids": [bad["txn_id"]]})["results"]
    assert kinds(results) == ["rejected"]
    results = db.call("sync_discard_v1", {"txn_ids": [bad["txn_id"]]})["results"]
    assert kinds(results) == ["parked", "conflict"]
    assert status_of(db, row_id) == "abandoned"


# -- behind what came to nothing --


def parked_update(db: Database, user: str) -> tuple[str, Row, Row]:
    """Return a row, a parked change of it, and another change that follows it."""
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, metadata={"n": 1}))
    second = db.transaction(
        user, update("sessions", row_id, "chained", status="finalized"), after=[first["txn_id"]]
    )
    park(db, dead(first, [{"metadata": {}}]))
    assert kinds(db.send(second)) == ["held"]
    return row_id, first, second


def test_what_follows_a_discarded_change_meets_the_row_by_itself(db, user):
    row_id, first, second = parked_update(db, user)
    child = db.transaction(user, revision(row_id), after=[first["txn_id"]])
    db.call("sync_discard_v1", {"txn_ids": [first["txn_id"]]})
    verdicts = db.send(second, child)
    assert kinds(verdicts) == ["conflict", "applied"]
    assert verdicts[0]["rows"][f"sessions/{row_id}"]["status"] == "active"


def test_what_follows_a_superseded_change_meets_the_rows_end(db, user):
    row_id, _, second = parked_update(db, user)
    base = db.version("sessions", row_id)
    assert kinds(db.send(db.transaction(user, delete("sessions", row_id, base)))) == ["applied"]
    [verdict] = db.send(second)
    assert (verdict["verdict"], verdict["rows"]) == ("conflict", {f"sessions/{row_id}": None})


def test_what_follows_an_edited_change_waits_for_the_edit(db, user):
    _, first, second = parked_update(db, user)
    db.call(
        "sync_edit_v1",
        {"txn_id": first["txn_id"], "new_txn_id": new(), "digest": "d", "ops": first["ops"]},
    )
    assert kinds(db.send(second)) == ["held"]


def test_nobody_elses_end_frees_anything(db, user, stranger):
    _, first, _ = parked_update(db, user)
    foreign = db.session(stranger)
    base = db.version("sessions", foreign)
    op = update("sessions", foreign, base, status="finalized")
    assert kinds(db.send(db.transaction(stranger, op, after=[first["txn_id"]]))) == ["held"]
    db.call("sync_discard_v1", {"txn_ids": [first["txn_id"]]})
    assert kinds(db.send(db.transaction(stranger, op, after=[first["txn_id"]]))) == ["held"]
