"""Clocks that jump, differ or stand still; time zones: P3, P7, P10."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from local_store import Insert, Update, user_uuid
from local_store.clock import ManualClock, SystemClock, new_id
from syncer import operators
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.flusher import Flusher, drain
from syncer.remote import SupabaseRemote, TableRead
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp

USER = "github:42"
HOUR = timedelta(hours=1)

Make = Callable[..., BufferedApp]


@pytest.fixture
def sql(fresh_supabase: Any) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def now_there(sql: psycopg.Connection[Any]) -> datetime:
    [(found,)] = sql.execute("select now()").fetchall()
    moment: datetime = found
    return moment


@pytest.mark.parametrize("jump", [-HOUR, 24 * HOUR], ids=["back_an_hour", "forward_a_day"])
def test_a_clock_that_jumps_changes_no_order_and_makes_no_conflict(
    buffered_store: Make, sql: psycopg.Connection[Any], jump: timedelta
):
    clock = ManualClock(SystemClock().now())
    app = buffered_store(SESSION_TABLES, clock=clock)
    row_id, orphan, parent = new_id(), new_id(), new_id()
    app.store.write([Insert("sessions", {"id": row_id, "metadata": {"n": 0}})], user_id=USER)
    child = {"id": orphan, "session_id": parent, "content": "c", "revision_type": "initial"}
    app.store.write([Insert("session_revisions", child)], user_id=USER)
    assert app.flush_once().held == 1  # its parent isn't there yet; it is due again by the clock
    for n in range(1, 4):
        app.store.write([Update("sessions", row_id, {"metadata": {"n": n}})], user_id=USER)
        if n == 1:
            clock.set_wall(clock.now() + jump)
    sql.execute("insert into sessions (id, user_id) values (%s, %s)", (parent, user_uuid(USER)))
    flusher = Flusher(app.store, app.remote, clock=clock, jitter=lambda: 0.0)
    drain(flusher, clock, budget_s=10.0)
    edited = sql.execute("select metadata from sessions where id = %s", (row_id,)).fetchall()
    assert edited == [({"n": 3},)], "what isn't waiting goes on at once"
    for _ in range(61):  # what was to wait a moment waits an hour at most
        drain(flusher, clock, budget_s=10.0)
        clock.advance(60.0)
    assert app.store.stats()["pending"] == 0
    assert sql.execute("select id::text from session_revisions").fetchall() == [(orphan,)]
    assert operators.conflicts(app.remote, undecided=False) == []
    assert operators.dead_letters(app.remote) == []
    later = app.store.write([Insert("sessions", {"metadata": {"late": 1}})], user_id=USER)
    assert drain(flusher, clock, budget_s=10.0).applied == 1
    assert app.store.state(later.txn_id) == "applied"
    [(newest,)] = sql.execute("select max(created_at) from sessions").fetchall()
    assert newest <= now_there(sql), "a clock ahead makes no row of tomorrow"
    assert app.audit().balanced


def test_containers_ten_minutes_apart_edit_one_row_in_turn_without_a_conflict(
    buffered_store: Make, sql: psycopg.Connection[Any]
):
    now = SystemClock().now()
    apps = [
        buffered_store(SESSION_TABLES, clock=ManualClock(now + timedelta(minutes=minutes)))
        for minutes in (-5, 5)
    ]
    row_id = new_id()
    apps[1].store.write([Insert("sessions", {"id": row_id, "metadata": {"n": 0}})], user_id=USER)
    apps[1].drain()
    for n in range(1, 7):
        app = apps[n % 2]
        as_of, where = app.store.change_counter(), {"id": row_id}
        [rows] = app.remote.read(user_uuid(USER), [TableRead("sessions", where)])
        app.store.refresh("sessions", rows, user_id=USER, as_of=as_of, where=where)
        app.store.write([Update("sessions", row_id, {"metadata": {"n": n}})], user_id=USER)
        app.drain()
    assert sql.execute("select metadata from sessions").fetchall() == [({"n": 6},)]
    assert operators.conflicts(apps[0].remote, undecided=False) == []
    assert all(app.audit().balanced for app in apps)


class Suspended(SupabaseRemote):
    """The machine stands still for an hour while the reply is on its way, once."""

    def __init__(self, url: str, key: str, clock: ManualClock) -> None:
        super().__init__(url, key)
        self._slept = clock

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        reply = super().apply_batch(batch)
        if self._slept.monotonic() < HOUR.total_seconds():
            self._slept.advance(HOUR.total_seconds())
        return reply


def test_a_machine_suspended_for_an_hour_in_a_call_goes_on_where_it_was(
    buffered_store: Make, fresh_supabase: Any, sql: psycopg.Connection[Any]
):
    clock = ManualClock(SystemClock().now())
    app = buffered_store(SESSION_TABLES, clock=clock)
    row_id = new_id()
    app.store.write([Insert("sessions", {"id": row_id, "metadata": {"n": 0}})], user_id=USER)
    remote = Suspended(fresh_supabase.url, fresh_supabase.secret_key, clock)
    flusher = Flusher(app.store, remote, clock=clock, jitter=lambda: 0.0)
    report = flusher.flush_once()
    assert (report.applied, report.breaker) == (1, "closed")
    app.store.write([Update("sessions", row_id, {"metadata": {"n": 1}})], user_id=USER)
    assert flusher.flush_once().applied == 1
    assert sql.execute("select metadata from sessions").fetchall() == [({"n": 1},)]
    assert app.audit().balanced
    remote.close()


@pytest.fixture
def in_berlin() -> Iterator[None]:
    """This process's local time has daylight saving."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_the_hour_that_comes_twice_where_the_container_stands_is_two_hours(
    buffered_store: Make, sql: psycopg.Connection[Any], in_berlin: None
):
    """02:30 in Berlin on that day is 00:30 and 01:30 in UTC; one after the other stays so."""
    clock = ManualClock(datetime(2025, 10, 26, 0, 30, tzinfo=UTC))
    assert clock.now().astimezone().hour == (clock.now() + HOUR).astimezone().hour == 2
    app = buffered_store(SESSION_TABLES, clock=clock)
    ids = [new_id(), new_id()]
    for row_id in ids:
        app.store.write([Insert("sessions", {"id": row_id})], user_id=USER)
        clock.advance(HOUR.total_seconds())
    app.drain()
    found = sql.execute("select id::text, created_at from sessions order by created_at").fetchall()
    assert [row_id for row_id, _ in found] == ids
    moments = [moment.astimezone(UTC) for _, moment in found]
    assert moments == [datetime(2025, 10, 26, hour, 30, tzinfo=UTC) for hour in (0, 1)]
    assert abs(SystemClock().now() - now_there(sql)) < HOUR
