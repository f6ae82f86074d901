"""What goes wrong on the server's side: nothing is dead-lettered, nothing lost, no hand needed.

Each test writes before and during the fault, lets the flusher pass, ends the fault, lets it pass
again; then everything is applied, nothing is parked, and the audit balances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert, LocalStore, Update
from local_store.clock import ManualClock, SystemClock, new_id
from syncer.audit import audit
from syncer.flusher import Flusher, FlushReport
from syncer.migrate import load_migrations
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Answer, canned
from syncer.testkit.local_supabase import LocalSupabase

USER = "github:42"
RPC = "/rpc/sync_apply_batch"
PASSES_MAX = 400  # PostgREST reconnects and reloads in its own time
DAY_S = 86_400.0


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalSupabase]:
    """A Supabase of this module's own: these tests change its settings and its schema."""
    with LocalSupabase.start() as made:
        yield made


class World:
    """A buffer on a manual clock, its flusher by way of a fault proxy, and the database's owner."""

    def __init__(self, stack: LocalSupabase, folder: Path, proxy: FaultProxy) -> None:
        self.stack, self.proxy = stack, proxy
        self.clock = ManualClock()
        self.store = LocalStore.open(folder, tables=SESSION_TABLES, clock=self.clock)
        self.remote = SupabaseRemote(proxy.url, stack.secret_key)
        self.flusher = Flusher(self.store, self.remote, clock=self.clock, jitter=lambda: 0.5)
        self.sessions: list[str] = []

    def close(self) -> None:
        self.store.close()
        self.remote.close()

    def write(self) -> None:
        """A new session, and an edit of an older one."""
        row_id = new_id()
        self.store.write([Insert("sessions", {"id": row_id, "metadata": {}})], user_id=USER)
        self.sessions.append(row_id)
        changes = {"metadata": {"n": len(self.sessions)}}
        self.store.write([Update("sessions", self.sessions[0], changes)], user_id=USER)

    def pass_once(self, wait_s: float = 61.0) -> FlushReport:
        self.clock.advance(wait_s)
        return self.flusher.flush_once()

    def recover(self) -> None:
        """Only passes, until nothing is left; then the account."""
        for _ in range(PASSES_MAX):
            self.pass_once()
            if self.store.stats()["pending"] == 0:
                break
            SystemClock().sleep(0.01)
        stats = self.store.stats()
        assert (stats["pending"], stats["parked"]) == (0, 0)
        with self.sql() as sql:
            assert sql.execute("select count(*) from sync.parked").fetchone() == (0,)
        report = audit(SupabaseRemote(self.stack.url, self.stack.secret_key), self.store)
        [log] = [log for log in report.logs if log.log_id == self.store.log_id]
        assert log.balanced
        assert log.applied == 2 * len(self.sessions)

    @contextmanager
    def sql(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.stack.database_url, autocommit=True) as connection:
            yield connection

    def run(self, statement: str) -> None:
        with self.sql() as sql:
            sql.execute(statement.encode())


@pytest.fixture
def world(stack: LocalSupabase, tmp_path: Path) -> Iterator[World]:
    host, port = stack.url.removeprefix("http://").split(":")
    with FaultProxy.start(host, int(port)) as proxy:
        made = World(stack, tmp_path, proxy)
        made.write()
        made.pass_once()
        yield made
        made.close()


def through(world: World, stopped: str, passes: int = 4) -> None:
    """Write and pass during the fault; every pass reports it and keeps everything."""
    for _ in range(passes):
        world.write()
        report = world.pass_once()
        assert (report.stopped, report.applied, report.rejected) == (stopped, 0, 0)


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
    world.flusher = Flusher(world.store, wrong, clock=world.clock, jitter=lambda: 0.5)
    through(world, "auth")
    world.flusher = Flusher(world.store, right, clock=world.clock, jitter=lambda: 0.5)
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
