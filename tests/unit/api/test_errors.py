"""Every error in one shape; idempotency keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from fastapi.testclient import TestClient

from syncer.service.app import create_app
from tests.unit.api.support import BODY_BYTES_MAX, Api, auth, error_of, named

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
    [event] = [event for event in logged if event["log_level"] == "error"]
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
