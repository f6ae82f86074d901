"""The flusher inside the API process: woken by writes, never by luck."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import jwt
import pytest

from local_store import Column, Insert, LocalStore, TableSpec
from local_store.clock import ManualClock, SystemClock
from syncer.errors import RemoteUnavailable
from syncer.flusher import Flusher, FlushReport
from syncer.remote import SupabaseRemote
from syncer.service.scheduler import (
    JOB_ID,
    REST_PER_RUN,
    REST_S_MAX,
    REST_S_MIN,
    FlushScheduler,
    rest_after,
)
from tests.simulation.remote_model import RemoteModel

NOTES = TableSpec(
    "notes",
    {
        "id": Column("uuid"),
        "user_id": Column("uuid"),
        "updated_at": Column("timestamp"),
        "text": Column("text"),
    },
)
PATIENCE_S = 10.0


class Reports:
    """Collects the scheduler's reports and lets a test wait for one."""

    def __init__(self) -> None:
        self.seen: list[FlushReport] = []
        self._changed = threading.Condition()

    def __call__(self, report: FlushReport) -> None:
        with self._changed:
            self.seen.append(report)
            self._changed.notify_all()

    def wait_for(self, wanted) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: any(map(wanted, self.seen)), PATIENCE_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=[NOTES]) as opened:
        yield opened


def scheduler(store, server, reports, interval_s=3600.0) -> FlushScheduler:
    flusher = Flusher(store, server, jitter=lambda: 0.0)
    return FlushScheduler(store, flusher, interval_s=interval_s, on_report=reports)


def outage(server: RemoteModel) -> list[bool]:
    """Let calls fail for as long as what this returns says so."""
    down = [True]

    def maybe() -> None:
        if down[0]:
            raise RemoteUnavailable("down")

    server.before_call = maybe
    return down


def test_a_write_is_delivered_long_before_the_interval(store):
    server, reports = RemoteModel(store.tables), Reports()
    running = scheduler(store, server, reports)
    running.start()
    try:
        store.write([Insert("notes", {"text": "now"})], user_id="u")
        assert reports.wait_for(lambda report: report.applied == 1)
    finally:
        running.stop()


def test_a_write_during_a_pass_is_delivered_too(store):
    server, reports = RemoteModel(store.tables), Reports()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    server.before_call = hold
    running = scheduler(store, server, reports)
    running.start()
    try:
        store.write([Insert("notes", {"text": "first"})], user_id="u")
        assert entered.wait(PATIENCE_S)
        store.write([Insert("notes", {"text": "second"})], user_id="u")
        leave.set()
        assert reports.wait_for(lambda report: report.applied == 2)
    finally:
        leave.set()
        running.stop()


def test_a_write_behind_the_last_look_of_a_run_does_not_wait_for_the_interval(store):
    server, reports = RemoteModel(store.tables), Reports()
    at_end, leave = threading.Event(), threading.Event()

    def hold_the_end(report: FlushReport) -> None:
        reports(report)
        at_end.set()
        leave.wait(PATIENCE_S)

    running = scheduler(store, server, hold_the_end)
    running.start()
    try:
        store.write([Insert("notes", {"text": "first"})], user_id="u")
        assert at_end.wait(PATIENCE_S)
        store.write([Insert("notes", {"text": "second"})], user_id="u")
        threading.Event().wait(5 * REST_S_MIN)  # for who would ask for a run during this one
        leave.set()
        assert reports.wait_for(lambda report: sum(r.applied for r in reports.seen) == 2)
    finally:
        leave.set()
        running.stop()


@pytest.mark.parametrize(
    ("took_s", "eager", "rest_s"),
    [
        (0.0, False, REST_S_MIN),
        (0.03, False, 0.03 * REST_PER_RUN),
        (10.0, False, REST_S_MAX),
        (10.0, True, REST_S_MIN),
    ],
)
def test_the_rest_between_runs_grows_with_them_unless_somebody_waits(took_s, eager, rest_s):
    assert rest_after(took_s, eager=eager) == rest_s


def test_a_run_that_raises_does_not_end_the_schedule(store):
    server, reports = RemoteModel(store.tables), Reports()
    broken = [True]

    def fail_once() -> None:
        if broken.pop() if broken else False:
            raise RuntimeError("a programming error")

    server.before_call = fail_once
    running = scheduler(store, server, reports, interval_s=0.05)
    store.write([Insert("notes", {"text": "x"})], user_id="u")
    running.start()
    try:
        assert reports.wait_for(lambda report: report.applied == 1)
    finally:
        running.stop()


def test_the_interval_finds_the_end_of_an_outage_without_a_write(store):
    server, reports = RemoteModel(store.tables), Reports()
    down = outage(server)
    store.write([Insert("notes", {"text": "x"})], user_id="u")
    running = scheduler(store, server, reports, interval_s=0.05)
    running.start()
    try:
        assert reports.wait_for(lambda report: report.stopped == "outage")
        down[0] = False
        assert reports.wait_for(lambda report: report.applied == 1)
    finally:
        running.stop()


def test_stopping_leaves_what_is_pending_in_the_buffer(store):
    server = RemoteModel(store.tables)

    def down() -> None:
        raise RemoteUnavailable("down")

    server.before_call = down
    running = scheduler(store, server, Reports())
    running.start()
    store.write([Insert("notes", {"text": "x"})], user_id="u")
    running.stop()
    assert store.stats()["pending"] == 1
    store.write([Insert("notes", {"text": "after"})], user_id="u")
    assert store.stats()["pending"] == 2


def test_a_clock_set_back_an_hour_does_not_pause_the_interval(store):
    server, reports = RemoteModel(store.tables), Reports()
    down = outage(server)
    store.write([Insert("notes", {"text": "x"})], user_id="u")
    running = scheduler(store, server, reports, interval_s=0.05)
    running.start()
    try:
        assert reports.wait_for(lambda report: report.stopped == "outage")
        # To a clock that is an hour behind, the job is due in an hour.
        ahead = SystemClock().now() + timedelta(hours=1)
        running._scheduler.modify_job(JOB_ID, next_run_time=ahead)
        down[0] = False
        assert reports.wait_for(lambda report: report.applied == 1)
    finally:
        running.stop()


def test_a_run_that_is_late_by_an_hour_is_made_all_the_same(store):
    """As after a suspension, or when the clock jumped ahead between the nudge and its run."""
    server, reports = RemoteModel(store.tables), Reports()
    late = ManualClock(SystemClock().now() - timedelta(hours=1))
    flusher = Flusher(store, server, jitter=lambda: 0.0)
    running = FlushScheduler(store, flusher, interval_s=86_400.0, on_report=reports, clock=late)
    running.start()
    try:
        store.write([Insert("notes", {"text": "x"})], user_id="u")
        assert reports.wait_for(lambda report: report.applied == 1)
    finally:
        running.stop()


def test_a_call_that_hangs_delays_the_next_run_by_its_deadline_and_no_longer(store):
    """The server takes the connection and never answers."""
    server, reports = RemoteModel(store.tables), Reports()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = SupabaseRemote(
            f"http://127.0.0.1:{silent.getsockname()[1]}", jwt.encode({}, "k" * 32), deadline_s=0.1
        )

        class HangsOnce:
            def apply_batch(self, batch):
                first = not reports.seen
                return (hanging if first else server).apply_batch(batch)

        store.write([Insert("notes", {"text": "x"})], user_id="u")
        running = scheduler(store, HangsOnce(), reports, interval_s=0.05)
        running.start()
        try:
            assert reports.wait_for(lambda report: report.applied == 1)
            assert reports.seen[0].stopped == "outage"
        finally:
            running.stop()
            hanging.close()
