"""Sessions outlive processes and cross containers that share nothing but Supabase."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from syncer.sessions.models import hole_ids
from syncer.testkit import wait_until
from syncer.testkit.api_process import ApiProcess
from tests.e2e.conftest import TIMEOUT_S, bare_environment

HOLES = [f"hole_{number}" for number in range(5)]
IR = {
    "intent": {
        "summary": "five open questions",
        "rationale": None,
        "holes": [{"identifier": hole, "kind": "intent"} for hole in HOLES],
    }
}
Container = tuple[ApiProcess, httpx.Client]

WRITE = """
import json
from syncer import Flusher
from syncer.sessions import IRDraft, PromptSession, open_session_store
from syncer.sessions.tables import SESSION_TABLES
from local_store import LocalStore
from syncer import Settings

session = PromptSession.create_new(
    initial_draft=IRDraft(version=1, ir={"big": 1e23, "deep": [{"ü": None}]}),
    metadata={"client": "a library's user"},
)
session.updated_at = "2025-10-19T00:00:00.120000+00:00Z"
with open_session_store("github:42") as store:
    store.create(session)
with LocalStore.open(Settings.load().data_dir, tables=SESSION_TABLES) as local:
    report = Flusher.from_settings(local).flush_once()
print(json.dumps({"applied": report.applied, "session": session.to_dict()}))
"""
READ = """
import json, sys
from syncer.sessions import open_session_store

with open_session_store("github:42") as store:
    found = store.get(sys.argv[1])
    listed = store.list_active()
with open_session_store("github:43") as store:
    foreign = store.get(sys.argv[1])
print(json.dumps({
    "session": found.to_dict(), "listed": len(listed), "foreign_is_none": foreign is None,
}))
"""


@pytest.fixture
def start(fresh_supabase, tmp_path: Path) -> Iterator[Callable[[str], Container]]:
    """Start containers by name: one name is one folder. Each comes with a signed-in client."""
    settings = {
        **fresh_supabase.env(),
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
        "SYNCER_BREAKER_INTERVAL_S": "0.5",
        "SYNCER_READ_THROUGH_MS": "5000",
    }
    headers = {"Authorization": f"Bearer {fresh_supabase.user_token('github:42')}"}
    made: list[Container] = []

    def started(name: str) -> Container:
        api = ApiProcess(settings, tmp_path / name, tmp_path / f"{name}.log")
        api.start()
        client = httpx.Client(base_url=api.url, headers=headers, timeout=30.0)
        made.append((api, client))
        return api, client

    yield started
    for api, client in made:
        client.close()
        api.kill()


def create(client: httpx.Client) -> dict:
    reply = client.post("/api/sessions", json={"ir": IR, "source": "reverse_mode"})
    assert reply.status_code == 201, reply.text
    return reply.json()


def drained(*clients: httpx.Client) -> None:
    wait_until(lambda: all(c.get("/health").json()["pending"] == 0 for c in clients))


def without_sync(document: dict) -> dict:
    return {name: value for name, value in document.items() if name != "sync"}


def test_a_session_survives_a_kill_and_a_restart(start):
    api, client = start("one")
    made = create(client)
    path = f"/api/sessions/{made['session_id']}"
    assert client.post(f"{path}/rollback", json={"version": 1}).status_code == 200
    before = client.get(path).json()
    api.kill()
    api.start()
    assert without_sync(client.get(path).json()) == without_sync(before)
    assert [draft["version"] for draft in before["ir_drafts"]] == [1, 2]


def test_two_containers_share_a_session_through_supabase_alone(start):
    (_, one), (_, other) = start("one"), start("other")
    made = create(one)
    path = f"/api/sessions/{made['session_id']}"
    drained(one)
    shown = other.get(path)
    assert shown.status_code == 200
    assert without_sync(shown.json()) == without_sync(made)
    assert other.post(f"{path}/finalize").status_code == 200
    drained(other)
    seen = one.get(path).json()
    assert (seen["status"], seen["sync"]["state"]) == ("finalized", "synced")
    assert one.delete(path).status_code == 204
    drained(one)
    assert other.get(path).status_code == 404


def test_a_container_with_an_empty_disk_finds_what_was_delivered(start):
    api, client = start("one")
    made = create(client)
    drained(client)
    api.kill()
    _, fresh = start("replacement")
    assert without_sync(fresh.get(f"/api/sessions/{made['session_id']}").json()) == without_sync(
        made
    )
    listed = fresh.get("/api/sessions").json()
    assert (len(listed["sessions"]), listed["complete"]) == (1, True)


def test_five_answers_at_once_through_two_containers_all_succeed_and_are_all_there(start):
    (_, one), (_, other) = start("one"), start("other")
    made = create(one)
    path = f"/api/sessions/{made['session_id']}"
    drained(one)
    assert other.get(path).status_code == 200

    def resolve(number: int) -> int:
        body = {"resolution_text": f"about {HOLES[number]}"}
        client = (one, other)[number % 2]
        return client.post(f"{path}/holes/{HOLES[number]}/resolve", json=body).status_code

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(resolve, range(5))) == [200] * 5
    drained(one, other)
    for client in (one, other):
        seen = client.get(path).json()
        assert {answer["hole_id"] for answer in seen["pending_resolutions"]} == set(HOLES)
        assert hole_ids(seen["current_draft"]["ir"]) == []
        assert client.get("/health").json()["parked"] == 0


def test_in_an_outage_another_containers_session_is_unknown_and_never_absent(start, fresh_supabase):
    (_, one), (_, other) = start("one"), start("other")
    made, held = create(one), create(other)
    path = f"/api/sessions/{made['session_id']}"
    drained(one, other)
    calls = (
        lambda: other.get(path),
        lambda: other.get(f"{path}/history"),
        lambda: other.post(f"{path}/finalize"),
        lambda: other.post(f"{path}/abandon"),
        lambda: other.post(f"{path}/rollback", json={"version": 1}),
        lambda: other.post(f"{path}/holes/h/resolve", json={"resolution_text": "x"}),
        lambda: other.delete(path),
    )
    with fresh_supabase.outage():
        for call in calls:
            reply = call()
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        listed = other.get("/api/sessions").json()
        assert [s["session_id"] for s in listed["sessions"]] == [held["session_id"]]
        assert listed["complete"] is False
        assert listed["sessions"][0]["sync"]["stale"] is True
    wait_until(lambda: other.get(path).status_code == 200)
    assert other.get("/api/sessions").json()["complete"] is True


def test_two_processes_of_a_library_user_share_only_supabase(fresh_supabase, tmp_path):
    def run(name: str, code: str, *arguments: str) -> dict:
        settings = {**fresh_supabase.env(), "SYNCER_READ_THROUGH_MS": "5000"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**bare_environment(), **settings, "SYNCER_DATA_DIR": str(tmp_path / name)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    written = run("one", WRITE)
    assert written["applied"] == 1
    read = run("other", READ, written["session"]["session_id"])
    assert read == {"session": written["session"], "listed": 1, "foreign_is_none": True}
