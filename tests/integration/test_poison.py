"""One poison transaction in a batch of 500: the others go through, it waits for a person with all
that builds on it, and once it is mended everything is applied.

The door would refuse these values; here it is told a laxer schema than the server has, as an
application with an outdated TableSpec would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from local_store import Column, Insert, TableSpec, Update
from local_store.clock import ManualClock, new_id
from syncer import operators
from syncer.flusher import SLOW_RETRY_S
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.faults import DeliverLate

USER, STRANGER = "github:42", "github:43"
BATCH = 500


def lax(spec: TableSpec) -> TableSpec:
    columns = {
        name: Column("text" if column.type == "timestamp" else column.type)
        for name, column in spec.columns.items()
    }
    return replace(spec, columns=columns)


TABLES = [lax(spec) for spec in SESSION_TABLES]


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def app(buffered_store: Callable[..., BufferedApp], sql) -> BufferedApp:
    return buffered_store(TABLES)


def write(app: BufferedApp, *ops: Any, user: str = USER) -> str:
    return app.store.write(list(ops), user_id=user).txn_id


@pytest.mark.parametrize(
    ("values", "sqlstate", "mended"),
    [
        ({"status": "bogus"}, "23514", {"status": "active"}),
        ({"metadata": None}, "23502", {"metadata": {}}),
        ({"finalized_at": "yesterday-ish"}, "22007", {"finalized_at": None}),
    ],
    ids=["check", "not_null", "malformed"],
)
def test_one_poison_in_a_batch_of_500_is_alone_and_can_be_mended(
    app, sql, values, sqlstate, mended
):
    bad_id = new_id()
    for number in range(BATCH - 3):
        if number == 250:
            bad = write(app, Insert("sessions", {"id": bad_id, **values}))
            write(app, Update("sessions", bad_id, {"client": {"n": 1}}))
            child = {"session_id": bad_id, "content": "c", "revision_type": "initial"}
            write(app, Insert("session_revisions", child))
        write(app, Insert("sessions", {"metadata": {"n": number}}))
    report = app.drain()
    assert (report.applied, report.rejected) == (BATCH - 3, 1)
    letters = {letter["state"]: letter for letter in operators.dead_letters(app.remote)}
    assert (letters["dead"]["txn_id"], letters["dead"]["sqlstate"]) == (bad, sqlstate)
    assert len(operators.dead_letters(app.remote)) == 3
    audit = app.audit()
    assert audit.balanced
    assert (audit.total.applied, audit.total.dead, audit.total.held) == (BATCH - 3, 1, 2)

    edited = operators.edit(app.remote, bad, mended)["txn_id"]
    results = operators.retry(app.remote, [edited])
    assert [result["verdict"] for result in results] == ["applied"] * 3
    assert operators.dead_letters(app.remote) == []
    assert sql.execute("select revision_count from sessions where id = %s", (bad_id,)).fetchone()
    assert sql.execute("select count(*) from sessions").fetchone() == (BATCH - 2,)
    assert app.audit().balanced


def test_each_kind_of_refusal_in_one_batch_of_500_is_alone(app, buffered_store, sql):
    """Unique, row-level security, and a foreign key to what somebody deleted."""
    theirs, gone = new_id(), new_id()
    stranger = buffered_store(TABLES)
    write(stranger, Insert("sessions", {"id": theirs}), user=STRANGER)
    stranger.drain()
    write(app, Insert("sessions", {"id": gone}))
    app.drain()
    sql.execute("create unique index one_of_a_kind on sessions ((metadata -> 'unique'))")
    sql.execute("delete from sessions where id = %s", (gone,))
    try:
        write(app, Insert("sessions", {"metadata": {"unique": 1}}))
        refused = {"23505": write(app, Insert("sessions", {"metadata": {"unique": 1}}))}
        refused["42501"] = write(app, Insert("sessions", {"id": theirs}))
        child = {"session_id": gone, "content": "c", "revision_type": "initial"}
        orphan = write(app, Insert("session_revisions", child))
        for number in range(BATCH - 5):
            write(app, Insert("sessions", {"metadata": {"unique": 100 + number}}))
        report = app.drain()
    finally:
        sql.execute("drop index one_of_a_kind")
    assert (report.applied, report.rejected) == (BATCH - 4 + 1, 2)
    letters = {letter["sqlstate"]: letter for letter in operators.dead_letters(app.remote)}
    assert {code: letter["txn_id"] for code, letter in letters.items()} == refused
    # The child of a row that somebody deleted isn't refused: it came to nothing, with a record.
    [record] = operators.conflicts(app.remote, undecided=False)
    assert (record["txn_id"], record["outcome"]) == (orphan, "deleted")
    assert app.audit().balanced


def test_one_that_always_runs_into_the_statement_timeout_delays_nobody_and_is_not_refused(
    buffered_store, sql
):
    clock = ManualClock()
    app = buffered_store(TABLES, clock=clock)
    sql.execute(
        "create function public.endless() returns trigger language plpgsql as"
        " $$ begin if new.metadata ? 'endless' then raise using errcode = '57014'; end if;"
        " return new; end $$;"
        "create trigger endless before insert on sessions for each row execute function endless()"
    )
    try:
        slow = write(app, Insert("sessions", {"metadata": {"endless": 1}}))
        others = [write(app, Insert("sessions", {"metadata": {"n": n}})) for n in range(100)]
        others.append(write(app, Insert("sessions", {}), user=STRANGER))
        app.drain()
        assert {app.store.state(txn_id) for txn_id in others} == {"applied"}
        assert app.store.state(slow) == "held"
    finally:
        sql.execute("drop function public.endless() cascade")
    clock.advance(SLOW_RETRY_S)
    app.drain()
    assert app.store.state(slow) == "applied"


def test_a_row_id_of_somebody_else_is_refused_without_telling_whose(app, buffered_store):
    theirs = new_id()
    write(app, Insert("sessions", {"id": theirs, "metadata": {"secret": 1}}), user=STRANGER)
    app.drain()
    thief = buffered_store(TABLES)
    write(thief, Insert("sessions", {"id": theirs, "status": "finalized"}))
    write(thief, Insert("sessions", {}))
    report = thief.drain()
    assert (report.applied, report.rejected) == (1, 1)
    [letter] = operators.dead_letters(app.remote, full=True)
    assert letter["sqlstate"] == "42501"
    assert "secret" not in str(letter)


def test_a_dead_letter_discarded_while_a_copy_is_under_way_never_takes_effect(
    app, sql, fault_proxy
):
    sql.execute("alter table sessions add constraint none check (metadata <> '{\"n\": 1}')")
    try:
        bad = write(app, Insert("sessions", {"metadata": {"n": 1}}))
        fault_proxy.next(DeliverLate(after_newer=1_000), matching="/rpc/sync_apply_batch")
        assert app.flush_once().stopped == "outage"
        assert app.drain().rejected == 1
        operators.discard(app.remote, [bad])
    finally:
        sql.execute("alter table sessions drop constraint none")  # now it could take effect
    fault_proxy.deliver_held()
    assert fault_proxy.wait_until(lambda log: all(e.upstream_status for e in log if e.fault))
    assert sql.execute("select count(*) from sessions").fetchone() == (0,)
    assert sql.execute("select count(*) from sync.ledger where verdict = 'applied'").fetchone() == (
        0,
    )
    app.store.recheck([bad])
    app.drain()
    assert app.store.state(bad) == "discarded"
    assert app.audit().balanced


def test_a_missing_parent_is_waited_for_and_delays_nobody(app, buffered_store):
    orphan = {"session_id": new_id(), "content": "c", "revision_type": "initial"}
    bad = write(app, Insert("session_revisions", orphan))
    for _ in range(20):
        write(app, Insert("sessions", {}))
    report = app.flush_once()
    assert (report.applied, report.held, report.rejected) == (20, 1, 0)
    parent = Insert("sessions", {"id": orphan["session_id"]})
    other = buffered_store(TABLES)
    write(other, parent)
    other.drain()
    assert app.drain().applied == 1
    assert app.store.state(bad) == "applied"


def test_an_unknown_column_is_held_and_never_dead_lettered(buffered_store, sql):
    wide = [
        replace(spec, columns={**spec.columns, "added_later": Column("text")}) for spec in TABLES
    ]
    app = buffered_store(wide)
    early = write(app, Insert("sessions", {"added_later": "x"}))
    write(app, Insert("sessions", {}))
    report = app.flush_once()
    assert (report.applied, report.held) == (1, 1)
    sql.execute("alter table sessions add column added_later text")
    try:
        app.drain()
        assert app.store.state(early) == "applied"
    finally:
        sql.execute("alter table sessions drop column added_later")
    assert operators.dead_letters(app.remote) == []
