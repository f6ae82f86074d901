"""The worker on a real project: its lease, what the server knows, the canary, a whole pass."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert
from local_store.clock import ManualClock, new_id
from syncer.adopter import Adopter
from syncer.errors import ProtocolMismatch
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.shipper import Shipper
from syncer.testkit import BufferedApp
from syncer.testkit.faults import Refuse
from syncer.volume import Volume
from syncer.worker import LEASE_S, Lease, Worker
from tests.integration.dying import Dying, ended, in_child, is_stopped, stop
from tests.integration.segment_delivery import KEY

USER = "github:42"


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def app(buffered_store: Callable[..., BufferedApp]) -> BufferedApp:
    return buffered_store(SESSION_TABLES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "volume"
    made.mkdir()
    return made


def worker(
    app: BufferedApp, folder: Path, holder: str = "one", clock: Any = None, remote: Any = None
) -> Worker:
    volume, remote = Volume(folder), remote or app.remote
    adopter = Adopter(
        volume,
        remote,
        folder.parent / f"scratch-{holder}",
        tables=SESSION_TABLES,
        keys=[KEY],
        environment="test",
    )
    limits = {"adopt_after_s": 0.0, "ledger_retention_s": 90 * 86_400.0}
    return Worker(remote, volume, adopter, holder=holder, clock=clock, **limits)


def ship(app: BufferedApp, folder: Path, sessions: int = 1) -> list[str]:
    ids = [new_id() for _ in range(sessions)]
    for row_id in ids:
        app.store.write([Insert("sessions", {"id": row_id})], user_id=USER)
    shipped = Shipper(app.store, Volume(folder), KEY, environment="test").ship()
    assert shipped.state == "committed"
    return ids


def test_a_pass_delivers_collects_asks_the_canary_and_prunes_once_an_hour(app, folder, sql):
    ids, clock = ship(app, folder, 3), ManualClock()
    made = worker(app, folder, clock=clock)
    report = made.work(budget_s=30.0)
    assert report.leased
    assert report.ok
    assert report.adoption is not None
    assert (report.adoption.adopted, report.adoption.collected) == (3, 1)
    assert (report.leaks, report.pruned) == ((), 0)
    found = sql.execute("select count(*) from sessions where id = any(%s::uuid[])", [ids])
    assert found.fetchone() == (3,)
    assert made.work(budget_s=30.0).pruned is None
    clock.advance(3_600.0)
    assert made.work(budget_s=30.0).pruned == 0


def test_one_worker_at_a_time_and_the_next_as_soon_as_it_gives_back(app, folder):
    first, second = (Lease(app.remote, name, ManualClock()) for name in ("one", "two"))
    assert first.take()
    assert first.take()  # renewed
    assert not second.take()
    assert not worker(app, folder, "two").work(budget_s=5.0).leased
    first.give_back()
    assert second.take()
    first.give_back()  # not its own any more
    assert not first.take()


def test_a_worker_that_died_keeps_the_others_away_until_its_lease_runs_out(app, sql):
    assert Lease(app.remote, "dead", ManualClock()).take()
    other = Lease(app.remote, "other", ManualClock())
    assert not other.take()
    left = sql.execute("select extract(epoch from expires_at - now()) from sync.leases").fetchone()
    assert left is not None
    assert 0 < left[0] <= LEASE_S
    sql.execute("update sync.leases set expires_at = now() - interval '1 second'")
    assert other.take()


def test_a_lease_is_renewed_in_time_and_its_loss_is_noticed(app, sql):
    clock = ManualClock()
    lease = Lease(app.remote, "one", clock)
    assert lease.take()
    assert lease.keep()
    sql.execute("update sync.leases set holder = 'two'")
    assert lease.keep()  # not asked yet
    clock.advance(31.0)
    assert not lease.keep()


def test_a_pass_that_runs_on_past_its_lease_does_no_harm(app, folder, sql):
    ids = ship(app, folder, 2)
    slow, fast = worker(app, folder, "slow"), worker(app, folder, "fast")
    real = app.remote.settled
    stolen = []

    def settled(ranges: Any) -> list[bool]:
        if not stolen:
            stolen.append(True)
            sql.execute("update sync.leases set expires_at = now() - interval '1 second'")
            assert fast.work(budget_s=30.0).leased
        return real(ranges)

    slow._adopter._remote = _Asking(app.remote, settled)  # type: ignore[attr-defined]
    assert slow.work(budget_s=30.0).leased
    found = sql.execute("select count(*) from sync.ledger").fetchone()
    assert found == (len(ids),)
    assert app.remote.audit()["logs"][0]["duplicated"] == 0


def test_a_worker_stopped_past_its_lease_and_continued_doubles_nothing(
    app, folder, fresh_supabase, sql
):
    """Another one does its work meanwhile; the first finds everything done when it goes on."""
    ids = ship(app, folder, 3)
    remote = Dying(fresh_supabase.url, fresh_supabase.secret_key, "after commit", stop)
    pid = in_child(lambda: worker(app, folder, "slow", remote=remote).work(budget_s=30.0))
    try:
        assert is_stopped(pid)
        assert not worker(app, folder, "other").work(budget_s=30.0).leased
        sql.execute("update sync.leases set expires_at = now() - interval '1 second'")
        report = worker(app, folder, "other").work(budget_s=30.0)
        assert (report.leased, report.ok) == (True, True)
    finally:
        os.kill(pid, signal.SIGCONT)
        assert ended(pid) == 0
    assert worker(app, folder, "third").work(budget_s=30.0).ok
    found = sql.execute("select count(*) from sessions where id = any(%s::uuid[])", [ids])
    assert found.fetchone() == (3,)
    assert sql.execute("select count(*) from sync.ledger").fetchone() == (3,)
    assert app.remote.audit()["logs"][0]["duplicated"] == 0
    assert not list(folder.rglob("*.seg"))


class _Asking:
    """A remote whose `settled` is somebody else's."""

    def __init__(self, remote: SupabaseRemote, settled: Callable[[Any], list[bool]]) -> None:
        self._remote = remote
        self.settled = settled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)


def test_what_is_settled_is_told_by_range(app, sql):
    for _ in range(5):
        app.store.write([Insert("sessions", {})], user_id=USER)
    log_id = app.store.log_id
    assert app.remote.settled([(log_id, 1, 5)]) == [False]
    app.drain()
    asked = [(log_id, 1, 5), (log_id, 2, 3), (log_id, 5, 6), (log_id, 6, 6), (new_id(), 1, 1)]
    assert app.remote.settled(asked) == [True, True, False, False, False]
    app.remote.prune(0.0)
    assert app.remote.settled(asked) == [True, True, False, False, False]
    assert app.remote.settled([]) == []


def test_the_canary_names_the_table_that_lets_a_stranger_see(app, sql):
    app.store.write([Insert("sessions", {})], user_id=USER)
    app.drain()
    assert app.remote.canary() == []
    sql.execute("create policy everybody on sessions for select using (true)")
    try:
        assert app.remote.canary() == ["sessions"]
    finally:
        sql.execute("drop policy everybody on sessions")
    sql.execute("alter table session_revisions disable row level security")
    try:
        session = sql.execute("select id, user_id from sessions limit 1").fetchone()
        assert session is not None
        sql.execute(
            "insert into session_revisions (session_id, user_id, content, revision_type)"
            " values (%s, %s, 'x', 'initial')",
            session,
        )
        assert app.remote.canary() == ["session_revisions"]
    finally:
        sql.execute("alter table session_revisions enable row level security")
    assert app.remote.canary() == []


def test_a_leak_makes_the_pass_trouble(app, folder, sql):
    sql.execute("create policy everybody on sessions for select using (true)")
    try:
        report = worker(app, folder).work(budget_s=30.0)
    finally:
        sql.execute("drop policy everybody on sessions")
    assert report.leaks == ("sessions",)
    assert not report.ok


@pytest.mark.parametrize("name", ["sync_lease_v1", "sync_settled_v1", "sync_canary_v1"])
@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_nobody_but_the_worker_may_call_its_functions(sql, name, role):
    sql.execute(f"set role {role}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sql.execute(f"select {name}('{{}}')")


@pytest.mark.parametrize(
    ("function", "p"),
    [
        ("sync_lease_v1", {"name": "worker"}),
        ("sync_lease_v1", {"name": "worker", "holder": "x", "seconds": 1e9}),
        ("sync_settled_v1", {}),
    ],
)
def test_a_malformed_call_is_a_protocol_error(app, function, p):
    with pytest.raises(ProtocolMismatch):
        app.remote.operate(function, p)


def test_an_outage_is_a_report_and_the_segments_stay(app, folder, fault_proxy):
    ship(app, folder)
    fault_proxy.set(Refuse())
    report = worker(app, folder).work(budget_s=5.0)
    assert not report.leased
    assert report.errors
    assert not report.ok
    fault_proxy.clear()
    assert worker(app, folder).work(budget_s=30.0).ok
