"""From the buffer to Postgres on real parts: SQLite, supabase-py, the gateway, PostgREST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from local_store import Delete, Insert, LocalStore, Update, user_uuid
from local_store.clock import ManualClock, new_id
from syncer.audit import audit
from syncer.flusher import Flusher, FlushReport, drain
from syncer.migrate import load_migrations, migrate
from syncer.remote import SupabaseRemote, TableRead
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Cut, Truncate, canned
from syncer.testkit.local_supabase import LocalSupabase

USER = "github:42"
RPC = "sync_apply_batch_v1"
HALF = 8  # up to the ledger: the tables are there, the function isn't


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as opened:
        yield opened


@pytest.fixture
def proxy(fault_proxy: FaultProxy) -> FaultProxy:
    return fault_proxy


@pytest.fixture
def remote(fresh_supabase, proxy) -> Iterator[SupabaseRemote]:
    made = SupabaseRemote(proxy.url, fresh_supabase.secret_key)
    yield made
    made.close()


@pytest.fixture
def flusher(store, remote, clock) -> Flusher:
    return Flusher(store, remote, clock=clock, jitter=lambda: 0.0)


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def session(store: LocalStore) -> str:
    row_id = new_id()
    values = {"id": row_id, "status": "active", "source": "prompt", "metadata": {"é": "東京"}}
    store.write([Insert("sessions", values)], user_id=USER)
    return row_id


def revision(store: LocalStore, session_id: str) -> None:
    values = {"session_id": session_id, "content": "more", "revision_type": "manual_edit"}
    store.write([Insert("session_revisions", values)], user_id=USER)


def count(sql, table: str) -> int:
    return sql.execute(f"select count(*) from {table}").fetchone()[0]


def test_one_write_is_acknowledged_flushed_and_read_back_from_postgres(store, flusher, sql):
    row_id = session(store)
    report = flusher.flush_once()
    assert (report.applied, report.pending) == (1, 0)
    [found] = sql.execute("select id::text, user_id::text, metadata from sessions").fetchall()
    assert found == (row_id, user_uuid(USER), {"é": "東京"})


@pytest.mark.parametrize(
    "fault",
    [
        Cut("after"),
        Cut("after", "close"),
        Truncate(20),
        canned("400_no_code", after_forwarding=True),
        canned("502_html", after_forwarding=True),
        canned("200_empty", after_forwarding=True),
        canned("200_foreign_id", after_forwarding=True),
    ],
)
def test_a_reply_lost_after_the_commit_makes_no_duplicate(store, flusher, proxy, sql, clock, fault):
    row_id = session(store)
    revision(store, row_id)
    proxy.next(fault, matching=RPC)
    lost = flusher.flush_once()
    assert (lost.stopped, lost.pending) == ("outage", 2)
    assert count(sql, "session_revisions") == 1  # it did happen
    clock.advance(60)
    report = _until(flusher, clock, "budget")
    assert (report.duplicate, report.applied, report.pending) == (2, 0, 0)
    assert count(sql, "session_revisions") == 1
    assert count(sql, "sync.ledger") == 2


def test_a_session_edited_across_an_outage_arrives_without_a_false_conflict(
    store, flusher, proxy, sql, clock
):
    row_id = session(store)
    assert flusher.flush_once().applied == 1
    revision(store, row_id)
    proxy.set(canned("503_json"))
    store.write([Update("sessions", row_id, {"metadata": {"n": 1}})], user_id=USER)
    revision(store, row_id)
    flusher.flush_once()
    store.write([Update("sessions", row_id, {"status": "finalized"})], user_id=USER)
    revision(store, row_id)
    flusher.flush_once()
    proxy.clear()
    clock.advance(120)
    report = drain(flusher, clock, budget_s=30)
    assert (report.applied, report.conflict, report.held, report.pending) == (5, 0, 0, 0)
    [found] = sql.execute("select status, metadata, revision_count from sessions").fetchall()
    assert found == ("finalized", {"n": 1}, 3)


@pytest.mark.parametrize(
    "name", ["200_html", "200_no_verdicts", "200_wrong_shape", "200_broken_json"]
)
def test_a_200_that_did_nothing_is_never_counted_as_delivered(store, flusher, proxy, sql, name):
    session(store)
    proxy.next(canned(name), matching=RPC)
    report = flusher.flush_once()
    assert (report.applied, report.pending) == (0, 1)
    assert count(sql, "sessions") == 0


def test_postgres_and_postgrest_stopped_is_an_outage_and_recovers(
    store, flusher, fresh_supabase, sql, clock
):
    session(store)
    with fresh_supabase.outage():
        for _ in range(3):
            assert flusher.flush_once().stopped == "outage"
            clock.advance(30)
        session(store)
    clock.advance(30)
    report = _until(flusher, clock, "budget")  # PostgREST replaces its dead connections first
    assert (report.applied, report.pending) == (2, 0)


def test_a_wrong_key_pauses_with_auth_and_keeps_everything(store, fresh_supabase, clock):
    remote = SupabaseRemote(fresh_supabase.url, fresh_supabase.anon_key)
    session(store)
    report = Flusher(store, remote, clock=clock).flush_once()
    assert (report.stopped, report.pending, report.rejected) == ("auth", 1, 0)
    assert "SUPABASE_SECRET_KEY" in report.error
    assert fresh_supabase.anon_key not in report.error


def test_a_project_without_the_migrations_or_half_of_them_stops_with_schema_until_they_are_there(
    store, clock
):
    # A stack of its own: PostgREST reloads its schema cache late, which other tests would meet.
    with LocalSupabase.start(migrated=False) as stack:
        remote = SupabaseRemote(stack.url, stack.secret_key)
        flusher = Flusher(store, remote, clock=clock)
        session(store)
        report = _until(flusher, clock, "schema")
        assert (report.pending, report.rejected) == (1, 0)
        assert "syncer migrate" in report.error
        with psycopg.connect(stack.database_url, autocommit=True) as sql:
            for migration in load_migrations()[:HALF]:  # as one that was killed in the middle
                sql.execute(migration.sql.encode())
        report = _until(flusher, clock, "schema")
        assert (report.pending, report.rejected) == (1, 0)
        migrate(stack.database_url)
        wait_until(lambda: _pass(flusher, clock).applied == 1)
        remote.close()
    assert store.stats()["pending"] == 0


def _pass(flusher: Flusher, clock: ManualClock) -> FlushReport:
    clock.advance(60)
    return flusher.flush_once()


def _until(flusher: Flusher, clock: ManualClock, stopped: str) -> FlushReport:
    """Flush until a pass stops so: PostgREST reconnects and reloads its cache in its own time."""
    for _ in range(400):
        report = flusher.flush_once()
        clock.advance(60)
        if report.stopped == stopped:
            return report
    raise AssertionError(f"never stopped with {stopped}: {report}")


def test_a_delete_takes_its_children_along_and_the_audit_balances(store, flusher, remote, sql):
    kept, gone = session(store), session(store)
    revision(store, gone)
    revision(store, kept)
    store.write([Delete("sessions", gone)], user_id=USER)
    assert drain(flusher, ManualClock(), budget_s=30).applied == 5
    assert (count(sql, "sessions"), count(sql, "session_revisions")) == (1, 1)
    report = audit(remote, store)
    assert report.balanced
    assert report.total.applied == 5


def test_a_conflict_with_an_edit_by_sql_keeps_both_sides(store, flusher, sql):
    row_id = session(store)
    flusher.flush_once()
    sql.execute("update sessions set status = 'abandoned'")
    receipt = store.write([Update("sessions", row_id, {"status": "finalized"})], user_id=USER)
    assert flusher.flush_once().merged == 1
    assert flusher.flush_once().applied == 1
    assert sql.execute("select status from sessions").fetchone() == ("abandoned",)
    query = "select base, mine, theirs, outcome from sync.conflicts where txn_id = %s"
    assert sql.execute(query, (receipt.txn_id,)).fetchone() == (
        {"status": "active"}, {"status": "finalized"}, {"status": "abandoned"}, "remote",
    )  # fmt: skip


def test_reads_come_back_as_the_author_and_fit_a_refresh(store, flusher, remote, sql):
    row_id = session(store)
    flusher.flush_once()
    sql.execute("update sessions set status = 'abandoned'")
    as_of = store.change_counter()
    [rows] = remote.read(user_uuid(USER), [TableRead("sessions", {"id": row_id})])
    assert store.refresh("sessions", rows, user_id=USER, as_of=as_of, where={"id": row_id}) == 1
    assert store.get("sessions", row_id, user_id=USER)["status"] == "abandoned"
    store.write([Update("sessions", row_id, {"status": "active"})], user_id=USER)
    assert flusher.flush_once().applied == 1
    assert remote.read(user_uuid("github:43"), [TableRead("sessions", {})]) == [[]]
