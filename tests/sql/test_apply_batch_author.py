"""Identity, reads and locks of the RPCs, and what happens with each defence removed."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import psycopg
import pytest

from syncer.migrate import load_migrations
from tests.sql.conftest import Database, delete, insert, new, revision, update
from tests.sql.test_apply_batch import kinds, resend_twice
from tests.sql.test_apply_batch import (
    test_a_stale_base_is_a_conflict_with_the_current_row as stale_base_is_a_conflict,
)

# -- the author --


def write_as_a_stranger(db: Database, user: str, stranger: str) -> None:
    """A transaction of `stranger` on a row of `user`, with the right base: must be refused."""
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    [verdict] = db.send(db.transaction(stranger, update("sessions", row_id, base, status="active")))
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "42501")
    assert verdict["rows"] == {}
    [verdict] = db.send(db.transaction(stranger, delete("sessions", row_id, base)))
    assert verdict["verdict"] == "rejected"
    assert db.version("sessions", row_id) == base


def test_every_effect_is_under_the_authors_row_level_security(db, user, stranger):
    write_as_a_stranger(db, user, stranger)


def test_the_role_does_not_leak_to_the_next_transaction(db, user, stranger):
    mine, theirs = new(), new()
    bad = db.transaction(user, insert("sessions", new(), status="bogus"))
    verdicts = db.send(
        db.transaction(user, insert("sessions", mine)),
        bad,
        db.transaction(stranger, insert("sessions", theirs)),
    )
    assert kinds(verdicts) == ["applied", "rejected", "applied"]
    owners = {
        str(row["id"]): str(row["user_id"])
        for row in db.query("select id, user_id from sessions where id in (%s, %s)", mine, theirs)
    }
    assert owners == {mine: user, theirs: stranger}


def test_created_at_is_the_moment_of_acceptance_capped_by_the_clock(db, user):
    early, late = new(), new()
    db.send(
        db.transaction(
            user, insert("sessions", early), accepted_at="2026-01-02T03:04:05.678901+00:00"
        ),
        db.transaction(user, insert("sessions", late), accepted_at="2999-01-01T00:00:00+00:00"),
    )
    created = "select to_json(created_at at time zone 'utc') #>> '{}' from sessions where id = %s"
    assert db.one(created, early) == "2026-01-02T03:04:05.678901"
    assert datetime.fromisoformat(db.one(created, late)).year < 2999


def test_a_name_that_tries_to_be_sql_is_only_a_name(db, user):
    verdicts = db.send(
        db.transaction(user, insert('sessions"; drop table sessions; --', new())),
        db.transaction(user, insert("sessions", new(), **{'x") values (1); --': 1})),
        db.transaction(user, insert("sessions", "'; delete from sessions; --")),
    )
    assert kinds(verdicts) == ["held", "held", "rejected"]


def test_reads_show_a_user_their_own_rows_only(db, user, stranger):
    row_id = db.session(user, metadata={"mine": True})
    asked = [
        {"table": "sessions", "where": {"id": row_id}, "limit": 5},
        {"table": "sessions", "where": {}, "order_by": "created_at", "descending": True},
    ]
    [[row], [same]] = db.call("sync_read_v1", {"user_id": user, "reads": asked})["reads"]
    assert row == same
    assert row["metadata"] == {"mine": True}
    assert db.call("sync_read_v1", {"user_id": stranger, "reads": asked})["reads"] == [[], []]


def test_a_version_read_is_a_base_that_fits(db, user):
    row_id = db.session(user)
    asked = [{"table": "sessions", "where": {"id": row_id}}]
    [[row]] = db.call("sync_read_v1", {"user_id": user, "reads": asked})["reads"]
    op = update("sessions", row_id, row["updated_at"], status="finalized")
    [verdict] = db.send(db.transaction(user, op))
    assert verdict["verdict"] == "applied"
    [[row]] = db.call("sync_read_v1", {"user_id": user, "reads": asked})["reads"]
    assert row["updated_at"] == verdict["versions"][f"sessions/{row_id}"]


def read(db, user, table, where, **how):
    [rows] = db.call(
        "sync_read_v1", {"user_id": user, "reads": [{"table": table, "where": where, **how}]}
    )["reads"]
    return rows


def test_a_read_takes_any_of_several_values_and_some_columns(db, user, stranger):
    ids = [db.session(user) for _ in range(3)]
    foreign = db.session(stranger)
    rows = read(db, user, "sessions", {"id": [ids[0], ids[2], foreign]}, columns=["id", "status"])
    assert sorted(row["id"] for row in rows) == sorted([ids[0], ids[2]])
    assert {tuple(row) for row in rows} == {("id", "status")}
    assert read(db, user, "sessions", {"id": []}) == []
    found = read(db, user, "sessions", {"status": ["active", "finalized"], "id": ids[1]})
    assert [row["id"] for row in found] == [ids[1]]


def test_a_read_goes_on_behind_a_row(db, user):
    for _ in range(5):
        db.session(user)
    how = {"order_by": "created_at", "descending": True, "columns": ["id", "created_at"]}
    whole = read(db, user, "sessions", {}, **how)
    found, after = [], None
    while rows := read(db, user, "sessions", {}, **how, after=after, limit=2):
        found, after = found + rows, rows[-1]
    assert found == whole
    upwards = {**how, "descending": False}
    assert read(db, user, "sessions", {}, **upwards, after=whole[1]) == [whole[0]]


def test_names_of_a_read_that_try_to_be_sql_are_only_names(db, user):
    row_id = db.session(user)
    evil = "id = t.id or true) --"
    for how in (
        {"where": {evil: row_id}},
        {"where": {evil: [row_id]}},
        {"columns": [evil]},
        {"order_by": evil, "after": {evil: "x", "id": row_id}},
    ):
        with pytest.raises(psycopg.Error) as raised:
            read(db, user, "sessions", how.pop("where", {}), **how)
        assert raised.value.sqlstate == "42703"  # no such column


def test_a_read_of_an_unregistered_table_is_refused(db, user):
    with pytest.raises(psycopg.Error) as raised:
        db.call("sync_read_v1", {"user_id": user, "reads": [{"table": "ledger"}]})
    assert raised.value.sqlstate == "SYP01"


# -- locks --


def test_two_logs_writing_children_of_the_same_parents_never_deadlock(db, local_supabase, user):
    parents = [db.session(user) for _ in range(4)]

    def log(number: int) -> list[str]:
        other = Database(local_supabase.database_url)
        order = parents if number % 2 else parents[::-1]
        seen: list[str] = []
        try:
            for _ in range(15):
                seen += kinds(
                    other.send(*(other.transaction(user, revision(parent)) for parent in order))
                )
        finally:
            other.close()
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = [kind for result in pool.map(log, range(4)) for kind in result]
    assert seen == ["applied"] * (4 * 15 * 4)
    counts = db.query("select revision_count from sessions where id = any(%s::uuid[])", parents)
    assert [row["revision_count"] for row in counts] == [60] * 4


# -- defences removed: the scenario above must fail --


def without(db: Database, function: str, pattern: str, replacement: str) -> None:
    """Replace a piece of one function's source; the caller's transaction undoes it."""
    source = db.one("select pg_get_functiondef(%s::regproc)", function)
    changed = re.sub(pattern, replacement, source, flags=re.DOTALL)
    assert changed != source
    db.owner.execute(changed.encode())


def test_without_the_ledger_insert_a_resent_transaction_doubles(db, user):
    with db.owner.transaction(force_rollback=True):
        for function in ("sync.apply_transaction", "sync.note_applied"):
            without(db, function, r"insert into sync\.ledger.*?;", "")
        with pytest.raises(AssertionError):
            resend_twice(db, user)


def test_without_the_role_switch_a_stranger_writes(db, user, stranger):
    with db.owner.transaction(force_rollback=True):
        without(db, "sync.enter", r"perform set_config\('role', 'authenticated', true\);", "")
        with pytest.raises(AssertionError):
            write_as_a_stranger(db, user, stranger)


def test_without_the_base_check_a_stale_edit_overwrites(db, user):
    with db.owner.transaction(force_rollback=True):
        without(db, "sync.look", "if v_moved then", "if false then")
        with pytest.raises(AssertionError):
            stale_base_is_a_conflict(db, user)


# -- migrations --


def test_every_migration_can_run_again_over_itself(db):
    for item in load_migrations():
        with db.owner.transaction():
            db.owner.execute(item.sql.encode())


def test_migrating_twice_and_at_once_is_harmless(local_supabase):
    from syncer.migrate import migrate

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(migrate, [local_supabase.database_url] * 3)) == [[], [], []]
    assert migrate(local_supabase.database_url, dry_run=True) == []
