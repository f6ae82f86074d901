"""What follows from a person's decision: for the rest of its transaction, and for what waits."""

from __future__ import annotations

import pytest

from local_store.door import digest_of
from local_store.ops import Row, WireOp

from .conftest import Database, delete, new, update
from .parking import conflict_of, dead, held, in_conflict, park, parked_states, results, sent


def kinds(verdicts: list[Row]) -> list[str]:
    return [verdict["verdict"] for verdict in verdicts]


def resolve(db: Database, record: Row, choice: str, **more: object) -> Row:
    return db.call("sync_resolve_v1", {"id": record["id"], "choice": choice, **more})


def open_records(db: Database, transaction: Row) -> list[Row]:
    asked = {"txn_ids": [transaction["txn_id"]], "open": True}
    return db.call("sync_list_conflicts_v1", asked)["conflicts"]


def status_of(db: Database, row_id: str) -> str:
    return db.one("select status from sessions where id = %s", row_id)


def edited(db: Database, transaction: Row, **values: object) -> str:
    """Replace a parked transaction by one whose first op has other values; returns its txn_id."""
    [op, *others] = transaction["ops"]
    ops = [{**op, "values": {**op["values"], **values}}, *others]
    wire = [WireOp(o["table"], o["kind"], o["id"], o["values"]) for o in ops]
    asked = {"txn_id": transaction["txn_id"], "new_txn_id": new(), "ops": ops}
    [verdict] = db.call("sync_edit_v1", {**asked, "digest": digest_of(wire)})["results"]
    return verdict["txn_id"]


def on_two_rows(db: Database, user: str, **others: object) -> tuple[str, str, Row]:
    """A parked change of a row that somebody deleted, and of another."""
    gone, other = db.session(user), db.session(user)
    ops = [
        update("sessions", gone, db.version("sessions", gone), metadata={"n": 1}),
        update("sessions", other, db.version("sessions", other), **others),
    ]
    db.as_user(user, "delete from sessions where id = %s", gone)
    transaction = db.transaction(user, *ops)
    record = {
        "table": "sessions", "id": gone, "columns": ["metadata"], "policy": "merge",
        "mine": {"metadata": {"n": 1}}, "outcome": "manual",
    }  # fmt: skip
    asked = sent(transaction, [{"metadata": {}}, {"status": "active"}])
    park(db, {"transaction": asked, "state": "conflict", "records": [record]})
    return gone, other, transaction


def test_what_is_left_of_a_transaction_is_merged_with_what_it_replaced_itself(db, user):
    _, other, transaction = on_two_rows(db, user, status="finalized")
    db.as_user(user, "update sessions set metadata = '{\"x\": 1}' where id = %s", other)
    assert results(resolve(db, conflict_of(db, transaction), "theirs")) == [("applied", None)]
    assert status_of(db, other) == "finalized"


@pytest.mark.parametrize("has_heard", [True, False])
def test_what_is_left_of_a_transaction_outlives_a_delete_of_the_row_that_was_given_up(
    db, user, has_heard
):
    gone, _, transaction = on_two_rows(db, user, status="bogus")
    assert results(resolve(db, conflict_of(db, transaction), "theirs")) == [("rejected", None)]
    base, after = (None, []) if has_heard else ("chained", [transaction["txn_id"]])
    sent_next = db.transaction(user, delete("sessions", gone, base), after=after)
    assert kinds(db.send(sent_next)) == ["applied"]
    assert parked_states(db, transaction) == ["dead"]


def test_theirs_is_no_question_again_when_their_row_has_gone_since(db, user):
    row_id, transaction = in_conflict(
        db, user, mine={"status": "finalized"}, theirs="status = 'abandoned'"
    )
    record = conflict_of(db, transaction)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    assert results(resolve(db, record, "theirs"))[-1] == ("applied", None)
    assert open_records(db, transaction) == []


def test_a_conflict_after_a_decision_that_could_not_be_carried_out_is_open_again(db, user):
    row_id, absent = db.session(user), new()
    base = db.version("sessions", row_id)
    op = update("sessions", row_id, base, status="finalized")
    transaction = db.transaction(user, op, update("sessions", absent, base, status="active"))
    park(db, dead(transaction, [{"status": "active"}, {"status": "active"}]))
    asked = {"txn_ids": [transaction["txn_id"]]}
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", row_id)
    assert results(db.call("sync_retry_v1", asked)) == [("conflict", None)]
    assert results(resolve(db, conflict_of(db, transaction), "mine")) == [("held", None)]
    db.as_user(user, "update sessions set metadata = '{\"x\": 1}' where id = %s", row_id)
    assert results(db.call("sync_retry_v1", asked)) == [("conflict", None)]
    [record] = open_records(db, transaction)
    assert record["theirs"] == {"status": "abandoned"}


def test_mine_decides_nothing_for_what_its_author_wrote_next_without_knowing_theirs(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    park(db, dead(first, [{"status": "active"}]))
    op = update("sessions", row_id, "chained", metadata={"mine": 1})
    second = db.transaction(user, op, after=[first["txn_id"]])
    park(db, held(second, first["txn_id"], [{"metadata": {}}]))
    theirs = "update sessions set status = 'abandoned', metadata = '{\"theirs\": 1}' where id = %s"
    db.as_user(user, theirs, row_id)
    db.call("sync_retry_v1", {"txn_ids": [first["txn_id"]]})
    resolve(db, conflict_of(db, first), "mine")
    assert status_of(db, row_id) == "finalized"
    assert parked_states(db, second) == ["conflict"]
    [record] = open_records(db, second)
    assert record["theirs"] == {"metadata": {"theirs": 1}}


@pytest.mark.parametrize("last", ["arrived", "on its way", "edited", "edited twice"])
def test_a_record_of_a_row_that_moved_again_still_tells_of_what_waits_behind(db, user, last):
    """What waits was merged with the row that the first record was about: it asks nothing more.
    Also when the last that the record covers is still on its way, or somebody edited it.
    """
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    theirs = "update sessions set status = 'abandoned', metadata = '{\"theirs\": 1}' where id = %s"
    db.as_user(user, theirs, row_id)
    met = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    op = update("sessions", row_id, "chained", metadata={"mine": 1}, status="active")
    second = db.transaction(user, op, after=[first["txn_id"]])
    on_theirs = {"met": {f"sessions/{row_id}": met}}
    record = {
        "table": "sessions", "id": row_id, "columns": ["metadata", "status"], "policy": "merge",
        "base": {"metadata": {}, "status": "active"}, "theirs_version": met, "outcome": "manual",
        "mine": {"metadata": {"mine": 1}, "status": "active"},
        "theirs": {"metadata": {"theirs": 1}, "status": "abandoned"},
        "through": new() if last == "on its way" else second["txn_id"],
    }  # fmt: skip
    asked = {**sent(first, [{"status": "active"}]), **on_theirs}
    park(db, {"transaction": asked, "state": "conflict", "records": [record]})
    before = {"metadata": {"theirs": 1}, "status": "finalized"}
    park(db, held({**second, **on_theirs}, first["txn_id"], [before]))
    for number in range(last.count("edited") + last.count("twice")):
        record["mine"]["metadata"] = {"mine": number + 2}
        second["txn_id"] = edited(db, second, metadata=record["mine"]["metadata"])
    db.as_user(user, "update sessions set client = '{\"n\": 1}' where id = %s", row_id)

    assert results(resolve(db, conflict_of(db, first), "mine")) == [("conflict", None)]
    [renewed] = open_records(db, first)
    sides = ("columns", "base", "mine", "theirs")
    assert [renewed[side] for side in sides] == [record[side] for side in sides]
    assert results(resolve(db, renewed, "theirs")) == [("applied", None)] * 2
    kept = db.one("select to_jsonb(s) from sessions s where id = %s", row_id)
    assert (kept["status"], kept["metadata"]) == ("abandoned", {"theirs": 1})


def test_a_renewed_record_still_tells_of_what_a_delete_behind_would_take_along(db, user):
    row_id, first = in_conflict(
        db, user, mine={"status": "finalized"},
        theirs="status = 'abandoned', metadata = '{\"theirs\": 1}'",
    )  # fmt: skip
    op = delete("sessions", row_id, "chained")
    second = db.transaction(user, op, after=[first["txn_id"]])
    park(db, held(second, first["txn_id"]))
    db.query(
        "update sync.conflicts set columns = '{metadata,status}', through = %s,"
        " theirs = theirs || '{\"metadata\": {\"theirs\": 1}}' where txn_id = %s returning 1",
        second["txn_id"], first["txn_id"],
    )  # fmt: skip
    db.as_user(user, "update sessions set client = '{\"n\": 1}' where id = %s", row_id)
    assert results(resolve(db, conflict_of(db, first), "mine")) == [("conflict", None)]
    [renewed] = open_records(db, first)
    assert renewed["theirs"] == {"metadata": {"theirs": 1}, "status": "abandoned"}
    assert results(resolve(db, renewed, "theirs")) == [("applied", None)] * 2
    assert status_of(db, row_id) == "abandoned"


def test_a_delete_whose_row_moves_again_and_again_is_asked_about_each_time(db, user):
    row_id = db.session(user)
    transaction = db.transaction(user, delete("sessions", row_id, db.version("sessions", row_id)))
    park(db, dead(transaction))
    for status in ("finalized", "abandoned"):
        db.as_user(user, "update sessions set status = %s where id = %s", status, row_id)
        if status == "finalized":
            asked = db.call("sync_retry_v1", {"txn_ids": [transaction["txn_id"]]})
        else:
            asked = resolve(db, conflict_of(db, transaction), "mine")
        assert results(asked) == [("conflict", None)]
        [record] = open_records(db, transaction)
        assert (record["columns"], record["mine"] or {}) == ([], {})
    assert results(resolve(db, record, "mine")) == [("applied", None)]
    assert db.one("select count(*) from sessions where id = %s", row_id) == 0


def test_two_changes_of_one_row_have_one_record_of_both(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    ops = [
        update("sessions", row_id, base, status="finalized"),
        update("sessions", row_id, "chained", metadata={"mine": 1}),
    ]
    transaction = db.transaction(user, *ops)
    park(db, dead(transaction, [{"status": "active"}, {"metadata": {}}]))
    theirs = "update sessions set status = 'abandoned', metadata = '{\"theirs\": 1}' where id = %s"
    db.as_user(user, theirs, row_id)
    tried = db.call("sync_retry_v1", {"txn_ids": [transaction["txn_id"]]})
    assert results(tried) == [("conflict", None)]
    [record] = open_records(db, transaction)
    assert record["columns"] == ["metadata", "status"]
    assert record["theirs"] == {"metadata": {"theirs": 1}, "status": "abandoned"}


def test_a_renewed_record_leaves_out_what_nobody_disputes_any_more(db, user):
    mine = {"metadata": {"n": 1}, "status": "finalized"}
    row_id, transaction = in_conflict(
        db, user, mine=mine, theirs="status = 'abandoned', metadata = '{\"n\": 2}'"
    )
    db.as_user(user, "update sessions set metadata = '{\"n\": 1}' where id = %s", row_id)
    assert results(resolve(db, conflict_of(db, transaction), "mine")) == [("conflict", None)]
    assert [record["columns"] for record in open_records(db, transaction)] == [["status"]]


@pytest.mark.parametrize(
    "over", ["discarded", "discarded twice", "edited, discarded", "superseded"]
)
def test_what_comes_behind_something_that_came_to_nothing_keeps_its_place(db, user, over):
    """Its sender hasn't heard, and names the nearest: what that one waited for still waits."""
    row_id, other = db.session(user), db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, status="bogus"))
    park(db, dead(first, [{"status": "active"}]))
    beside = update("sessions", other, db.version("sessions", other), metadata={"n": 0})
    between, before = [], first
    for number in range(2 if over == "discarded twice" else 1):
        op = update("sessions", row_id, "chained", metadata={"n": number})
        between.append(db.transaction(user, op, beside, after=[before["txn_id"]]))
        park(db, held(between[-1], before["txn_id"], [{"metadata": {}}] * 2))
        before = between[-1]
    for transaction in between:
        txn_id = transaction["txn_id"]
        if over == "superseded":
            version = db.version("sessions", other)
            [gone] = db.send(db.transaction(user, delete("sessions", other, version)))
            assert gone["verdict"] == "applied"
        else:
            txn_id = edited(db, transaction) if over.startswith("edited") else txn_id
            db.call("sync_discard_v1", {"txn_ids": [txn_id]})
    op = update("sessions", row_id, "chained", metadata={"n": 3})
    last = db.transaction(user, op, after=[before["txn_id"]])
    [verdict] = db.send(last)
    assert (verdict["verdict"], verdict["blocked_by"]) == ("held", first["txn_id"])
    [verdict] = park(db, held(last, first["txn_id"], [{"metadata": {"n": 0}}]))
    assert (verdict["verdict"], verdict["state"]) == ("parked", "held")
    replacement = edited(db, first, status="finalized")
    retried = db.call("sync_retry_v1", {"txn_ids": [replacement]})
    assert results(retried)[:2] == [("applied", None)] * 2
    kept = db.one("select to_jsonb(s) from sessions s where id = %s", row_id)
    assert (kept["status"], kept["metadata"]) == ("finalized", {"n": 3})


def behind_an_edit(db: Database, user: str) -> tuple[str, Row, str]:
    """A dead letter that a person edited and hasn't retried yet."""
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    first = db.transaction(user, update("sessions", row_id, base, status="bogus"))
    park(db, dead(first, [{"status": "active"}]))
    return row_id, first, edited(db, first, status="finalized")


def test_what_comes_behind_an_edited_change_is_parked_and_goes_on_with_it(db, user):
    row_id, first, replacement = behind_an_edit(db, user)
    op = update("sessions", row_id, "chained", metadata={"n": 1})
    second = db.transaction(user, op, after=[first["txn_id"]])
    assert kinds(db.send(second)) == ["held"]
    [verdict] = park(db, held(second, first["txn_id"], [{"metadata": {}}]))
    assert (verdict["verdict"], verdict["state"]) == ("parked", "held")
    retried = db.call("sync_retry_v1", {"txn_ids": [replacement]})
    assert results(retried) == [("applied", None)] * 2


def test_a_delete_behind_an_edited_change_takes_it_along(db, user):
    row_id, first, replacement = behind_an_edit(db, user)
    op = delete("sessions", row_id, "chained")
    assert kinds(db.send(db.transaction(user, op, after=[first["txn_id"]]))) == ["applied"]
    assert parked_states(db, {"txn_id": replacement}) == ["superseded"]
    [resent] = db.send(first)
    assert (resent["verdict"], resent["state"]) == ("parked", "discarded")
