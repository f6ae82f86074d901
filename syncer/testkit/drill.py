"""The outage drill: the real API through a real outage, a kill and a recovery, with proof.

Traffic runs over HTTP against `syncer serve` in its own process; Postgres and PostgREST are stopped
under it, the API process is killed with SIGKILL in the outage and started again on its folder, then
Supabase comes back, the buffer drains, and everything is counted: what the clients were promised,
what the buffer says, what the ledger says, what stands in the tables.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import psycopg

from local_store import LocalStore
from local_store.clock import Clock, SystemClock
from syncer.audit import AuditReport, audit
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.api_process import ApiProcess
from syncer.testkit.drill_counts import (
    compare_with_clients,
    counter_mismatches,
    cross_user_rows,
    percentiles,
)
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Cut
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.traffic import Client, Tally, Turns, fresh_users, plan

USERS = 5
CLIENTS = 6
DRAIN_TIMEOUT_S = 120.0
LOST_REPLY, LOST_REPLIES = Cut("after"), 2  # committed, then the connection is reset; twice
BEFORE, DURING = 0.35, 0.75  # shares of the steps: done before the outage, done when it ends


class Progress(Protocol):
    """Where the drill tells what it is doing; the command line draws it."""

    def phase(self, text: str) -> None:
        """Say what happens now."""
        ...

    def steps(self, done: int, total: int) -> None:
        """Say how much of the traffic is through."""
        ...


class Silent:
    """Tells nobody."""

    def phase(self, text: str) -> None:
        """Say nothing."""

    def steps(self, done: int, total: int) -> None:
        """Count nothing."""


@dataclass(frozen=True, slots=True)
class DrillSize:
    """How much, how long, and from which seed."""

    sessions: int = 150
    outage_seconds: float = 8.0
    seed: int = 7


@dataclass(frozen=True, slots=True)
class DrillResult:
    """What was promised and what is there; `passed` only when they agree."""

    seed: int
    acknowledged: int
    acknowledged_during_outage: int
    reads: int
    repeated: int
    replies_lost: int
    errors: tuple[str, ...]
    ack_ms: dict[str, float]
    drain_s: float
    audit: AuditReport
    lost: int
    duplicated: int
    counter_mismatches: int
    cross_user_rows: int

    @property
    def passed(self) -> bool:
        """True when nothing is lost, doubled, refused, in conflict or visible to a stranger."""
        total = self.audit.total
        undelivered = total.pending + total.held + total.conflict + total.dead
        return self.audit.balanced and not any(
            (
                self.lost,
                self.duplicated,
                self.counter_mismatches,
                self.cross_user_rows,
                len(self.errors),
                undelivered,
                total.applied != self.acknowledged,
                self.replies_lost == 0,  # a drill that injected nothing proves nothing
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Return the document that `syncer demo --json` prints."""
        return {
            "seed": self.seed,
            "acknowledged": self.acknowledged,
            "acknowledged_during_outage": self.acknowledged_during_outage,
            "replies_lost_after_commit": self.replies_lost,
            "api_errors": len(self.errors),
            "errors": list(self.errors[:10]),
            "ack_ms": self.ack_ms,
            "drain_s": self.drain_s,
            "audit": self.audit.to_json(),
            "lost": self.lost,
            "duplicated": self.duplicated,
            "counter_mismatches": self.counter_mismatches,
            "cross_user_rows": self.cross_user_rows,
        }


def run_drill(
    size: DrillSize,
    *,
    progress: Progress | None = None,
    keep: Path | None = None,
    clock: Clock | None = None,
) -> DrillResult:
    """Run the drill; everything it starts has ended when it returns or raises.

    `keep` names a folder that stays, with the database, the buffer and the API's log in it.
    """
    progress, clock = progress or Silent(), clock or SystemClock()
    with tempfile.TemporaryDirectory(prefix="syncer-drill-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        progress.phase("starting Postgres, PostgREST and the gateway")
        with (
            LocalSupabase.start(keep / "supabase" if keep else None) as stack,
            FaultProxy.start("127.0.0.1", int(stack.url.rsplit(":", 1)[1])) as proxy,
        ):
            settings = {
                **stack.env(),
                "SUPABASE_URL": proxy.url,
                "SYNCER_FLUSH_INTERVAL_S": "0.5",
                "SYNCER_BREAKER_INTERVAL_S": "1",
            }
            api = ApiProcess(settings, folder / "buffer", folder / "api.log", clock)
            drill = _Drill(size, stack, proxy, api, progress, clock)
            try:
                return drill.run()
            finally:
                api.kill()


class _Drill:
    def __init__(
        self,
        size: DrillSize,
        stack: LocalSupabase,
        proxy: FaultProxy,
        api: ApiProcess,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._size = size
        self._stack = stack
        self._proxy = proxy
        self._api = api
        self._progress = progress
        self._clock = clock
        self._users = fresh_users(USERS)
        self._scripts = plan(size.seed, size.sessions, self._users)
        self._total = sum(len(script.steps) for script in self._scripts)
        self._tally = Tally()
        self._outage = threading.Event()
        self._turns = Turns(self._scripts, size.seed)

    def run(self) -> DrillResult:
        self._progress.phase("starting the API in its own process")
        self._api.start()
        tokens = {user: self._stack.user_token(user) for user in self._users}
        with ThreadPoolExecutor(CLIENTS, thread_name_prefix="client") as pool:
            clients = [pool.submit(self._client, tokens) for _ in range(CLIENTS)]
            try:
                self._conduct()
            finally:
                self._turns.allow(self._total)
            for client in clients:
                client.result()
        self._turns.check_done()
        drain_s = self._drain()
        self._api.stop()
        return self._judge(drain_s, tokens)

    def _conduct(self) -> None:
        """Let the traffic through in three parts, with the outage and the kill between them."""
        self._progress.phase("traffic with Supabase up; some replies get lost after the commit")
        self._proxy.next(LOST_REPLY, times=LOST_REPLIES, matching="sync_apply_batch")
        self._let_through(BEFORE)
        self._progress.phase("OUTAGE: Postgres and PostgREST stopped, traffic goes on")
        self._stack.stop_data_plane()
        self._outage.set()
        end = self._clock.monotonic() + self._size.outage_seconds
        middle = (BEFORE + DURING) / 2
        self._let_through(middle, over_s=self._size.outage_seconds / 2)
        self._progress.phase("OUTAGE: the API is killed with SIGKILL and restarted on its folder")
        self._turns.allow_ahead(CLIENTS)  # requests are in flight when the kill comes
        self._api.kill()
        self._api.start()
        self._progress.phase("OUTAGE: traffic goes on after the restart")
        self._let_through(DURING, over_s=max(0.0, end - self._clock.monotonic()))
        self._outage.clear()
        self._progress.phase("Supabase comes back, traffic goes on while the buffer drains")
        self._stack.start_data_plane()
        self._let_through(1.0)

    def _let_through(self, share: float, over_s: float = 0.0) -> None:
        """Allow steps up to `share` of all, spread over `over_s`, and wait until they are done."""
        start, goal = self._turns.done, int(self._total * share)
        began = self._clock.monotonic()
        while self._turns.done < goal:
            passed_s = self._clock.monotonic() - began
            part = 1.0 if over_s <= 0 else min(1.0, passed_s / over_s)
            self._turns.allow(start + int((goal - start) * part))
            self._progress.steps(self._turns.done, self._total)
            self._clock.sleep(0.02)
        self._progress.steps(self._turns.done, self._total)

    def _client(self, tokens: dict[str, str]) -> None:
        client = Client(self._api.url, tokens, self._tally, self._outage.is_set, self._clock)
        try:
            self._turns.work(client.perform)
        finally:
            client.close()

    def _drain(self) -> float:
        """Wait until the API says that nothing is pending; returns the seconds it took."""
        self._progress.phase("draining")
        began = self._clock.monotonic()
        while self._clock.monotonic() - began < DRAIN_TIMEOUT_S:
            health = httpx.get(f"{self._api.url}/health", timeout=5.0).json()
            if health["pending"] == 0:
                break
            self._clock.sleep(0.05)
        return round(self._clock.monotonic() - began, 3)

    def _judge(self, drain_s: float, tokens: dict[str, str]) -> DrillResult:
        self._progress.phase("auditing: clients against buffer against ledger against tables")
        remote = SupabaseRemote(self._stack.url, self._stack.secret_key)
        with LocalStore.open(self._api.data_dir, tables=SESSION_TABLES) as store:
            report = audit(remote, store)
        remote.close()
        with psycopg.connect(self._stack.database_url) as connection:
            lost, duplicated = compare_with_clients(connection, self._scripts)
            counters = counter_mismatches(connection)
        tally = self._tally
        return DrillResult(
            seed=self._size.seed,
            acknowledged=tally.acknowledged,
            acknowledged_during_outage=tally.acknowledged_during_outage,
            reads=tally.reads,
            repeated=tally.repeated,
            replies_lost=sum(
                entry.fault is not None and entry.upstream_status == 200
                for entry in self._proxy.log
            ),
            errors=tuple(tally.errors),
            ack_ms=percentiles(tally.ack_ms),
            drain_s=drain_s,
            audit=report,
            lost=lost + report.total.lost,
            duplicated=duplicated + report.total.duplicated,
            counter_mismatches=counters,
            cross_user_rows=cross_user_rows(self._stack, tokens),
        )
