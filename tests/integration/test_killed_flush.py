"""A flusher that dies or is stopped at a named step, in a process of its own, on real parts: P2.

What it had acknowledged, sent or half recorded is finished by the next flusher on the folder.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert, LocalStore, Update
from local_store.clock import new_id
from syncer.flusher import Flusher
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.disk_faults import DiskFaults, Step
from syncer.testkit.faults import Delay
from syncer.testkit.history import History, assert_clean
from tests.integration.dying import Dying, die, ended, in_child, is_stopped, stop
from tests.integration.test_fault_mix import USERS, observe

USER = USERS[0]
RPC = "/rpc/sync_apply_batch"
ANY_STATUS = {
    **SESSION_TABLES[0].columns,
    "status": replace(SESSION_TABLES[0].columns["status"], enum=None),
}
TABLES = [replace(SESSION_TABLES[0], columns=ANY_STATUS), *SESSION_TABLES[1:]]
MIB = 1024 * 1024
OUT_OF_MEMORY_S = 20.0  # ten times what a call may take


class Backlog:
    """A folder with changes of every kind, one of which the server refuses, and their history."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History()
        with LocalStore.open(folder, tables=TABLES) as store:
            row_id, poison = new_id(), new_id()
            revision = {"session_id": row_id, "content": "c", "revision_type": "initial"}
            for ops in (
                [Insert("sessions", {"id": row_id, "metadata": {"n": 0}})],
                [Insert("session_revisions", {"id": new_id(), **revision})],
                [Update("sessions", row_id, {"metadata": {"n": 1}})],
                [Insert("sessions", {"id": poison, "status": "bogus"})],
                [Update("sessions", poison, {"metadata": {"n": 2}})],
                [Update("sessions", row_id, {"metadata": {"n": 3}})],
            ):
                self.history.write(store, ops, user_id=USER)

    def finish(self, supabase: Any) -> None:
        """A new process comes to the folder: everything is as if nothing had happened."""
        app = BufferedApp(self.folder, TABLES, supabase.url, supabase.secret_key)
        app.drain()
        total = app.audit().total
        assert app.audit().balanced
        assert (total.applied, total.dead, total.held, total.pending) == (4, 1, 1, 0)
        assert_clean(self.history, observe(supabase.database_url, [app]), TABLES)
        app.close()


@pytest.fixture
def backlog(tmp_path: Path) -> Backlog:
    return Backlog(tmp_path / "buffer")


def flush(backlog: Backlog, remote: SupabaseRemote) -> None:
    with LocalStore.open(backlog.folder, tables=TABLES) as store:
        Flusher(store, remote).flush_once()


@pytest.mark.parametrize(
    "moment", ["before send", "after commit", "before parking", "after parking"]
)
def test_a_flusher_killed_around_a_call_leaves_all_to_the_next_one(
    backlog: Backlog, fresh_supabase: Any, moment: str
):
    remote = Dying(fresh_supabase.url, fresh_supabase.secret_key, moment, die)
    assert ended(in_child(lambda: flush(backlog, remote))) == -signal.SIGKILL
    backlog.finish(fresh_supabase)


def test_a_flusher_killed_while_its_request_is_on_the_way_leaves_all_to_the_next_one(
    backlog: Backlog, fresh_supabase: Any, fault_proxy: Any
):
    fault_proxy.next(Delay(0.3), matching=RPC)
    remote = SupabaseRemote(fault_proxy.url, fresh_supabase.secret_key)
    pid = in_child(lambda: flush(backlog, remote))
    fault_proxy.wait_until(lambda log: any(RPC in entry.path for entry in log))
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    backlog.finish(fresh_supabase)


@pytest.mark.parametrize("step", ["before write", "after write", "before sync", "after sync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_flusher_killed_while_it_records_leaves_all_to_the_next_one(
    backlog: Backlog, fresh_supabase: Any, step: Step, nth: int
):
    def work() -> None:
        with DiskFaults(backlog.folder) as disk:

            def soon() -> None:
                disk.kill_at(step, "-wal", nth=nth)

            key = fresh_supabase.secret_key
            flush(backlog, Dying(fresh_supabase.url, key, "after commit", soon))

    assert ended(in_child(work)) == -signal.SIGKILL
    backlog.finish(fresh_supabase)


def test_a_flusher_stopped_in_a_call_stops_no_write_and_continued_it_doubles_nothing(
    backlog: Backlog, fresh_supabase: Any
):
    remote = Dying(fresh_supabase.url, fresh_supabase.secret_key, "after commit", stop)
    pid = in_child(lambda: flush(backlog, remote))
    assert is_stopped(pid)
    app = BufferedApp(backlog.folder, TABLES, fresh_supabase.url, fresh_supabase.secret_key)
    try:
        late = app.store.write([Insert("sessions", {})], user_id=USER)
        report = app.flush_once()
        assert (report.sent, report.stopped) == (0, "budget"), "the turn is the stopped one's"
    finally:
        os.kill(pid, signal.SIGCONT)
        assert ended(pid) == 0
    app.drain()
    assert app.store.state(late.txn_id) == "applied"
    with psycopg.connect(fresh_supabase.database_url) as sql:
        assert sql.execute("select count(*) from sync.ledger").fetchone() == (5,)
    app.close()


def test_a_stopped_flusher_that_is_killed_gives_its_turn_to_the_next_one(
    backlog: Backlog, fresh_supabase: Any
):
    remote = Dying(fresh_supabase.url, fresh_supabase.secret_key, "after commit", stop)
    pid = in_child(lambda: flush(backlog, remote))
    assert is_stopped(pid)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    backlog.finish(fresh_supabase)


def test_a_drain_that_runs_out_of_memory_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, fresh_supabase: Any
):
    """Some libraries raise, some kill the process: either way the next one finds everything."""
    folder, count = tmp_path / "buffer", 60
    with LocalStore.open(folder, tables=TABLES) as store:
        for n in range(count):
            values = {"metadata": {"n": n, "text": "x" * 50_000}}
            store.write([Insert("sessions", values)], user_id=USER)

    def drain_with(headroom_bytes: int, has_called: bool) -> None:
        faulthandler.disable()  # it would tell of a crash that is meant
        url, key = fresh_supabase.url, fresh_supabase.secret_key
        remote = SupabaseRemote(url, key, deadline_s=OUT_OF_MEMORY_S / 10)
        with LocalStore.open(folder, tables=TABLES) as store:
            if has_called:  # then the next thread finds room for its stack, but perhaps no more
                remote.audit()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + headroom_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            assert Flusher(store, remote).flush_once().applied

    codes = [
        ended(in_child(partial(drain_with, headroom * MIB, has_called)), OUT_OF_MEMORY_S)
        for headroom in range(5)
        for has_called in (True, False)
    ]
    assert any(codes), "there was memory enough"
    assert -signal.SIGKILL not in codes, "one of them hung"
    app = BufferedApp(folder, TABLES, fresh_supabase.url, fresh_supabase.secret_key)
    app.drain()
    total = app.audit().total
    assert app.audit().balanced
    assert (total.applied, total.pending) == (count, 0)
    app.close()
    with psycopg.connect(fresh_supabase.database_url) as sql:
        found = sql.execute("select count(distinct metadata), count(*) from sessions").fetchone()
        assert found == (count, count)
