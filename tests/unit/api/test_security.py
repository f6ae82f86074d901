"""Every route tried with forged tokens and with another user's ids: nothing is seen or changed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from syncer.service.auth import Authenticator
from syncer.service.jwks import PublicKeys
from tests.unit.api.support import SECRET, Api, auth, error_of
from tests.unit.key_server import KeyServer, key_server, payload

WORDS = "canary of alice"
BODIES: dict[str, Any] = {
    "/api/sessions": {"prompt": "x"},
    "/rollback": {"version": 1},
    "/resolve": {"resolution_text": "x"},
    "/edit": {"changes": {"status": "active"}},
}
OPEN = {"/health", "/health/live", "/health/ready", "/metrics"}
ISSUER = "https://abcdefgh.supabase.co/auth/v1"


def _part(document: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(document, default=str).encode()).decode().rstrip("=")


def _claims(**claims: Any) -> dict[str, Any]:
    whole = payload(**claims)
    whole["exp"] = int(whole["exp"].timestamp())
    return whole


def _unsigned(algorithm: str) -> str:
    return f"{_part({'alg': algorithm, 'typ': 'JWT'})}.{_part(_claims())}."


def _hmac_with(key: bytes, key_id: str) -> str:
    signed = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': key_id})}.{_part(_claims())}"
    mac = hmac.new(key, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def _with_other_claims(token: str) -> str:
    head, _, signature = token.split(".")
    return (
        f"{head}.{_part(_claims(sub='mallory', app_metadata={'role': 'syncer_admin'}))}.{signature}"
    )


def forged(keys: KeyServer) -> dict[str, str]:
    """Return tokens for alice that nobody issued, or that aren't for here or for now."""
    past = datetime.now(UTC) - timedelta(hours=1)  # noqa: TID251  tokens know only real time
    good = jwt.encode(payload(), SECRET)
    return {
        "alg none": _unsigned("none"),
        "alg None": _unsigned("None"),
        "alg HS256 without a signature": _unsigned("HS256"),
        "wrong audience": jwt.encode(payload(aud="anon"), SECRET),
        "no audience": jwt.encode(payload(aud=None), SECRET),
        "expired": jwt.encode(payload(exp=past), SECRET),
        "without an end": jwt.encode(payload(exp=None), SECRET),
        "wrong secret": jwt.encode(payload(), SECRET[::-1]),
        "empty secret": _hmac_with(b"", "rsa"),
        "RS256's public key as HMAC's": _hmac_with(keys.public_pem("rsa"), "rsa"),
        "a wrong private key": jwt.encode(
            payload(), keys.private["other"][0], algorithm="ES256", headers={"kid": "ec"}
        ),
        "an unknown key": jwt.encode(
            payload(), keys.private["other"][0], algorithm="ES256", headers={"kid": "nobody"}
        ),
        "other claims under a good signature": _with_other_claims(good),
        "anon": jwt.encode(payload(role="anon"), SECRET),
        "another project": jwt.encode(payload(iss="https://evil.supabase.co/auth/v1"), SECRET),
        "no issuer, by a private key": keys.token("ec"),
        "expired, by a private key": keys.token("ec", iss=ISSUER, exp=past),
        "wrong audience, by a private key": keys.token("ec", iss=ISSUER, aud="anon"),
        "a huge one": jwt.encode(payload(extra="x" * 20_000), SECRET),
        "nonsense": "a.b.c",
    }


@pytest.fixture
def keys() -> Iterator[KeyServer]:
    with key_server() as server:
        server.add("rsa", "RSA")
        server.add("ec")
        server.add("other")
        published = server.key_set()
        known = json.loads(published)["keys"]
        server.body = json.dumps({"keys": [k for k in known if k["kid"] != "other"]}).encode()
        yield server


@pytest.fixture
def guarded(api: Api, keys: KeyServer, tmp_path: Path) -> Api:
    """An API whose users come by the secret or by public keys, as while a project changes over."""
    known = PublicKeys(keys.url, tmp_path)
    api.app.state.authenticator = Authenticator(SECRET, ISSUER, known)
    for name in ("rsa", "ec"):
        signed = {"Authorization": f"Bearer {keys.token(name, iss=ISSUER)}"}
        assert api.client.get("/api/sessions", headers=signed).status_code == 200
    return api


def routes(api: Api, session_id: str) -> list[tuple[str, str, Any]]:
    """Return every call that needs a token, as (method, path, body)."""
    document = api.client.get("/openapi.json").json()
    found = []
    for path, methods in document["paths"].items():
        if path in OPEN:
            continue
        for method in methods:
            real = path.replace("{session_id}", session_id).replace("{hole_id}", "h")
            real = real.replace("{txn_id}", session_id).replace("{conflict_id}", session_id)
            ending = next((tail for tail in BODIES if path.endswith(tail)), "")
            found.append((method.upper(), real, BODIES.get(ending) if method == "post" else None))
    return found


def send(api: Api, call: tuple[str, str, Any], headers: dict[str, str]) -> httpx.Response:
    method, path, body = call
    reply: httpx.Response = api.client.request(method, path, json=body, headers=headers)
    return reply


class Unchanged:
    """What alice has, to be the same after the block."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.session = api.new(WORDS, metadata={"said": WORDS})
        self.path = f"/api/sessions/{self.session['session_id']}"

    def __enter__(self) -> Unchanged:
        self._before = self._seen()
        return self

    def _seen(self) -> Any:
        shown = self._api.client.get(self.path, headers=auth("alice")).json()
        return self._api.local.stats()["last_seq"], shown

    def __exit__(self, *_: object) -> None:
        assert self._seen() == self._before


def test_no_forged_token_sees_or_changes_anything(guarded: Api, keys: KeyServer) -> None:
    with Unchanged(guarded) as alice:
        calls = routes(guarded, alice.session["session_id"])
        assert len(calls) >= 19
        for name, token in forged(keys).items():
            for call in calls:
                reply = send(guarded, call, {"Authorization": f"Bearer {token}"})
                error = error_of(reply, 401, "unauthorized")
                assert WORDS not in reply.text, (name, call)
                assert token not in str(error), (name, call)
    assert keys.asked == 1, "one question, whatever was sent"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic YWxpY2U6YWxpY2U=",
        "Token {}",
        "{}",
        "Bearer {} {}",
        "Bearer\t{}",
    ],
)
def test_no_other_header_lets_anybody_in(api: Api, header: str) -> None:
    good = jwt.encode(payload(), SECRET)
    with Unchanged(api) as alice:
        for call in routes(api, alice.session["session_id"]):
            reply = send(api, call, {"Authorization": header.format(good, good)})
            error_of(reply, 401, "unauthorized")


def test_another_user_sees_and_changes_nothing(api: Api) -> None:
    bob = auth("bob")
    with Unchanged(api) as alice:
        session_id = alice.session["session_id"]
        for call in routes(api, session_id):
            method, path, _ = call
            if path == "/api/sessions":
                continue  # bob's own
            reply = send(api, call, bob)
            wanted = (403, "forbidden") if path.startswith("/api/sync") else (404, "not_found")
            error_of(reply, *wanted)
            assert WORDS not in reply.text, (method, path)
        for spelling in (session_id.upper(), session_id.replace("-", ""), f"{{{session_id}}}"):
            reply = api.client.get(f"/api/sessions/{spelling}", headers=bob)
            error_of(reply, 404, "not_found")
        assert api.client.get("/api/sessions", headers=bob).json()["sessions"] == []


def test_another_users_keys_and_cursors_open_nothing(api: Api) -> None:
    bob, key = auth("bob"), {"Idempotency-Key": "shared"}
    body = {"prompt": WORDS}
    mine = api.client.post("/api/sessions", json=body, headers=key).json()
    api.new()
    page = api.client.get("/api/sessions?limit=1").json()
    theirs = api.client.post("/api/sessions", json=body, headers={**bob, **key}).json()
    assert theirs["session_id"] != mine["session_id"]
    found = api.client.get(f"/api/sessions?cursor={page['next']}", headers=bob)
    assert mine["session_id"] not in found.text
    resolved = f"/api/sessions/{mine['session_id']}/finalize"
    error_of(api.client.post(resolved, headers={**bob, **key}), 404, "not_found")


@pytest.mark.parametrize(
    "more",
    [{"user_id": "alice"}, {"session_id": "x"}, {"created_at": "x"}, {"updated_at": "x"}],
)
def test_nobody_writes_as_somebody_else_or_sets_what_the_server_owns(api: Api, more: Any) -> None:
    reply = api.client.post("/api/sessions", json={"prompt": "x", **more}, headers=auth("bob"))
    error_of(reply, 422, "invalid")
    assert api.local.stats()["last_seq"] == 0


def test_what_is_open_tells_nothing_of_anybody(api: Api) -> None:
    api.new(WORDS)
    for path in OPEN:
        reply = api.client.get(path, headers={"Authorization": ""})
        assert reply.status_code == 200
        assert WORDS not in reply.text
        assert "alice" not in reply.text


def test_every_open_route_is_meant_to_be(api: Api) -> None:
    for path in api.client.get("/openapi.json").json()["paths"]:
        reply = api.client.get(path, headers={"Authorization": ""})
        assert (reply.status_code == 200) == (path in OPEN), path


def test_nothing_that_holds_a_secret_tells_it(api: Api, tmp_path: Path) -> None:
    state = api.app.state
    held = [api.settings, state.authenticator, state.metrics, state.desk, state.health, api.local]
    told = " ".join(repr(item) + str(item) + repr(vars(state)) for item in held)
    assert SECRET not in told
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
