"""Keys and users' words searched in all that the API writes at DEBUG, after good and bad calls."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from syncer.testkit.api_process import ApiProcess
from syncer.testkit.buffer import outage, wait_until
from syncer.testkit.faults import Cut, canned

WORDS = "canary-of-a-user"
USER = "github:canary-42"


@pytest.fixture
def process(fresh_supabase: Any, fault_proxy: Any, tmp_path: Path) -> Iterator[ApiProcess]:
    env = {
        **fresh_supabase.env(),
        "SUPABASE_URL": fault_proxy.url,
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
        "SYNCER_BREAKER_INTERVAL_S": "0.3",
        "SYNCER_WATCH_INTERVAL_S": "0.3",
        "SYNCER_AUDIT_INTERVAL_S": "0.3",
        "SYNCER_LOG_LEVEL": "debug",
    }
    made = ApiProcess(env, tmp_path / "buffer", tmp_path / "api.log")
    made.start()
    yield made
    made.kill()


def good_calls(client: httpx.Client) -> str:
    body = {"prompt": WORDS, "metadata": {WORDS: [WORDS]}}
    made = client.post("/api/sessions", json=body, headers={"Idempotency-Key": WORDS})
    session_id: str = made.json()["session_id"]
    path = f"/api/sessions/{session_id}"
    answer = {"resolution_text": WORDS}
    assert client.post(f"{path}/holes/{WORDS}/resolve", json=answer).status_code == 200
    assert client.get(path).status_code == 200
    assert client.get("/api/sessions").status_code == 200
    return session_id


def bad_calls(client: httpx.Client, token: str) -> list[httpx.Response]:
    """Make every kind of mistake with a user's words in it; none may come back."""
    json = {"Content-Type": "application/json"}
    return [
        client.get(f"/api/{WORDS}"),
        client.get(f"/api/sessions/{WORDS}"),
        client.get(f"/api/sessions?status={WORDS}"),
        client.get(f"/api/sessions?cursor={WORDS}"),
        client.get(f"/api/sessions?limit={WORDS}"),
        client.post("/api/sessions", json={"prompt": {WORDS: 1}}),
        client.post("/api/sessions", json={"prompt": WORDS + "\x00"}),
        client.post("/api/sessions", content=f'{{"prompt": "{WORDS}', headers=json),
        client.post("/api/sessions", content=f'{{"prompt": "{WORDS}\\ud800"}}', headers=json),
        client.post("/api/sessions", json={"prompt": WORDS, "source": WORDS}),
        client.post("/api/sessions", json={"prompt": WORDS * 400_000}),
        client.post("/api/sessions", json={"prompt": "x"}, headers={"Idempotency-Key": WORDS}),
        client.get("/api/sessions", headers={"Authorization": f"Bearer {token}{WORDS}"}),
        client.get("/api/sessions", headers={"Authorization": f"Basic {WORDS}"}),
        client.get("/api/sync/dead-letters"),
        client.put("/api/sessions", json={"prompt": WORDS}),
    ]


def speak_nonsense(process: ApiProcess) -> None:
    """Send what is no HTTP, which the web server itself complains about."""
    with socket.create_connection(("127.0.0.1", process.port), timeout=5) as wire:
        wire.sendall(f"{WORDS} {WORDS}\r\n\r\n".encode())
        while wire.recv(4096):
            pass


def refuse_everything(sql: psycopg.Connection[Any]) -> None:
    """Let the server's error quote what a user wrote, as constraints and triggers do."""
    sql.execute(
        "create function public.picky() returns trigger language plpgsql as"
        " $$ begin raise exception 'not this: %', new.content; end $$"
    )
    sql.execute(
        "create trigger picky before insert on session_revisions"
        " for each row execute function public.picky()"
    )


def test_no_key_and_no_users_word_is_in_anything_that_is_written_or_told(
    process: ApiProcess, fresh_supabase: Any, fault_proxy: Any
) -> None:
    token = fresh_supabase.user_token(USER)
    admin = fresh_supabase.user_token("root", app_metadata={"role": "syncer_admin"})
    told = []
    with httpx.Client(
        base_url=process.url, headers={"Authorization": f"Bearer {token}"}, timeout=30
    ) as client:

        def pending() -> int:
            return int(client.get("/health").json()["pending"])

        def operate(path: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {admin}"}
            return client.get(f"/api/sync{path}", headers=headers)

        good_calls(client)
        wait_until(lambda: pending() == 0)
        told += bad_calls(client, token)
        for fault in (Cut("after"), canned("500_json"), canned("200_html"), canned("429")):
            fault_proxy.next(fault)
            good_calls(client)
            wait_until(lambda: pending() == 0)
        with outage(fault_proxy):
            good_calls(client)
            wait_until(lambda: client.get("/health").json()["breaker"] != "closed")
            told.append(client.get("/api/sessions/00000000-0000-7000-8000-000000000000"))
        with psycopg.connect(fresh_supabase.database_url, autocommit=True) as sql:
            refuse_everything(sql)
            try:
                client.post("/api/sessions", json={"prompt": WORDS})
                wait_until(lambda: client.get("/health").json()["parked"] > 0)
            finally:
                sql.execute("drop function public.picky() cascade")
        speak_nonsense(process)
        told += [operate("/status"), operate("/dead-letters"), operate("/audit")]
        wait_until(lambda: "syncer_audit_mismatch" in client.get("/metrics").text)
        told += [client.get(path) for path in ("/metrics", "/health", "/openapi.json")]
    assert process.stop() == 0
    log = process.log_file.read_text()
    assert "WARNING uvicorn.error: " in log, "the web server writes through our formatter"
    assert {"flushed", "answered", "audited", "stopped"} <= set(_words(log)), "it did log"
    places = [("log", log), *((str(r.request.url), r.text + str(r.headers)) for r in told)]
    for path in process.data_dir.rglob("*"):
        if path.is_file() and not path.name.startswith("buffer.db"):
            places.append((path.name, path.read_bytes().decode("latin-1")))
    for place, text in places:
        for name, canary in _canaries(fresh_supabase, token, admin).items():
            assert canary not in text, f"{name} in {place}"
        assert WORDS not in text, f"a user's words in {place}"
        assert USER not in text


def _canaries(supabase: Any, token: str, admin: str) -> dict[str, str]:
    """Return what must be nowhere: whole keys, and their last parts, which alone are the secret."""
    whole = {
        "secret key": supabase.secret_key,
        "anon key": supabase.anon_key,
        "user's token": token,
        "operator's token": admin,
    }
    parts = {f"signature of the {name}": key.rpartition(".")[2] for name, key in whole.items()}
    password = supabase.database_url.split(":")[2].split("@")[0]
    return {**whole, **parts, "JWT secret": supabase.jwt_secret, "password": password}


def _words(log: str) -> Iterator[str]:
    for line in log.splitlines():
        if '"event": "' in line:
            yield line.split('"event": "')[1].split('"')[0]
