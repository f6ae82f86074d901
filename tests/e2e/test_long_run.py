"""A time with a fault every few moments, on one API process: LONG_RUN_S=3600 for the hour.

Clients keep account of what they were told; at the end, faults off and quiet, buffer, ledger and
tables are held against it. The process must hold as much memory and as many descriptors as before.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from local_store import LocalStore
from local_store.clock import SystemClock
from syncer.audit import audit
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import ApiProcess
from syncer.testkit.drill_counts import compare_with_clients, counter_mismatches, cross_user_rows
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    BlackHole,
    Cut,
    Delay,
    DeliverLate,
    Drip,
    Duplicate,
    Fault,
    FaultMix,
    Refuse,
    Truncate,
    canned,
)
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.traffic import Client, Script, Tally, fresh_users, plan

LONG_RUN_S = float(os.environ.get("LONG_RUN_S", "5"))
SEED = int(os.environ.get("LONG_RUN_SEED", "1"))
FAULT_EVERY_S = min(10.0, LONG_RUN_S / 12)  # each kind comes up once even in a short run
CLIENTS, PAUSE_S = 3, 0.05  # a few writes at any moment; 100,000 in an hour
MIB = 1024 * 1024
# What is kept in memory on purpose: documents and rows, 32 MiB of each at most.
GROWTH_BYTES_MAX = 80 * MIB
DESCRIPTORS_MORE_MAX = 16  # connections that happen to be open at the second look
CLOCK = SystemClock()
RPC = "/rpc/sync_apply_batch"


class World:
    """A Supabase, a proxy before it, one API process, and what can be done to them."""

    def __init__(self, stack: LocalSupabase, proxy: FaultProxy, api: ApiProcess) -> None:
        self.stack, self.proxy, self.api = stack, proxy, api
        self.dice = random.Random(SEED)
        once: list[Fault] = [
            *(Cut(stage) for stage in ("before", "in", "after")),
            *(Truncate(20), Duplicate(at_once=True), DeliverLate(after_newer=2, after_s=5.0)),
            *(Drip(0.001), Delay(0.5), canned("429_retry_after"), canned("200_html")),
        ]
        self.faults: list[Callable[[], None]] = [
            lambda: self.proxy.next(self.dice.choice(once), times=3, matching=RPC),
            lambda: self.proxy.mix(FaultMix(seed=self.dice.randrange(10**9), rate=0.3)),
            lambda: self.proxy.set(Refuse()),
            lambda: self.proxy.set(canned("503_html")),
            self._restart_postgres,
            self._restart_postgrest,
            self._terminate_backends,
            self._stand_still,
            lambda: self.proxy.next(BlackHole(), matching="/rpc/sync_read"),
        ]

    def _restart_postgres(self) -> None:
        self.stack.stop_postgres()
        self.stack.start_postgres()

    def _restart_postgrest(self) -> None:
        self.stack.stop_postgrest()
        self.stack.start_postgrest()

    def _terminate_backends(self) -> None:
        with psycopg.connect(self.stack.database_url, autocommit=True) as sql:
            sql.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where usename = 'authenticator'"
            )

    def _stand_still(self) -> None:
        assert self.api.pid is not None
        os.kill(self.api.pid, signal.SIGSTOP)
        CLOCK.sleep(FAULT_EVERY_S / 4)
        os.kill(self.api.pid, signal.SIGCONT)

    def let_be(self) -> None:
        """Lift what was set."""
        self.proxy.mix(None)
        self.proxy.clear()

    def holds(self) -> tuple[int, int]:
        """The API's memory in bytes and its open descriptors."""
        process = Path(f"/proc/{self.api.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(process / "fd"))

    def pending(self) -> int:
        return int(httpx.get(f"{self.api.url}/health", timeout=30.0).json()["pending"])


@pytest.fixture
def world(
    fresh_supabase: LocalSupabase, fault_proxy: FaultProxy, tmp_path: Path
) -> Iterator[World]:
    settings = {
        **fresh_supabase.env(),
        "SUPABASE_URL": fault_proxy.url,
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
        "SYNCER_BREAKER_INTERVAL_S": "0.5",
        "SYNCER_WATCH_INTERVAL_S": str(FAULT_EVERY_S),
    }
    api = ApiProcess(settings, tmp_path / "buffer", tmp_path / "api.log")
    api.start()
    yield World(fresh_supabase, fault_proxy, api)
    api.kill()


class Users:
    """Clients that write until they are told to stop, each to the end of what it has begun."""

    def __init__(self, world: World) -> None:
        self.names, self.tally = fresh_users(40), Tally()
        expires = int(CLOCK.now().timestamp() + LONG_RUN_S + 3_600)
        self.tokens = {name: world.stack.user_token(name, exp=expires) for name in self.names}
        self.scripts: list[Script] = []
        self._stopping = threading.Event()
        self._url = world.api.url
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        client = Client(self._url, self.tokens, self.tally, lambda: False)
        seed = SEED * 1_000_000 + number
        while not self._stopping.is_set():
            seed += CLIENTS
            [script] = plan(seed, 1, [self.names[seed % len(self.names)]])
            self.scripts.append(script)
            for step in script.steps:
                client.perform(script, step)
                CLOCK.sleep(PAUSE_S)
        client.close()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.timeout(LONG_RUN_S + 300)
def test_through_faults_without_end_everything_holds_and_nothing_grows(world: World) -> None:
    print(f"LONG_RUN_SEED={SEED}")  # shown by pytest when it fails
    users, began = Users(world), CLOCK.monotonic()
    before: Any = None
    try:
        round_of: list[Callable[[], None]] = []
        while (passed_s := CLOCK.monotonic() - began) < LONG_RUN_S:
            if before is None and passed_s > LONG_RUN_S / 4:
                before = world.holds()
            if not round_of:
                print(f"{passed_s:.0f} s: {users.tally.acknowledged}, {world.holds()}", flush=True)
                round_of = world.dice.sample(world.faults, len(world.faults))
            round_of.pop()()
            CLOCK.sleep(FAULT_EVERY_S / 2)
            world.let_be()
            CLOCK.sleep(FAULT_EVERY_S / 2)
    finally:
        world.let_be()
        users.stop()
    world.proxy.deliver_held()
    wait_until(lambda: world.pending() == 0, timeout_s=120.0)
    after = world.holds()
    print(f"{users.tally.acknowledged} acknowledged; {before} → {after}")
    assert world.api.stop() == 0
    assert users.tally.errors == []
    assert users.tally.acknowledged > LONG_RUN_S
    assert after[0] < before[0] + GROWTH_BYTES_MAX
    assert after[1] <= before[1] + DESCRIPTORS_MORE_MAX

    remote = SupabaseRemote(world.stack.url, world.stack.secret_key)
    with LocalStore.open(world.api.data_dir, tables=SESSION_TABLES) as store:
        report = audit(remote, store)
    remote.close()
    total = report.total
    assert report.balanced
    assert (total.applied, total.dead, total.conflict) == (users.tally.acknowledged, 0, 0)
    with psycopg.connect(world.stack.database_url) as sql:
        assert compare_with_clients(sql, users.scripts) == (0, 0)
        assert counter_mismatches(sql) == 0
    assert cross_user_rows(world.stack, users.tokens) == 0
