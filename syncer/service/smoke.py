"""A deployed app tried from outside: what a first look after a deploy would check by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import jwt

from local_store.clock import Clock, SystemClock, new_id
from syncer.errors import SyncError
from syncer.remote import SupabaseRemote
from syncer.service.auth import AUDIENCE
from syncer.settings import Settings

SMOKE_USER = "syncer:smoke"  # its sessions are deleted again; nobody else has this id
TIMEOUT_S = 30.0
TOKEN_LIFE = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class SmokeCheck:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """All that was tried, in order."""

    checks: tuple[SmokeCheck, ...]

    @property
    def ok(self) -> bool:
        """True when everything that was tried works."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one object."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def smoke(url: str, settings: Settings, clock: Clock | None = None) -> SmokeReport:
    """Ask the app at `url` whether it takes writes, write a session, read it, delete it.

    Then ask Supabase what the doctor asks it. Nothing raises: what fails is a check that isn't ok.
    Without SUPABASE_JWT_SECRET no token can be made, and no write is tried.
    """
    return SmokeReport(tuple(_checks(url.rstrip("/"), settings, clock or SystemClock())))


def _checks(url: str, settings: Settings, clock: Clock) -> Iterator[SmokeCheck]:
    yield _tried("ready", lambda: str(_asked(f"{url}/health/ready")["status"]))
    yield _tried("health", lambda: _health(url))
    if settings.supabase_jwt_secret is None:
        yield SmokeCheck("write", True, "not tried: SUPABASE_JWT_SECRET isn't set")
    else:
        secret = settings.supabase_jwt_secret.get_secret_value()
        yield _tried("write", lambda: _written(url, _token(secret, settings, clock)))
    yield _tried("supabase", lambda: _server(settings))


def _tried(name: str, attempt: Callable[[], str]) -> SmokeCheck:
    try:
        return SmokeCheck(name, True, attempt())
    except HTTPError as error:
        return SmokeCheck(name, False, f"HTTP {error.code}: {_code_of(error)}")
    except (URLError, OSError) as error:
        return SmokeCheck(name, False, f"not reached ({type(error).__name__})")
    except SyncError as error:
        return SmokeCheck(name, False, str(error))
    except (KeyError, ValueError) as error:
        return SmokeCheck(name, False, f"not the expected reply ({type(error).__name__})")


def _health(url: str) -> str:
    found = _asked(f"{url}/health")
    told = f"{found['status']}, supabase {found['supabase']}, acknowledge {found['acknowledge']}"
    if found["status"] == "failing":
        raise ValueError(told)
    return told


def _written(url: str, token: str) -> str:
    """Write, read and delete one session; returns what its receipt says."""
    content = {"prompt": "a smoke test", "metadata": {"smoke": True}}
    key = f"smoke-{new_id()}"  # a repeat by a proxy on the way is the same write
    made = _asked(f"{url}/api/sessions", token, "POST", content, {"Idempotency-Key": key})
    address = f"{url}/api/sessions/{made['session_id']}"
    if _asked(address, token)["metadata"] != content["metadata"]:
        raise ValueError("another session")
    _asked(address, token, "DELETE")
    return str(made["sync"]["durability"])


def _server(settings: Settings) -> str:
    if not settings.use_supabase:
        return "not tried: USE_SUPABASE is false"
    found = SupabaseRemote.from_settings(settings).doctor()
    return f"Postgres {found['server_version']}, protocol {found['protocol']}"


def _token(secret: str, settings: Settings, clock: Clock) -> str:
    claims: dict[str, Any] = {
        "sub": SMOKE_USER,
        "aud": AUDIENCE,
        "role": "authenticated",
        "exp": clock.now() + TOKEN_LIFE,
    }
    if settings.supabase_url is not None:
        claims["iss"] = f"{settings.supabase_url}/auth/v1"
    return jwt.encode(claims, secret, algorithm="HS256")


def _asked(
    url: str,
    token: str | None = None,
    method: str = "GET",
    content: Any = None,
    headers: dict[str, str] | None = None,
) -> Any:
    request = Request(url, method=method, headers=headers or {})
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    if content is not None:
        request.data = json.dumps(content).encode()
        request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=TIMEOUT_S) as reply:
        body = reply.read()
    return json.loads(body) if body else None


def _code_of(error: HTTPError) -> str:
    """Return the error's code in our own shape; anything else isn't quoted."""
    try:
        return str(json.loads(error.read())["error"]["code"])
    except (KeyError, TypeError, ValueError, OSError):
        return "no reply of this API"
