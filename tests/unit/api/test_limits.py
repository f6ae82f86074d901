"""Limits, shutdown and health."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from local_store import StoreClosed
from local_store.clock import ManualClock, new_id
from local_store.ops import Outcome
from syncer.flusher import FlushReport
from syncer.service.health import SyncState, WriteGate
from tests.unit.api.support import Api, error_of

# -- limits, shutdown, health ----------------------------------------------------------------------


def test_a_full_buffer_is_said_so_and_reads_go_on(tmp_path: Path) -> None:
    made = Api(tmp_path, buffer_transactions_max=1)
    session = made.new()
    assert error_of(made.post("", {"prompt": "x"}), 503, "buffer_full")["retry_after_s"] > 0
    path = f"/{session['session_id']}"
    error_of(made.post(f"{path}/finalize"), 503, "buffer_full")
    assert made.client.get(f"/api/sessions{path}").status_code == 200
    error_of(made.client.get("/health/ready"), 503, "buffer_full")
    assert made.client.get("/health").json()["status"] == "failing"
    made.local.close()


def test_after_the_shutdown_nothing_is_written(api: Api) -> None:
    api.new()
    assert api.client.get("/health/ready").status_code == 200
    api.client.__exit__(None, None, None)
    error_of(api.post("", {"prompt": "x"}), 503, "shutting_down")
    error_of(api.client.get("/health/ready"), 503, "shutting_down")
    assert api.client.get("/health/live").status_code == 200
    assert api.local.stats()["last_seq"] == 1
    api.client.__enter__()


def test_a_closed_buffer_is_shutting_down(api: Api) -> None:
    api.local.close()
    error_of(api.post("", {"prompt": "x"}), 503, "shutting_down")
    assert api.client.get("/health").json()["status"] == "failing"
    assert api.client.get("/health/ready").status_code == 503


def test_the_gate_waits_for_who_is_inside_and_lets_nobody_in() -> None:
    gate = WriteGate()
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        with gate.entered():
            inside.set()
            leave.wait(5)

    def close() -> None:
        assert gate.close(5)
        closed.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(5)
    assert not WriteGate.close(gate, 0.0), "somebody is inside"
    with pytest.raises(StoreClosed), gate.entered():
        pass
    closer = threading.Thread(target=close)
    closer.start()
    assert not closed.is_set()
    leave.set()
    assert closed.wait(5)
    writer.join()
    closer.join()


def test_health_follows_the_flusher_and_the_backlog(api: Api) -> None:
    document = api.client.get("/health").json()
    assert document == {
        "status": "ok",
        "supabase": "unknown",
        "breaker": "closed",
        "pending": 0,
        "oldest_age_s": None,
        "at_risk_transactions": 0,
        "parked": 0,
        "acknowledge": "local",
    }
    api.new()
    api.sync.record(FlushReport(sent=1, pending=1, breaker="open", stopped="outage", error="down"))
    document = api.client.get("/health").json()
    assert (document["status"], document["supabase"]) == ("degraded", "down")
    assert (document["pending"], document["at_risk_transactions"]) == (1, 1)
    assert document["breaker"] == "open"
    assert api.client.get("/health/ready").status_code == 200, "writes are accepted in an outage"
    api.sync.record(FlushReport(sent=1, applied=1, stopped="budget"))
    api.server.deliver(api.local)
    document = api.client.get("/health").json()
    assert (document["status"], document["supabase"]) == ("ok", "up")
    api.sync.record(FlushReport(sent=1, breaker="open", stopped="auth", error="refused"))
    assert api.client.get("/health").json()["status"] == "failing"


def test_parked_work_degrades_health(api: Api) -> None:
    api.new()
    [transaction] = api.local.pending(transactions_max=9, bytes_max=10**6)
    api.local.record([Outcome(transaction.txn_id, "dead")])
    document = api.client.get("/health").json()
    assert (document["status"], document["parked"]) == ("degraded", 1)


def test_an_old_answer_of_supabase_proves_nothing() -> None:
    clock = ManualClock()
    sync = SyncState(clock=clock)
    sync.record(FlushReport(sent=1, applied=1, stopped="budget"))
    assert sync.supabase == "up"
    clock.advance(61)
    assert sync.supabase == "unknown"
    sync.heard(False)
    assert sync.supabase == "down"


def test_switched_off_supabase_is_off_and_never_asked(tmp_path: Path) -> None:
    made = Api(tmp_path, use_supabase=False)
    session = made.new()
    assert made.client.get(f"/api/sessions/{session['session_id']}").status_code == 200
    error_of(made.client.get(f"/api/sessions/{new_id()}"), 503, "unavailable")
    assert made.client.get("/health").json()["supabase"] == "off"
    assert made.server.calls == 0
    made.local.close()


def test_the_documentation_of_the_api_is_served(api: Api) -> None:
    paths = api.client.get("/openapi.json").json()["paths"]
    assert "/api/sessions/{session_id}/holes/{hole_id}/resolve" in paths
