"""A buffer on a manual clock in front of a real Supabase, for faults between or behind them.

Each test writes before and during the fault, lets the flusher pass, ends the fault, lets it pass
again; then everything is applied, nothing is parked, and the audit balances.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg

from local_store import Insert, LocalStore, Update
from local_store.clock import ManualClock, SystemClock, new_id
from syncer.audit import audit
from syncer.flusher import Flusher, FlushLimits, FlushReport
from syncer.remote import Remote, SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.buffer import wait_until
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.local_supabase import LocalSupabase

USER = "github:42"
RPC = "/rpc/sync_apply_batch"
CACHE_WAIT_S = 30.0  # PostgREST waits longer and longer between its tries to connect
POOL = 15  # connections that the stack's PostgREST may open
PASSES_MAX = 400  # PostgREST reconnects and reloads in its own time


class World:
    """A buffer on a manual clock, its flusher by way of a fault proxy, and the database's owner."""

    def __init__(self, stack: LocalSupabase, folder: Path, proxy: FaultProxy) -> None:
        self.stack, self.proxy = stack, proxy
        self.clock = ManualClock()
        self.store = LocalStore.open(folder, tables=SESSION_TABLES, clock=self.clock)
        self.remote = SupabaseRemote(proxy.url, stack.secret_key)
        self.flusher = self.flusher_for(self.remote)
        self.sessions: list[str] = []

    def close(self) -> None:
        self.store.close()
        self.remote.close()

    def flusher_for(self, remote: Remote, **limits: Any) -> Flusher:
        """Another flusher of the same buffer; `world.flusher` is the one that passes."""
        found = FlushLimits(**limits)
        return Flusher(self.store, remote, limits=found, clock=self.clock, jitter=lambda: 0.5)

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

    def count_blocked(self) -> int:
        """How many connections wait for a lock."""
        with self.sql() as sql:
            query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            [(found,)] = sql.execute(query).fetchall()
            return int(found)

    def recover(self, writes: int | None = None) -> None:
        """Only passes, until nothing is left; then the account of all that was written."""

        def drained() -> bool:  # PostgREST reloads in its own time, on a busy machine above all
            self.pass_once()
            return self.store.backlog() == 0

        wait_until(drained, timeout_s=60.0)
        stats = self.store.stats()
        assert (stats["pending"], stats["parked"]) == (0, 0)
        with self.sql() as sql:
            assert sql.execute("select count(*) from sync.parked").fetchone() == (0,)
            last = "select metadata from sessions where id = %s"  # of its edits, in their order
            [found] = sql.execute(last, (self.sessions[0],)).fetchall()
            assert found == ({"n": len(self.sessions)},)
        direct = SupabaseRemote(self.stack.url, self.stack.secret_key)
        report = audit(direct, self.store)
        direct.close()
        [log] = [log for log in report.logs if log.log_id == self.store.log_id]
        assert log.balanced
        assert log.applied == (writes or 2 * len(self.sessions))

    @contextmanager
    def sql(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.stack.database_url, autocommit=True) as connection:
            yield connection

    def run(self, statement: str) -> None:
        with self.sql() as sql:
            sql.execute(statement.encode())


def await_schema_cache(stack: LocalSupabase) -> None:
    """Wait until PostgREST has seen the database as it is now.

    A reload that a test before this one caused may still bring an older view of the schema: until a
    function that is new is known to it, the cache isn't today's. It is asked by a signal, since it
    doesn't listen for `notify` any more once it has met a standby.
    """
    name = f"marker_{new_id().replace('-', '')}"
    url, headers = f"{stack.url}/rest/v1/rpc/{name}", {"apikey": stack.secret_key}
    clock, end_s = SystemClock(), SystemClock().monotonic() + CACHE_WAIT_S
    with psycopg.connect(stack.database_url, autocommit=True) as sql, httpx.Client() as http:
        sql.execute(
            f"create function public.{name}() returns int language sql as 'select 1'".encode()
        )
        try:
            good = 0  # in a row: each connection of its pool may be one that a test has ended
            while good < POOL:
                assert clock.monotonic() < end_s, "PostgREST doesn't load the schema anew"
                if http.post(url, headers=headers).status_code == 200:
                    good += 1
                else:
                    good = 0
                    os.kill(stack.pids()[1], signal.SIGUSR1)
                    clock.sleep(0.02)
        finally:
            sql.execute(f"drop function public.{name}()".encode())


def through(world: World, stopped: str, passes: int = 4) -> None:
    """Write and pass during the fault; every pass reports it and keeps everything."""
    for _ in range(passes):
        world.write()
        report = world.pass_once()
        assert (report.stopped, report.applied, report.rejected) == (stopped, 0, 0), report.error
