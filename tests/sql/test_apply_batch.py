"""The batch RPC, verdict by verdict, and what happens with each of its defences removed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.sql.conftest import Database, delete, insert, new, revision, update


def kinds(verdicts) -> list[str]:
    return [verdict["verdict"] for verdict in verdicts]


# -- applied and duplicate --


def test_an_applied_transaction_is_in_the_ledger_with_its_versions(db, user):
    row_id = new()
    sent = db.transaction(user, insert("sessions", row_id))
    [verdict] = db.send(sent)
    assert verdict["verdict"] == "applied"
    assert verdict["versions"] == {f"sessions/{row_id}": db.version("sessions", row_id)}
    [entry] = db.query("select * from sync.ledger where txn_id = %s", sent["txn_id"])
    assert (entry["seq"], str(entry["user_id"])) == (sent["seq"], user)
    assert entry["versions"] == verdict["versions"]


def resend_twice(db: Database, user: str) -> None:
    """Send an insert of a child twice, with the reply of the first lost."""
    session = db.session(user)
    sent = db.transaction(user, revision(session), revision(session))
    first, again = db.send(sent), db.send(sent)
    assert kinds(first) == ["applied"]
    assert kinds(again) == ["duplicate"]
    assert again[0]["versions"] == first[0]["versions"]
    assert db.one("select revision_count from sessions where id = %s", session) == 2


def test_a_transaction_sent_again_is_a_duplicate_without_a_second_effect(db, user):
    resend_twice(db, user)


def test_a_duplicate_brings_the_rows_as_they_are_now(db, user):
    row_id = new()
    sent = db.transaction(user, insert("sessions", row_id))
    db.send(sent)
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", row_id)
    [verdict] = db.send(sent)
    assert verdict["rows"][f"sessions/{row_id}"]["status"] == "abandoned"


def test_a_duplicate_tells_what_was_left_to_the_table_as_it_was_at_once(db, user):
    row_id = new()
    sent = db.transaction(user, insert("sessions", row_id, source="reverse_mode"))
    [first] = db.send(sent)
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", row_id)
    [again] = db.send(sent)
    assert again["defaults"] == first["rows"]
    told = again["defaults"][f"sessions/{row_id}"]
    assert (told["status"], told["metadata"]) == ("active", {})
    assert told.keys().isdisjoint({"source", "updated_at", "revision_count"})


def test_so_does_one_that_went_the_long_way(db, user):
    row_id = new()
    gone = new()
    db.send(db.transaction(user, insert("sessions", gone)))
    gone_too = delete("sessions", gone, db.version("sessions", gone))
    sent = db.transaction(user, insert("sessions", row_id), gone_too)
    [first], [again] = db.send(sent), db.send(sent)
    assert first["rows"].keys() == {f"sessions/{row_id}"}
    assert again["defaults"] == first["rows"]


def test_an_update_sent_again_does_not_move_the_version(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    sent = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    db.send(sent)
    version = db.version("sessions", row_id)
    assert kinds(db.send(sent)) == ["duplicate"]
    assert db.version("sessions", row_id) == version


def test_somebody_elses_txn_id_is_refused_and_reveals_nothing(db, user, stranger):
    sent = db.transaction(user, insert("sessions", new()))
    db.send(sent)
    [verdict] = db.send({**sent, "user_id": stranger})
    assert (verdict["verdict"], verdict["rows"], verdict["versions"]) == ("rejected", {}, {})


def test_the_same_txn_id_with_other_content_is_refused(db, user):
    sent = db.transaction(user, insert("sessions", new()))
    db.send(sent)
    [verdict] = db.send({**sent, "digest": "other"})
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "SYT01")


def test_a_seq_that_was_applied_under_another_id_is_refused(db, user):
    sent = db.transaction(user, insert("sessions", new()))
    db.send(sent)
    [verdict] = db.send({**db.transaction(user, insert("sessions", new())), "seq": sent["seq"]})
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "SYT02")


def test_a_transaction_without_ops_is_applied(db, user):
    assert kinds(db.send(db.transaction(user))) == ["applied"]


def test_an_abandoned_first_attempt_and_its_retry_make_one_effect(db, local_supabase, user):
    session = db.session(user)
    sent = db.transaction(user, revision(session))

    def attempt(_: int) -> str:
        other = Database(local_supabase.database_url)
        try:
            return other.send(sent, log_id=db.log_id)[0]["verdict"]
        finally:
            other.close()

    with ThreadPoolExecutor(6) as pool:
        seen = sorted(pool.map(attempt, range(6)))
    assert seen == ["applied"] + ["duplicate"] * 5
    assert db.one("select revision_count from sessions where id = %s", session) == 1


# -- order --


def test_a_transaction_whose_predecessor_is_missing_is_held(db, user):
    missing = new()
    [verdict] = db.send(db.transaction(user, insert("sessions", new()), after=[missing]))
    assert (verdict["verdict"], verdict["blocked_by"]) == ("held", missing)
    assert db.query("select 1 from sync.ledger where txn_id = %s", verdict["txn_id"]) == []


def test_dependants_of_a_refused_transaction_are_held_and_the_rest_applied(db, user):
    row_id, other = new(), new()
    bad = db.transaction(user, insert("sessions", row_id, status="bogus"))
    child = db.transaction(user, revision(row_id), after=[bad["txn_id"]])
    good = db.transaction(user, insert("sessions", other))
    verdicts = db.send(bad, child, good)
    assert kinds(verdicts) == ["rejected", "held", "applied"]
    assert verdicts[1]["blocked_by"] == bad["txn_id"]


def test_a_chain_of_edits_in_one_batch_applies_in_order(db, user):
    row_id = new()
    made = db.transaction(user, insert("sessions", row_id))
    chain, before = [made], made["txn_id"]
    for number in range(4):
        op = update("sessions", row_id, "chained", metadata={"n": number})
        chain.append(db.transaction(user, op, after=[before]))
        before = chain[-1]["txn_id"]
    assert kinds(db.send(*chain)) == ["applied"] * 5
    assert db.one("select metadata from sessions where id = %s", row_id) == {"n": 3}


def test_chained_works_after_a_half_lost_batch(db, user):
    row_id = new()
    made = db.transaction(user, insert("sessions", row_id))
    op = update("sessions", row_id, "chained", status="finalized")
    edit = db.transaction(user, op, after=[made["txn_id"]])
    db.send(made)
    assert kinds(db.send(made, edit)) == ["duplicate", "applied"]


def test_chained_finds_its_predecessor_in_the_ledger_alone(db, user):
    row_id = new()
    made = db.transaction(user, insert("sessions", row_id))
    op = update("sessions", row_id, "chained", status="finalized")
    db.send(made)
    assert kinds(db.send(db.transaction(user, op, after=[made["txn_id"]]))) == ["applied"]


@pytest.mark.parametrize("given", [{"base": "chained"}, {}])
def test_an_op_without_anything_to_build_on_fails_the_call(db, user, given):
    row_id = db.session(user)
    op = {"table": "sessions", "kind": "update", "id": row_id, "values": {"status": "finalized"}}
    with pytest.raises(psycopg.Error) as raised:
        db.send(db.transaction(user, {**op, **given}))
    assert raised.value.sqlstate == "SYP01"


def test_a_base_of_null_meets_any_row_as_a_surprise(db, user):
    row_id = db.session(user)
    sent = db.transaction(user, update("sessions", row_id, None, status="finalized"))
    [verdict] = db.send(sent)
    assert verdict["verdict"] == "conflict"
    assert verdict["rows"][f"sessions/{row_id}"]["status"] == "active"


# -- conflict --


def test_a_stale_base_is_a_conflict_with_the_current_row(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", row_id)
    sent = db.transaction(user, update("sessions", row_id, base, status="finalized"))
    [verdict] = db.send(sent)
    assert verdict["verdict"] == "conflict"
    assert verdict["rows"][f"sessions/{row_id}"]["status"] == "abandoned"
    assert db.query("select 1 from sync.ledger where txn_id = %s", sent["txn_id"]) == []


def test_a_session_edited_with_child_inserts_around_it_has_no_false_conflict(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    verdicts = db.send(
        db.transaction(user, revision(row_id)),
        db.transaction(user, update("sessions", row_id, base, metadata={"a": 1})),
        db.transaction(user, revision(row_id)),
    )
    assert kinds(verdicts) == ["applied"] * 3


@pytest.mark.parametrize("form", ["+00:00", "Z", "zeros", "berlin"])
def test_the_form_of_a_timestamp_makes_no_conflict(db, user, form):
    row_id = db.session(user)
    with db.owner.transaction():
        db.owner.execute("set local session_replication_role = replica")
        db.owner.execute(
            "update sessions set updated_at = '2026-01-01T10:00:00.1+00' where id = %s", (row_id,)
        )
    base = {
        "+00:00": "2026-01-01T10:00:00.1+00:00",
        "Z": "2026-01-01T10:00:00.1Z",
        "zeros": "2026-01-01T10:00:00.100000+00:00",
        "berlin": "2026-01-01T11:00:00.1+01:00",
    }[form]
    op = update("sessions", row_id, base, status="finalized")
    assert kinds(db.send(db.transaction(user, op))) == ["applied"]


def test_a_conflict_outranks_a_refusal_whatever_the_order_of_ops(db, user):
    stale, row_id = db.session(user), new()
    old = "2001-01-01T00:00:00+00:00"
    bad, conflict = insert("sessions", row_id, status="bogus"), delete("sessions", stale, old)
    assert kinds(db.send(db.transaction(user, bad, conflict))) == ["conflict"]
    assert kinds(db.send(db.transaction(user, conflict, bad))) == ["conflict"]


def test_an_insert_of_an_existing_id_is_a_conflict_for_its_owner_only(db, user, stranger):
    row_id = db.session(user)
    [mine] = db.send(db.transaction(user, insert("sessions", row_id)))
    [theirs] = db.send(db.transaction(stranger, insert("sessions", row_id)))
    assert (mine["verdict"], theirs["verdict"]) == ("conflict", "rejected")
    assert theirs["rows"] == {}


def test_an_update_of_a_row_that_is_gone_is_a_conflict_with_no_row(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    db.as_user(user, "delete from sessions where id = %s", row_id)
    [verdict] = db.send(db.transaction(user, update("sessions", row_id, base, status="finalized")))
    assert verdict["verdict"] == "conflict"
    assert verdict["rows"] == {f"sessions/{row_id}": None}


# -- rejected and held: one at a time, the others applied --


@pytest.mark.parametrize(
    ("op", "sqlstate"),
    [
        (lambda s: insert("sessions", new(), status="bogus"), "23514"),
        (lambda s: revision(s, content=None), "23502"),
        (lambda s: revision(s, created_at="2001-01-01"), "22023"),
        (lambda s: insert("sessions", new(), revision_count=5), "22023"),
        (lambda s: insert("sessions", new(), user_id=new()), "22023"),
        (lambda s: insert("sessions", "not a uuid"), "22P02"),
        (lambda s: insert("sessions", new(), current_draft_id="no uuid"), "22P02"),
        (lambda s: update("sessions", s, "not a time", status="active"), "22007"),
    ],
)
def test_one_poison_transaction_is_rejected_and_the_others_are_applied(db, user, op, sqlstate):
    session = db.session(user)
    good = [db.transaction(user, revision(session)) for _ in range(4)]
    bad = db.transaction(user, revision(session), op(session))
    verdicts = db.send(*good[:2], bad, *good[2:])
    assert kinds(verdicts) == ["applied", "applied", "rejected", "applied", "applied"]
    assert verdicts[2]["sqlstate"] == sqlstate
    assert db.one("select revision_count from sessions where id = %s", session) == 4


@pytest.mark.parametrize(
    ("op", "sqlstate"),
    [
        (lambda: revision(new()), "23503"),
        (lambda: insert("sessions", new(), no_such_column=1), "42703"),
        (lambda: insert("no_such_table", new()), "42P01"),
    ],
)
def test_what_may_heal_by_itself_is_held_with_its_sqlstate(db, user, op, sqlstate):
    verdicts = db.send(db.transaction(user, op()), db.transaction(user, insert("sessions", new())))
    assert kinds(verdicts) == ["held", "applied"]
    assert verdicts[0]["sqlstate"] == sqlstate


def test_the_failing_op_is_named_by_its_index(db, user):
    session = db.session(user)
    ops = (revision(session), revision(session), revision(session, content=None))
    assert db.send(db.transaction(user, *ops))[0]["op"] == 2


def test_an_error_outside_the_list_fails_the_call_and_nothing_of_it_happens(db, user):
    row_id = new()
    db.owner.execute(
        "create or replace function public.test_disk_full() returns trigger language plpgsql"
        " set search_path = '' as $$ begin if new.content = 'disk full' then"
        " raise exception 'no space' using errcode = '53100'; end if; return new; end $$"
    )
    db.owner.execute(
        "create or replace trigger test_disk_full before insert on session_revisions"
        " for each row execute function public.test_disk_full()"
    )
    try:
        with pytest.raises(psycopg.errors.DiskFull):
            db.send(
                db.transaction(user, insert("sessions", row_id)),
                db.transaction(user, revision(row_id, content="disk full")),
            )
    finally:
        db.owner.execute("drop trigger test_disk_full on session_revisions")
        db.owner.execute("drop function public.test_disk_full()")
    assert db.query("select 1 from sessions where id = %s", row_id) == []
