"""The HTTP API on the real buffer: answers, errors in one shape, limits, health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import structlog.testing
from fastapi.testclient import TestClient

from local_store import LocalStore, StoreClosed
from local_store.clock import ManualClock, new_id
from local_store.ops import Outcome
from syncer.flusher import FlushReport
from syncer.service.app import create_app
from syncer.service.health import SyncState, WriteGate
from syncer.sessions import SESSION_TABLES
from syncer.settings import Settings
from tests.unit.session_server import ReadServer

SECRET = "a secret of the project that is long enough"
CODES = {
    "unauthorized",
    "forbidden",
    "not_found",
    "invalid",
    "conflict",
    "idempotency_mismatch",
    "too_large",
    "buffer_full",
    "shutting_down",
    "unavailable",
}
BODY_BYTES_MAX = 64 * 1024


def auth(user: str = "alice") -> dict[str, str]:
    claims = {"sub": user, "aud": "authenticated", "role": "authenticated"}
    exp = datetime.now(UTC) + timedelta(hours=1)  # noqa: TID251  tokens know only real time
    return {"Authorization": f"Bearer {jwt.encode({**claims, 'exp': exp}, SECRET)}"}


class Api:
    """One API with what stands behind it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings.load(
            data_dir=folder,
            supabase_url="http://127.0.0.1:1",
            supabase_jwt_secret=SECRET,
            op_bytes_max=BODY_BYTES_MAX,
            **settings,
        )
        self.local = LocalStore.open(
            folder,
            tables=SESSION_TABLES,
            buffer_transactions_max=self.settings.buffer_transactions_max,
            op_bytes_max=self.settings.op_bytes_max,
        )
        self.server = ReadServer()
        self.sync = SyncState(enabled=self.settings.use_supabase)
        self.app = create_app(
            self.settings, self.local, remote=self.server, flusher_state=self.sync
        )
        self.client = TestClient(self.app, raise_server_exceptions=False, headers=auth())

    def new(self, prompt: str = "Sort a list", **more: Any) -> dict[str, Any]:
        reply = self.client.post("/api/sessions", json={"prompt": prompt, **more})
        assert reply.status_code == 201, reply.text
        created: dict[str, Any] = reply.json()
        return created

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(f"/api/sessions{path}", json=body, headers=named)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path)
    with made.client:
        yield made
    made.local.close()


def error_of(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    document = reply.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"code", "message", "fields", "retry_after_s", "request_id"}
    assert error["code"] == code
    assert error["code"] in CODES
    assert error["request_id"] == reply.headers["X-Request-Id"]
    if error["retry_after_s"] is not None:
        assert int(reply.headers["Retry-After"]) >= 1
    return error


def named(error: dict[str, Any]) -> list[str]:
    return [item["field"] for item in error["fields"]]


# -- the life of a session -------------------------------------------------------------------------


def test_a_session_lives_from_creation_to_deletion(api: Api) -> None:
    reply = api.client.post("/api/sessions", json={"prompt": "Sort a list", "metadata": {"a": 1}})
    assert reply.status_code == 201
    assert reply.headers["X-Durability"] == "host"
    session = reply.json()
    assert reply.headers["Location"] == f"/api/sessions/{session['session_id']}"
    assert session["sync"] == {
        "state": "pending",
        "pending_transactions": 1,
        "durability": "host",
        "stale": False,
    }
    assert (session["user_id"], session["metadata"]) == ("alice", {"a": 1})
    path = f"/{session['session_id']}"
    hole = session["current_draft"]["ambiguities"][0]
    resolved = api.post(f"{path}/holes/{hole}/resolve", {"resolution_text": "int"})
    assert resolved.status_code == 200
    assert hole not in resolved.json()["current_draft"]["ambiguities"]
    assert resolved.json()["sync"]["pending_transactions"] == 2
    rolled = api.post(f"{path}/rollback", {"version": 1})
    assert rolled.json()["current_draft"]["version"] == 3
    assert api.post(f"{path}/finalize").json()["status"] == "finalized"
    assert api.post(f"{path}/abandon").json()["status"] == "abandoned"
    shown = api.client.get(f"/api/sessions{path}").json()
    assert (len(shown["ir_drafts"]), len(shown["revisions"])) == (3, 2)
    history = api.client.get(f"/api/sessions{path}/history").json()
    assert [d["version"] for d in history["ir_drafts"]] == [1, 2, 3]
    gone = api.client.delete(f"/api/sessions{path}")
    assert (gone.status_code, gone.content, gone.headers["X-Durability"]) == (204, b"", "host")
    error_of(api.client.get(f"/api/sessions{path}"), 404, "not_found")
    error_of(api.client.delete(f"/api/sessions{path}"), 404, "not_found")
    error_of(api.post(f"{path}/finalize"), 404, "not_found")


def test_a_lifted_ir_makes_a_session(api: Api) -> None:
    ir = {"intent": {"summary": "x", "holes": [{"identifier": "h"}]}, "n": [1.5, None, True]}
    reply = api.post("", {"ir": ir, "source": "reverse_mode"})
    assert reply.status_code == 201
    assert reply.json()["source"] == "reverse_mode"
    assert reply.json()["current_draft"]["ir"] == ir
    assert reply.json()["current_draft"]["ambiguities"] == ["h"]


def test_a_delivered_session_is_synced(api: Api) -> None:
    session = api.new()
    api.server.deliver(api.local)
    shown = api.client.get(f"/api/sessions/{session['session_id']}").json()
    assert (shown["sync"]["state"], shown["sync"]["durability"]) == ("synced", "remote")
    assert {k: v for k, v in shown.items() if k != "sync"} == {
        k: v for k, v in session.items() if k != "sync"
    }


def test_a_conflict_on_an_acknowledged_write_is_told_with_a_2xx(api: Api) -> None:
    session = api.new()
    [transaction] = api.local.pending(transactions_max=9, bytes_max=10**6)
    api.local.record([Outcome(transaction.txn_id, "conflict")])
    reply = api.post(f"/{session['session_id']}/finalize")
    assert reply.status_code == 200
    assert reply.json()["sync"]["state"] == "conflict"


def test_lists_are_paged_filtered_and_complete(api: Api) -> None:
    ids = [api.new(f"prompt {n}")["session_id"] for n in range(5)]
    api.post(f"/{ids[0]}/finalize")
    first = api.client.get("/api/sessions?status=active&limit=3").json()
    assert [s["session_id"] for s in first["sessions"]] == ids[:1:-1]
    assert first["complete"] is True
    rest = api.client.get("/api/sessions", params={"status": "active", "cursor": first["next"]})
    assert [s["session_id"] for s in rest.json()["sessions"]] == [ids[1]]
    assert rest.json()["next"] is None
    api.server.is_down = True
    assert api.client.get("/api/sessions").json()["complete"] is False


def test_writes_go_on_and_reads_too_while_supabase_is_away(api: Api) -> None:
    session = api.new()
    api.server.deliver(api.local)
    api.server.is_down = True
    calls = api.server.calls
    path = f"/{session['session_id']}"
    assert api.post(f"{path}/holes/h/resolve", {"resolution_text": "x"}).status_code == 200
    assert api.new()["status"] == "active"
    assert api.server.calls == calls, "no write asks the server"
    other = api.new()
    api.server.deliver(api.local)
    shown = api.client.get(f"/api/sessions/{other['session_id']}").json()
    assert shown["sync"]["stale"] is True


def test_an_id_that_can_not_be_asked_for_is_503_and_not_404(api: Api) -> None:
    api.server.is_down = True
    for call in (
        api.client.get(f"/api/sessions/{new_id()}"),
        api.post(f"/{new_id()}/finalize"),
        api.client.delete(f"/api/sessions/{new_id()}"),
    ):
        assert error_of(call, 503, "unavailable")["retry_after_s"] > 0


async def test_five_concurrent_resolutions_over_http_all_succeed(api: Api) -> None:
    session = api.new()
    transport = httpx.ASGITransport(api.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://api", headers=auth()
    ) as client:
        path = f"/api/sessions/{session['session_id']}/holes"
        replies = await asyncio.gather(
            *(
                client.post(f"{path}/hole_{n}/resolve", json={"resolution_text": f"{n}"})
                for n in range(5)
            )
        )
    assert [reply.status_code for reply in replies] == [200] * 5
    shown = api.client.get(f"/api/sessions/{session['session_id']}").json()
    assert {r["hole_id"] for r in shown["pending_resolutions"]} == {f"hole_{n}" for n in range(5)}


# -- who may ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/sessions"),
        ("POST", "/api/sessions"),
        ("GET", f"/api/sessions/{new_id()}"),
        ("DELETE", f"/api/sessions/{new_id()}"),
        ("POST", f"/api/sessions/{new_id()}/holes/h/resolve"),
        ("POST", f"/api/sessions/{new_id()}/finalize"),
        ("POST", f"/api/sessions/{new_id()}/abandon"),
        ("POST", f"/api/sessions/{new_id()}/rollback"),
        ("GET", f"/api/sessions/{new_id()}/history"),
    ],
)
def test_no_route_lets_a_stranger_in_nor_reads_the_body_first(
    api: Api, method: str, path: str
) -> None:
    for header in ("", "Bearer nonsense"):
        reply = api.client.request(
            method, path, content=b"{not json", headers={"Authorization": header}
        )
        error_of(reply, 401, "unauthorized")
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_foreign_session_is_404_for_every_call(api: Api) -> None:
    path = f"/api/sessions/{api.new()['session_id']}"
    bob = auth("bob")
    for method, tail, body in (
        ("GET", "", None),
        ("GET", "/history", None),
        ("DELETE", "", None),
        ("POST", "/finalize", None),
        ("POST", "/abandon", None),
        ("POST", "/rollback", {"version": 1}),
        ("POST", "/holes/h/resolve", {"resolution_text": "x"}),
    ):
        reply = api.client.request(method, path + tail, json=body, headers=bob)
        error_of(reply, 404, "not_found")
    assert api.client.get("/api/sessions", headers=bob).json()["sessions"] == []
    assert api.client.get(path).json()["status"] == "active"


# -- every error in one shape ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("", {}, "prompt"),
        ("", {"prompt": ""}, "prompt"),
        ("", {"prompt": 7}, "prompt"),
        ("", {"prompt": "a\x00b"}, "prompt"),
        ("", {"prompt": "x", "metadata": {"a": "\x00"}}, "metadata.a"),
        ("", {"prompt": "x", "metadata": {"big": 2**64}}, "metadata.big"),
        ("", {"prompt": "x", "metadata": []}, "metadata"),
        ("", {"prompt": "x", "ir": {}}, "ir"),
        ("", {"prompt": "x", "source": "reverse_mode"}, "source"),
        ("", {"ir": {"deep": "\x00"}, "source": "reverse_mode"}, "ir.deep"),
        ("", {"prompt": "x", "promt": "typo"}, "promt"),
        ("", {"prompt": "x", "source": "telepathy"}, "source"),
        ("", [], "body"),
        ("/{id}/holes/h/resolve", {}, "resolution_text"),
        ("/{id}/holes/h/resolve", {"resolution_text": "\x00"}, "resolution_text"),
        ("/{id}/holes/a%00b/resolve", {"resolution_text": "x"}, "hole_id"),
        ("/{id}/holes/" + "h" * 513 + "/resolve", {"resolution_text": "x"}, "hole_id"),
        (
            "/{id}/holes/h/resolve",
            {"resolution_text": "x", "resolution_type": "y"},
            "resolution_type",
        ),
        ("/{id}/holes/h/resolve", {"resolution_text": "x", "extra": 1}, "extra"),
        ("/{id}/rollback", {"version": "1"}, "version"),
        ("/{id}/rollback", {"version": 99}, "version"),
    ],
)
def test_a_refused_value_is_named(api: Api, path: str, body: Any, field: str) -> None:
    session_id = api.new()["session_id"]
    error = error_of(api.post(path.replace("{id}", session_id), body), 422, "invalid")
    assert field in named(error)
    assert api.local.stats()["last_seq"] == 1, "nothing was written"


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "metadata": {"a": NaN}}',
        b'{"prompt": "x", "metadata": {"a": "\\ud800"}}',
        b'{"prompt": "x", "metadata": {"\\ud800": 1}}',
        b'{"\\ud800": 1, "prompt": "x"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "metadata": {"a": ' + b"[" * 3_000 + b"]" * 3_000 + b"}}",
        b'{"prompt": "x", "metadata": {"a": ' + b"9" * 5_000 + b"}}",
    ],
)
def test_a_spoiled_body_is_invalid_and_never_a_500(api: Api, body: bytes) -> None:
    reply = api.client.post(
        "/api/sessions", content=body, headers={"Content-Type": "application/json"}
    )
    error_of(reply, 422, "invalid")
    keyed = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    error_of(api.client.post("/api/sessions", content=body, headers=keyed), 422, "invalid")
    assert api.local.stats()["last_seq"] == 0


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "status=lost", "cursor=%00", "cursor=xyz"])
def test_a_refused_query_is_named(api: Api, query: str) -> None:
    error = error_of(api.client.get(f"/api/sessions?{query}"), 422, "invalid")
    assert named(error) == [query.split("=")[0]]


def test_the_frameworks_own_errors_have_the_shape(api: Api) -> None:
    error_of(api.client.get("/nowhere"), 404, "not_found")
    error_of(api.client.get("/api/sessions/not-a-uuid"), 404, "not_found")
    reply = api.client.put("/api/sessions", json={})
    error_of(reply, 405, "invalid")
    assert "POST" in reply.headers["Allow"] or "GET" in reply.headers["Allow"]


def test_an_error_never_repeats_what_the_client_wrote(api: Api) -> None:
    secret = "canary-of-the-user"
    for body in (
        {"prompt": {"x": secret}},
        {"prompt": "x", "source": secret},
        {"prompt": secret + "\x00"},
        {"prompt": "x", "metadata": secret},
    ):
        assert secret not in api.post("", body).text


def test_an_unexpected_error_is_answered_in_the_shape_and_without_its_text(tmp_path: Path) -> None:
    class Broken:
        def translate(self, prompt: str) -> dict[str, Any]:
            raise RuntimeError("canary " + prompt)

        def fill(self, *_: Any) -> dict[str, Any]:
            raise AssertionError

    made = Api(tmp_path)
    app = create_app(made.settings, made.local, remote=made.server, translator=Broken())
    client = TestClient(app, raise_server_exceptions=False, headers=auth())
    with structlog.testing.capture_logs() as logged:
        reply = client.post("/api/sessions", json={"prompt": "x"})
    error_of(reply, 500, "unavailable")
    assert "canary" not in reply.text
    [event] = logged
    assert (event["event"], event["error"]) == ("request_failed", "RuntimeError")
    assert "translate" in event["where"]
    assert "canary x" not in str(event)
    made.local.close()


def test_a_body_over_the_limit_is_refused_however_it_arrives(api: Api) -> None:
    big = b'{"prompt": "' + b"x" * BODY_BYTES_MAX + b'"}'
    error_of(api.client.post("/api/sessions", content=big), 413, "too_large")
    read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal read
        for _ in range(1_000):
            read += 1
            yield b"x" * 1_024

    error_of(api.client.post("/api/sessions", content=chunks()), 413, "too_large")
    assert api.local.stats()["last_seq"] == 0


async def test_an_oversized_stream_is_not_read_to_its_end(api: Api) -> None:
    asked = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b"x" * 8_192, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", auth()["Authorization"].encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/sessions",
        "raw_path": b"/api/sessions",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("api", 80),
        "client": ("127.0.0.1", 1),
    }
    await api.app(scope, receive, send)
    assert sent[0]["status"] == 413
    assert asked == BODY_BYTES_MAX // 8_192 + 1


def test_a_request_id_of_the_client_is_kept_and_a_strange_one_replaced(api: Api) -> None:
    kept = api.client.get("/health/live", headers={"X-Request-Id": "abc-123"})
    assert kept.headers["X-Request-Id"] == "abc-123"
    made = api.client.get("/health/live", headers={"X-Request-Id": "a b\tc"})
    assert made.headers["X-Request-Id"] not in ("", "a b\tc")


# -- idempotency keys ------------------------------------------------------------------------------


def test_a_repeated_call_gives_the_same_answer_once(api: Api) -> None:
    first = api.post("", {"prompt": "Sort"}, Idempotency_Key="k1")
    again = api.post("", {"prompt": "Sort"}, Idempotency_Key="k1")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    path = f"/{first.json()['session_id']}"
    one = api.post(f"{path}/holes/h/resolve", {"resolution_text": "x"}, Idempotency_Key="k2")
    two = api.post(f"{path}/holes/h/resolve", {"resolution_text": "x"}, Idempotency_Key="k2")
    assert one.json() == two.json()
    assert two.headers["X-Durability"] == "host"
    delete = {"Idempotency-Key": "k3"}
    for _ in range(2):
        assert api.client.delete(f"/api/sessions{path}", headers=delete).status_code == 204
    assert api.local.stats()["last_seq"] == 3


def test_a_key_with_other_content_is_a_mismatch(api: Api) -> None:
    session = api.post("", {"prompt": "Sort"}, Idempotency_Key="k1").json()
    path = f"/{session['session_id']}"
    for reply in (
        api.post("", {"prompt": "Sort!"}, Idempotency_Key="k1"),
        api.post("", {"prompt": "Sort", "metadata": {"a": 1}}, Idempotency_Key="k1"),
        api.post(f"{path}/finalize", Idempotency_Key="k1"),
        api.client.delete(f"/api/sessions{path}", headers={"Idempotency-Key": "k1"}),
    ):
        error_of(reply, 409, "idempotency_mismatch")
    assert api.local.stats()["last_seq"] == 1


def test_keys_of_two_users_do_not_meet(api: Api) -> None:
    mine = api.post("", {"prompt": "Sort"}, Idempotency_Key="k1")
    headers = {**auth("bob"), "Idempotency-Key": "k1"}
    theirs = api.client.post("/api/sessions", json={"prompt": "Other"}, headers=headers)
    assert theirs.status_code == 201
    assert theirs.json()["session_id"] != mine.json()["session_id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_of_no_use_is_refused(api: Api, key: str) -> None:
    error = error_of(api.post("", {"prompt": "x"}, Idempotency_Key=key), 422, "invalid")
    assert named(error) == ["Idempotency-Key"]


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
