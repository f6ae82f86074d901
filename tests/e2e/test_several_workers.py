"""Four uvicorn workers on one folder: one log, no loss, nothing twice: P1, P2, P3."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from local_store import LocalStore
from syncer.audit import audit
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import free_port
from tests.e2e.conftest import bare_environment

ROOT = Path(__file__).parents[2]
WORKERS, CLIENTS, EACH = 4, 8, 6


@pytest.fixture
def url(fresh_supabase: Any, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    env = {
        **bare_environment(),
        **fresh_supabase.env(),
        "SYNCER_DATA_DIR": str(tmp_path / "buffer"),
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.e2e.several_workers:create"]
    command += ["--workers", str(WORKERS), "--port", str(port), "--log-level", "warning"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return httpx.get(f"{address}/health/ready", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_ready, timeout_s=90.0)  # four imports on a busy machine
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_four_workers_on_one_folder_write_one_log_and_deliver_each_write_once(
    url: str, fresh_supabase: Any, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {fresh_supabase.user_token('github:42')}"}
    acknowledged: list[str] = []

    def client() -> None:
        for _ in range(EACH):  # a connection each, so that all workers are met
            made = httpx.post(
                f"{url}/api/sessions", json={"prompt": "Sort by ???"}, headers=headers, timeout=30
            )
            assert made.status_code == 201, made.text
            path = f"{url}/api/sessions/{made.json()['session_id']}"
            hole = made.json()["current_draft"]["ambiguities"][0]
            answer = {"resolution_text": "int"}
            answered = httpx.post(
                f"{path}/holes/{hole}/resolve", json=answer, headers=headers, timeout=30
            )
            assert answered.status_code == 200, answered.text
            acknowledged.append(made.json()["session_id"])

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(acknowledged) == CLIENTS * EACH
    wait_until(lambda: httpx.get(f"{url}/health", timeout=30).json()["pending"] == 0)
    with psycopg.connect(fresh_supabase.database_url) as sql:
        rows = sql.execute("select id::text, revision_count from sessions").fetchall()
        seqs = [seq for (seq,) in sql.execute("select seq from sync.ledger order by 1").fetchall()]
    assert sorted(rows) == sorted((row_id, 2) for row_id in acknowledged)
    assert seqs == list(range(1, 2 * len(acknowledged) + 1)), "one log without a gap"
    remote = SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key)
    with LocalStore.open(tmp_path / "buffer", tables=SESSION_TABLES) as store:
        assert len(store.logs()) == 1
        assert audit(remote, store).balanced
    remote.close()
