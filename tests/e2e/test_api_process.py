"""The API in its own process: outages, kills, signals, errors, as a client sees them."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest

from local_store.clock import SystemClock
from syncer.testkit.api_process import ApiProcess, free_port

PATIENCE_S = 30.0
STILL_S = 1.5  # several intervals of the flusher, and of the breaker


def create(client: httpx.Client, **headers: str) -> dict:
    body = {"prompt": "Merge two sorted ledgers"}
    reply = client.post("/api/sessions", json=body, headers=headers)
    assert reply.status_code == 201, reply.text
    return reply.json()


def until(condition) -> None:
    clock = SystemClock()
    end = clock.monotonic() + PATIENCE_S
    while not condition():
        assert clock.monotonic() < end, "did not happen in time"
        clock.sleep(0.02)


def drained(client: httpx.Client) -> bool:
    return client.get("/health").json()["pending"] == 0


def test_a_write_over_http_reaches_postgres_and_reads_as_synced(client, fresh_supabase):
    made = create(client)
    until(lambda: drained(client))
    with psycopg.connect(fresh_supabase.database_url) as sql:
        [found] = sql.execute("select id::text, revision_count from sessions").fetchall()
    assert found == (made["session_id"], 1)
    shown = client.get(f"/api/sessions/{made['session_id']}").json()
    assert shown["sync"]["state"] == "synced"


def test_an_outage_refuses_no_write_and_a_killed_api_comes_back_with_them(
    api, client, fresh_supabase
):
    before = create(client)
    until(lambda: drained(client))
    with fresh_supabase.outage():
        path = f"/api/sessions/{before['session_id']}"
        hole = before["current_draft"]["ambiguities"][0]
        body = {"resolution_text": "int"}
        assert client.post(f"{path}/holes/{hole}/resolve", json=body).status_code == 200
        during = create(client)
        api.kill()
        api.start()
        assert len(client.get(path).json()["revisions"]) == 2
        assert client.post(f"{path}/finalize").status_code == 200
        listed = client.get("/api/sessions").json()
        assert {s["session_id"] for s in listed["sessions"]} == {
            before["session_id"],
            during["session_id"],
        }
        assert listed["complete"] is False
        health = client.get("/health").json()
        assert health["pending"] == 3
        assert client.get("/health/ready").status_code == 200
    until(lambda: drained(client))
    with psycopg.connect(fresh_supabase.database_url) as sql:
        rows = sql.execute("select status, revision_count from sessions order by 1").fetchall()
    assert rows == [("active", 1), ("finalized", 2)]
    assert client.get("/health").json()["parked"] == 0


def test_a_session_that_is_not_here_is_unknown_in_an_outage_and_absent_otherwise(
    client, fresh_supabase
):
    path = "/api/sessions/00000000-0000-7000-8000-000000000000"
    assert client.get(path).status_code == 404
    with fresh_supabase.outage():
        reply = client.get(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")


def test_somebody_elses_session_is_not_found(client, api, fresh_supabase):
    made = create(client)
    until(lambda: drained(client))
    token = fresh_supabase.user_token("github:43")
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=api.url, headers=headers) as stranger:
        path = f"/api/sessions/{made['session_id']}"
        assert stranger.get(path).status_code == 404
        assert stranger.delete(path).status_code == 404
        assert stranger.post(f"{path}/finalize").status_code == 404
        assert stranger.get("/api/sessions").json()["sessions"] == []


@pytest.mark.parametrize(
    ("make", "status", "code"),
    [
        (lambda c: c.post("/api/sessions", json={}), 422, "invalid"),
        (lambda c: c.post("/api/sessions", json={"prompt": "x", "pin": 1}), 422, "invalid"),
        (lambda c: c.post("/api/sessions", content=b"{"), 422, "invalid"),
        (lambda c: c.post("/api/sessions", json={"prompt": "x" * 5_000_000}), 413, "too_large"),
        (lambda c: c.get("/api/sessions/nonsense"), 404, "not_found"),
        (lambda c: c.get("/api/nothing"), 404, "not_found"),
        (
            lambda c: c.get("/api/sessions", headers={"Authorization": "Bearer nonsense"}),
            401,
            "unauthorized",
        ),
        (lambda c: c.get("/api/sessions", headers={"Authorization": ""}), 401, "unauthorized"),
    ],
)
def test_each_error_has_the_one_shape(client, make, status, code):
    reply = make(client)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert set(error) >= {"code", "message", "fields", "request_id"}
    assert reply.headers["x-request-id"] == error["request_id"]


def test_an_unknown_field_is_named(client):
    reply = client.post("/api/sessions", json={"prompt": "x", "pin": 1})
    assert "pin" in str(reply.json()["error"]["fields"])


def test_the_same_idempotency_key_makes_one_session(client, fresh_supabase):
    first = create(client, **{"Idempotency-Key": "k1"})
    again = create(client, **{"Idempotency-Key": "k1"})
    assert first["session_id"] == again["session_id"]
    other = client.post(
        "/api/sessions", json={"prompt": "other"}, headers={"Idempotency-Key": "k1"}
    )
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")


@pytest.mark.parametrize("supabase_is", ["up", "down"])
def test_sigterm_under_load_loses_nothing_acknowledged(api, client, fresh_supabase, supabase_is):
    if supabase_is == "down":
        fresh_supabase.stop_data_plane()
    acknowledged: list[str] = []
    stopping = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=api.url, headers=client.headers, timeout=30.0) as own:
            while not stopping.is_set():
                try:
                    reply = own.post("/api/sessions", json={"prompt": "p"})
                except httpx.TransportError:
                    return
                if reply.status_code == 201:
                    acknowledged.append(reply.json()["session_id"])
                else:
                    assert reply.json()["error"]["code"] == "shutting_down"

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(acknowledged) > 20)
    code = api.stop()
    stopping.set()
    for thread in threads:
        thread.join()
    assert code == 0
    if supabase_is == "down":
        fresh_supabase.start_data_plane()
    api.start()
    until(lambda: drained(client))
    with psycopg.connect(fresh_supabase.database_url) as sql:
        stored = {row[0] for row in sql.execute("select id::text from sessions").fetchall()}
    assert set(acknowledged) <= stored


def test_a_process_that_stood_still_goes_on_with_its_requests_and_its_deliveries(
    api, client, fresh_supabase
):
    with fresh_supabase.outage():
        create(client)
        os.kill(api.pid, signal.SIGSTOP)
    asked = ThreadPoolExecutor(1)
    try:
        late = asked.submit(create, client)  # the connection is taken, nobody answers
        SystemClock().sleep(STILL_S)
    finally:
        os.kill(api.pid, signal.SIGCONT)
    assert late.result(PATIENCE_S)["session_id"]
    until(lambda: drained(client))
    with psycopg.connect(fresh_supabase.database_url) as sql:
        assert sql.execute("select count(*) from sessions").fetchone() == (2,)
    asked.shutdown()


def test_use_supabase_false_keeps_buffering_and_sends_nothing(fresh_supabase, tmp_path):
    env = {"SUPABASE_JWT_SECRET": fresh_supabase.jwt_secret, "USE_SUPABASE": "false"}
    api = ApiProcess(env, tmp_path / "off", tmp_path / "off.log")
    api.start()
    try:
        headers = {"Authorization": f"Bearer {fresh_supabase.user_token('u')}"}
        with httpx.Client(base_url=api.url, headers=headers) as client:
            made = create(client)
            assert client.get(f"/api/sessions/{made['session_id']}").status_code == 200
            health = client.get("/health").json()
            assert (health["supabase"], health["pending"]) == ("off", 1)
    finally:
        api.stop()


def test_a_missing_jwt_secret_is_named_before_anything_opens(fresh_supabase, tmp_path):
    env = {k: v for k, v in fresh_supabase.env().items() if k != "SUPABASE_JWT_SECRET"}
    api = ApiProcess(env, tmp_path / "never", tmp_path / "never.log")
    with pytest.raises(RuntimeError, match="SUPABASE_JWT_SECRET"):
        api.start()


def test_a_taken_port_is_a_clear_error(api, fresh_supabase, tmp_path):
    second = ApiProcess(fresh_supabase.env(), tmp_path / "second", tmp_path / "second.log")
    second._env["SYNCER_PORT"] = str(api.port)
    second.url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match="address already in use"):
        second.start()
