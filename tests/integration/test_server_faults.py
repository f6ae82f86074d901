"""What goes wrong on the server's side: nothing is dead-lettered, nothing lost, no hand needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from local_store import Update
from syncer.flusher import FlushReport
from syncer.migrate import load_migrations
from syncer.remote import SupabaseRemote
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Answer, canned
from syncer.testkit.local_supabase import LocalSupabase
from tests.integration.server_world import (
    PASSES_MAX,
    POOL,
    RPC,
    USER,
    World,
    await_schema_cache,
    through,
)

DAY_S = 86_400.0


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalSupabase]:
    """A Supabase of this module's own: these tests change its settings and its schema."""
    with LocalSupabase.start() as made:
        yield made


@pytest.fixture
def world(stack: LocalSupabase, tmp_path: Path) -> Iterator[World]:
    await_schema_cache(stack)
    host, port = stack.url.removeprefix("http://").split(":")
    with FaultProxy.start(host, int(port)) as proxy:
        made = World(stack, tmp_path, proxy)
        made.write()
        made.pass_once()
        yield made
        made.close()


def test_a_hot_standby_that_answers_is_an_outage_until_it_is_promoted(
    world: World, stack: LocalSupabase
):
    with world.sql() as sql:
        [(folder,)] = sql.execute("show data_directory").fetchall()
        sql.execute(f"copy (select '') to '{folder}/standby.signal'")
    restart_postgres(stack)
    try:
        for _ in range(PASSES_MAX):
            world.write()
            if "0A000" in (world.pass_once().error or ""):
                break  # PostgREST has its connections again, and the standby says what it is
        through(world, "outage")
    finally:
        world.run("select pg_promote()")
    world.recover()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("0A000", "cannot execute LOCK TABLE during recovery"),
        ("25006", "cannot execute INSERT in a read-only transaction"),
        ("53100", "could not extend file: No space left on device"),
        ("PGRST002", "Could not query the database for the schema cache"),
    ],
    ids=["hot_standby", "standby_read_only", "disk_full", "no_schema_cache"],
)
def test_a_server_that_cannot_write_now_is_an_outage(world: World, code: str, message: str):
    body = f'{{"code":"{code}","message":"{message}","details":null,"hint":null}}'
    world.proxy.set(Answer(503, body), matching=RPC)
    through(world, "outage")
    world.proxy.clear()
    world.recover()


@pytest.mark.parametrize("name", ["200_html", "200_empty", "400_no_code", "530_html", "544_json"])
def test_nonsense_for_hours_is_an_outage(world: World, name: str):
    world.proxy.set(canned(name), matching=RPC)
    through(world, "outage")
    world.proxy.clear()
    world.recover()


def test_nonsense_after_the_commit_makes_duplicates_of_nothing(world: World):
    world.proxy.set(canned("400_no_code", after_forwarding=True), matching=RPC)
    through(world, "outage", passes=2)
    world.proxy.clear()
    world.recover()


def test_days_of_401_keep_everything(world: World, stack: LocalSupabase):
    right, wrong = world.remote, SupabaseRemote(world.proxy.url, stack.anon_key)
    world.proxy.set(canned_401(), matching=RPC)
    for _ in range(10):
        world.write()
        assert world.pass_once(DAY_S / 2).stopped == "auth"
    world.proxy.clear()
    world.flusher = world.flusher_for(wrong)
    through(world, "auth")
    world.flusher = world.flusher_for(right)
    world.recover()
    wrong.close()


def canned_401() -> Answer:
    return Answer(401, '{"message":"Invalid API key"}')


def test_a_pool_without_a_free_connection_is_asked_less(world: World):
    body = '{"code":"PGRST003","message":"Timed out acquiring connection from connection pool."}'
    world.proxy.set(Answer(504, body), matching=RPC)
    through(world, "outage")
    world.proxy.clear()
    world.recover()


def test_a_pool_that_is_really_exhausted_is_asked_less(world: World, stack: LocalSupabase):
    crowd = [SupabaseRemote(stack.url, stack.secret_key) for _ in range(2)]
    with world.sql() as sql, ThreadPoolExecutor(POOL) as pool:
        with sql.transaction():
            sql.execute("lock table sync.ledger in access exclusive mode")
            waiting = [pool.submit(crowd[n % 2].audit) for n in range(POOL)]
            while world.count_blocked() < POOL:
                assert not any(call.done() for call in waiting)
            world.write()
            report = world.pass_once()
        assert (report.stopped, report.rejected) == ("outage", 0)
        assert "PGRST003" in (report.error or "")
        assert all(call.result(30.0) for call in waiting)
    for remote in crowd:
        remote.close()
    world.recover()


def test_backends_that_are_stopped_are_an_outage_and_continued_they_double_nothing(
    world: World, stack: LocalSupabase
):
    remote = SupabaseRemote(world.proxy.url, stack.secret_key, deadline_s=0.5)
    world.flusher = world.flusher_for(remote)
    # The postmaster first: PostgREST would ask it for other backends.
    stopped = [stack.pids()[0]]
    with world.sql() as sql:
        os.kill(stopped[0], signal.SIGSTOP)
        query = "select pid from pg_stat_activity where usename = 'authenticator'"
        stopped += [pid for (pid,) in sql.execute(query).fetchall()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        through(world, "outage")
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    world.recover()
    remote.close()


def test_a_deadlock_with_somebody_elses_transaction_costs_a_pass_and_nothing_else(world: World):
    """The outsider takes the rows in the other order: one of the two must give way."""
    world.write()
    world.pass_once()
    rows = sorted(world.sessions)
    world.write()
    for row_id in rows:
        world.store.write([Update("sessions", row_id, {"client": {"n": 1}})], user_id=USER)
    touch = "update sessions set revision_count = revision_count where id = %s"
    with world.sql() as sql, ThreadPoolExecutor(1) as pool:
        with suppress(psycopg.errors.DeadlockDetected), sql.transaction():
            sql.execute(touch, (rows[-1],))
            passing = pool.submit(world.pass_once)
            while not world.count_blocked():
                assert not passing.done()
            sql.execute(touch, (rows[0],))
        report = passing.result(30.0)
    assert report.rejected == 0
    world.recover(writes=2 * len(world.sessions) + 2)


def test_a_batch_that_takes_too_long_is_sent_in_smaller_ones(world: World):
    [batch] = [item for item in load_migrations() if item.name.startswith("009_")]
    world.run(
        "create function public.dawdle() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(0.02); return new; end $$;"
        "create trigger dawdle before insert on sessions for each row execute function dawdle();"
        "alter function public.sync_apply_batch_v1(jsonb) set statement_timeout = '200ms';"
        "notify pgrst, 'reload schema'"
    )
    reports: list[FlushReport] = []
    try:
        while not any("57014" in (report.error or "") for report in reports):
            assert len(reports) < PASSES_MAX  # the shorter limit holds once PostgREST has it
            for _ in range(30):
                world.write()
            reports = [*reports[-1:], world.pass_once()]
        assert reports[-1].stopped == "outage"
        for _ in range(PASSES_MAX):
            reports.append(world.pass_once())
            if reports[-1].pending == 0:
                break
        failed = [n for n, report in enumerate(reports) if report.error]
        assert all("57014" in (reports[n].error or "") for n in failed)
        assert all(reports[n + 1].sent <= reports[n].sent // 2 for n in failed)
        assert world.store.stats()["pending"] == 0  # in spite of the slow trigger
    finally:
        world.run(batch.sql)
        world.run("drop trigger dawdle on sessions; drop function public.dawdle()")
    world.recover()


def test_a_key_rotated_in_the_middle_of_a_drain_pauses_it_until_the_new_one_is_set(
    world: World, stack: LocalSupabase
):
    for _ in range(20):
        world.write()
    old = world.flusher_for(world.remote, batch_ops_max=10)
    world.clock.advance(60)
    assert old.flush_once().applied == 10
    old_key = stack.secret_key
    stack.rotate_keys()
    for _ in range(3):
        world.clock.advance(60)
        report = old.flush_once()
        assert (report.stopped, report.applied, report.rejected) == ("auth", 0, 0)
        assert "SUPABASE_SECRET_KEY" in (report.error or "")
        assert old_key not in (report.error or "")
    renewed = SupabaseRemote(world.proxy.url, stack.secret_key)
    world.flusher = world.flusher_for(renewed)
    world.recover()
    renewed.close()


def test_a_column_renamed_in_the_outage_holds_what_names_it_and_nothing_else(world: World):
    with world.sql() as sql:
        sql.execute("alter table sessions rename column metadata to meta")
    try:
        for _ in range(4):
            world.write()
            report = world.pass_once()
            assert (report.applied, report.rejected) == (0, 0)
        assert report.held > 0
    finally:
        with world.sql() as sql:
            sql.execute("alter table sessions rename column meta to metadata")
    world.recover()


def test_a_missing_rpc_stops_with_schema_until_it_is_there(world: World):
    [batch] = [item for item in load_migrations() if item.name.startswith("009_")]
    world.run(
        "drop function public.sync_apply_batch_text_v1(text);"
        "drop function public.sync_apply_batch_v1(jsonb);"
        "notify pgrst, 'reload schema'"
    )
    try:
        for _ in range(PASSES_MAX):
            world.write()
            if world.pass_once().stopped == "schema":
                break
        through(world, "schema")
    finally:
        world.run(batch.sql)
    world.recover()


def test_a_server_of_another_protocol_stops_with_schema_until_it_fits(world: World):
    [batch] = [item for item in load_migrations() if item.name.startswith("009_")]
    older = batch.sql.replace("is distinct from '1'", "is distinct from '0'")
    assert older != batch.sql
    world.run(older)
    try:
        through(world, "schema")
    finally:
        world.run(batch.sql)
    world.recover()


def test_a_column_dropped_in_the_outage_holds_what_names_it_until_it_is_back(world: World):
    world.run("alter table sessions drop column client")
    try:
        named = Update("sessions", world.sessions[0], {"client": {"n": 1}})
        world.store.write([named], user_id=USER)
        world.write()
        report = world.pass_once()
        assert (report.applied, report.held, report.rejected) == (1, 2, 0)
    finally:
        world.run("alter table sessions add column client jsonb")
    world.recover(writes=2 * len(world.sessions) + 1)


def restart_postgres(stack: LocalSupabase) -> None:
    stack.stop_postgres()
    stack.start_postgres()


def restart_postgrest(stack: LocalSupabase) -> None:
    stack.stop_postgrest()
    stack.start_postgrest()


def terminate_backends(stack: LocalSupabase) -> None:
    with psycopg.connect(stack.database_url, autocommit=True) as sql:
        sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'authenticator'"
        )


@pytest.mark.parametrize("fault", [restart_postgres, restart_postgrest, terminate_backends])
def test_a_restart_or_lost_backends_cost_passes_and_nothing_else(
    world: World, stack: LocalSupabase, fault: Callable[[LocalSupabase], None]
):
    world.write()
    fault(stack)
    world.write()
    world.recover()
