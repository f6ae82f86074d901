"""Tokens signed by a project's private keys; its public ones, in good times and in outages."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from local_store import LocalStore
from local_store.clock import ManualClock, SystemClock
from syncer.service.app import create_app
from syncer.service.auth import Authenticator
from syncer.service.http_errors import ApiError
from syncer.service.jwks import ASK_INTERVAL_S, FRESH_S, PublicKeys
from syncer.sessions import SESSION_TABLES
from syncer.settings import Settings
from tests.unit.key_server import KeyServer, key_server, payload

SECRET = "a secret of the project that is long enough"
ISSUER = "https://abcdefgh.supabase.co/auth/v1"


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with key_server() as made:
        yield made


class Door:
    """An authenticator on a key server, asking for keys as the routes do."""

    def __init__(self, url: str, folder: Path, issuer: str | None = None) -> None:
        self.clock = ManualClock()
        self.keys = PublicKeys(url, folder, self.clock)
        self.made = Authenticator(SECRET, issuer, self.keys)

    def __call__(self, token: str) -> str:
        header = f"Bearer {token}"
        if self.made.needs_keys(header):
            self.made.ask_for_keys()
        return self.made.user_of(header)

    def status(self, token: str) -> int:
        with pytest.raises(ApiError) as raised:
            self(token)
        return raised.value.reply.status


@pytest.fixture
def door(server: KeyServer, tmp_path: Path) -> Door:
    return Door(server.url, tmp_path)


def until(condition: Callable[[], bool]) -> None:
    clock = SystemClock()
    end = clock.monotonic() + 10
    while not condition():
        assert clock.monotonic() < end, "did not happen in time"
        clock.sleep(0.005)


@pytest.mark.parametrize("kind", ["EC", "RSA"])
def test_a_token_signed_by_a_key_of_the_project_proves_its_user(
    server: KeyServer, door: Door, kind: str
) -> None:
    server.add("k1", kind)
    assert door(server.token("k1")) == "alice"
    assert door(server.token("k1", "bob")) == "bob"
    assert server.asked == 1, "known keys are not asked for again"


def test_the_claims_count_as_much_as_the_signature(server: KeyServer, tmp_path: Path) -> None:
    door = Door(server.url, tmp_path, ISSUER)
    server.add("k1")
    assert door(server.token("k1", iss=ISSUER)) == "alice"
    for claims in (
        {},
        {"iss": "https://other.supabase.co/auth/v1"},
        {"iss": ISSUER, "aud": "anon"},
        {"iss": ISSUER, "aud": None},
        {"iss": ISSUER, "exp": 1},
        {"iss": ISSUER, "exp": None},
        {"iss": ISSUER, "role": "anon"},
        {"iss": ISSUER, "role": "service_role"},
        {"iss": ISSUER, "sub": None},
    ):
        assert door.status(server.token("k1", **claims)) == 401, claims


def test_a_public_key_makes_nobody_the_service(server: KeyServer, door: Door) -> None:
    server.add("k1")
    assert door(server.token("k1")) == "alice"
    with pytest.raises(ApiError):
        door.made.identify(f"Bearer {server.token('k1', role='service_role')}")
    operator = server.token("k1", app_metadata={"role": "syncer_admin"})
    assert door.made.identify(f"Bearer {operator}").is_operator


# -- confusion -------------------------------------------------------------------------------------


def test_no_token_chooses_how_it_is_checked(server: KeyServer, door: Door) -> None:
    rsa_key, ec_key = server.add("rsa", "RSA"), server.add("ec")
    assert door(server.token("rsa")) == "alice"
    as_hmac = [_hmac(server.public_pem(name), name) for name in ("rsa", "ec")]
    forged = [
        *as_hmac,
        jwt.encode(payload(), SECRET * 2, algorithm="HS384", headers={"kid": "rsa"}),
        jwt.encode(payload(), rsa_key, algorithm="RS256", headers={"kid": "ec"}),
        jwt.encode(payload(), ec_key, algorithm="ES256", headers={"kid": "rsa"}),
        jwt.encode(payload(), rsa_key, algorithm="RS512", headers={"kid": "rsa"}),
        jwt.encode(payload(), rsa_key, algorithm="PS256", headers={"kid": "rsa"}),
        jwt.encode(payload(), ec_key, algorithm="ES256"),
        jwt.encode(payload(), _stranger(), algorithm="ES256", headers={"kid": "ec"}),
        jwt.encode(payload(), None, algorithm="none", headers={"kid": "ec"}),  # type: ignore[arg-type]
        _with_own_key(),
    ]
    for token in forged:
        assert door.status(token) == 401, jwt.get_unverified_header(token)


def _hmac(secret: bytes, key_id: str) -> str:
    """Sign by HMAC with what everybody knows; the library itself refuses to."""

    def part(document: Any) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(document, default=str).encode()).rstrip(b"=")

    claims = payload()
    claims["exp"] = int(claims["exp"].timestamp())
    signed = part({"alg": "HS256", "typ": "JWT", "kid": key_id}) + b"." + part(claims)
    mac = hmac.new(secret, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def _stranger() -> Any:
    return ec.generate_private_key(ec.SECP256R1())


def _with_own_key() -> str:
    private = _stranger()
    own = jwt.get_algorithm_by_name("ES256").to_jwk(private.public_key(), as_dict=True)
    headers = {"kid": "mine", "jwk": own, "jku": "http://127.0.0.1:1/keys"}
    return jwt.encode(payload(), private, algorithm="ES256", headers=headers)


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "oct", "kid": "odd", "k": "YSBzZWNyZXQ", "alg": "HS256"},
        {"kty": "EC", "kid": "odd", "crv": "P-384", "x": "AA", "y": "AA"},
        {"kty": "EC", "kid": "odd", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "kid": "odd", "crv": 7, "x": [], "y": {}},
        {"kty": "RSA", "kid": "odd", "n": "AQAB", "e": "AQAB"},
        {"kty": "RSA", "kid": ["odd"], "n": "AQAB", "e": "AQAB"},
        {"kid": "odd"},
        "odd",
        None,
    ],
)
def test_a_key_that_is_no_use_spoils_none_beside_it(
    server: KeyServer, door: Door, key: Any
) -> None:
    server.add("good")
    document = json.loads(server.key_set())
    server.body = json.dumps({"keys": [key, *document["keys"]]}).encode()
    assert door(server.token("good")) == "alice"
    assert door.keys.find("odd") is None


def test_a_key_for_another_use_or_too_weak_is_not_used(server: KeyServer, door: Door) -> None:
    server.add("enc", use="enc")
    server.add("other", alg="RS256")
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    server.private["weak"] = (weak, {})
    door.keys.refresh()
    assert [name for name in server.private if door.keys.find(name)] == []


# -- outages ---------------------------------------------------------------------------------------


def test_known_keys_serve_through_an_outage_and_a_restart_in_it(
    server: KeyServer, door: Door, tmp_path: Path
) -> None:
    server.add("k1")
    assert door(server.token("k1")) == "alice"
    server.status = 503
    door.clock.advance(30 * 86_400)
    assert door(server.token("k1")) == "alice"
    after = Door(server.url, tmp_path)
    assert after(server.token("k1")) == "alice"


def test_the_file_is_private_whole_and_holds_nothing_secret(
    server: KeyServer, door: Door, tmp_path: Path
) -> None:
    private = server.add("k1")
    d = jwt.get_algorithm_by_name("ES256").to_jwk(private, as_dict=True)["d"]
    server.private["k1"] = (private, {"d": d})
    assert door(server.token("k1")) == "alice"
    [file] = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert d not in file.read_text()
    assert json.loads(file.read_text())["url"].startswith(server.url)


def test_a_link_laid_in_the_way_is_not_written_through(
    server: KeyServer, door: Door, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / f"jwks.{os.getpid()}.tmp").symlink_to(victim)
    server.add("k1")
    assert door(server.token("k1")) == "alice"
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": 1}', '{"url": "x", "keys": []}'])
def test_a_damaged_or_foreign_file_is_as_good_as_none(
    server: KeyServer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "jwks.json").write_text(content)
    server.add("k1")
    assert Door(server.url, tmp_path)(server.token("k1")) == "alice"


def test_another_projects_kept_keys_are_not_used(
    server: KeyServer, door: Door, tmp_path: Path
) -> None:
    server.add("k1")
    token = server.token("k1")
    assert door(token) == "alice"
    with key_server() as other:
        assert Door(other.url, tmp_path).status(token) == 401


def test_a_folder_that_takes_no_file_keeps_nobody_out(server: KeyServer, tmp_path: Path) -> None:
    server.add("k1")
    assert Door(server.url, tmp_path / "absent")(server.token("k1")) == "alice"


def test_a_key_that_can_not_be_asked_for_is_unknown_and_not_wrong(
    server: KeyServer, door: Door
) -> None:
    server.add("k1")
    token = server.token("k1")
    server.status = 503
    assert door.status(token) == 503
    server.status = 200
    assert door.status(token) == 503, "not asked again so soon"
    door.clock.advance(ASK_INTERVAL_S)
    assert door(token) == "alice"


def test_a_project_without_a_key_set_knows_no_such_key(server: KeyServer, door: Door) -> None:
    server.add("k1")
    server.status = 404
    assert door.status(server.token("k1")) == 401


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, b"<html>", {"Content-Type": "text/html"}),
        (200, b"", {}),
        (200, b"{}", {}),
        (200, b'{"keys": {}}', {}),
        (200, json.dumps({"keys": [{}] * 33}).encode(), {}),
        (200, b'{"keys": [], "x": "' + b"x" * 70_000 + b'"}', {}),
        (200, gzip.compress(b'{"keys": []}'), {"Content-Encoding": "gzip"}),
        (301, b"", {"Location": "http://127.0.0.1:1/"}),
        (500, b"{}", {}),
        (429, b"{}", {"Retry-After": "1"}),
    ],
)
def test_an_answer_that_is_no_key_set_drops_no_key(
    server: KeyServer, door: Door, status: int, body: bytes, headers: dict[str, str]
) -> None:
    server.add("k1")
    assert door(server.token("k1")) == "alice"
    server.status, server.body, server.headers = status, body, headers
    door.clock.advance(FRESH_S)
    door.keys.refresh()
    assert server.asked == 2
    assert door.keys.find("k1") is not None
    assert not door.keys.answered


# -- how often it asks -----------------------------------------------------------------------------


def test_made_up_key_ids_cause_one_question_per_interval(server: KeyServer, door: Door) -> None:
    server.add("k1")
    made_up = [
        jwt.encode(payload(), _stranger(), algorithm="ES256", headers={"kid": f"x{n}"})
        for n in range(10)
    ]
    assert {door.status(token) for token in made_up} == {401}
    assert server.asked == 1
    door.clock.advance(ASK_INTERVAL_S)
    assert {door.status(token) for token in made_up} == {401}
    assert server.asked == 2


def test_who_comes_while_somebody_asks_waits_for_that_answer(server: KeyServer, door: Door) -> None:
    server.add("k1")
    token, users = server.token("k1"), []
    server.go_on.clear()
    threads = [threading.Thread(target=lambda: users.append(door(token))) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: server.asked == 1)
    assert door.made.needs_keys(f"Bearer {token}")
    server.go_on.set()
    for thread in threads:
        thread.join(10)
    assert users == ["alice"] * 8
    assert server.asked == 1


def test_a_new_key_is_found_and_a_withdrawn_one_is_refused_behind_a_request(
    server: KeyServer, door: Door
) -> None:
    server.add("old")
    old = server.token("old")
    assert door(old) == "alice"
    del server.private["old"]
    server.add("new")
    door.clock.advance(FRESH_S)
    assert door(old) == "alice", "the request itself doesn't wait"
    until(lambda: door.keys.find("old") is None)
    assert door.status(old) == 401
    assert door(server.token("new")) == "alice"
    assert server.asked == 2


async def test_while_keys_are_asked_for_everybody_else_is_served(
    server: KeyServer, tmp_path: Path
) -> None:
    server.add("k1")
    server.go_on.clear()
    settings = Settings.load(
        data_dir=tmp_path, supabase_url=server.url, supabase_jwt_secret=SECRET, use_supabase=False
    )
    known = {"Authorization": f"Bearer {jwt.encode(payload(), SECRET)}"}
    unknown = {"Authorization": f"Bearer {server.token('k1')}"}
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        transport = httpx.ASGITransport(create_app(settings, store))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            waiting = [
                asyncio.create_task(client.get("/api/sessions", headers=unknown)) for _ in range(20)
            ]
            async with asyncio.timeout(5):
                while not server.asked:
                    await asyncio.sleep(0.005)
                assert (await client.get("/health/live")).status_code == 200
                body = {"prompt": "x"}
                made = await client.post("/api/sessions", json=body, headers=known)
                assert made.status_code == 201
            assert not any(task.done() for task in waiting)
            server.go_on.set()
            replies = await asyncio.gather(*waiting)
    assert {reply.status_code for reply in replies} == {200}
    assert server.asked == 1
