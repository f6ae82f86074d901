"""What the tests of the HTTP API share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
from fastapi.testclient import TestClient

from local_store import LocalStore
from syncer.service.app import create_app
from syncer.service.health import SyncState
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

    def __init__(self, folder: Path, *, remote: Any = None, **settings: Any) -> None:
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
            self.settings, self.local, remote=remote or self.server, flusher_state=self.sync
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
