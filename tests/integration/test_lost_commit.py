"""PostgREST loses Postgres's reply to COMMIT: the row is there, the client must not know better."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from local_store import Insert, LocalStore
from local_store.clock import ManualClock, new_id
from syncer.flusher import Flusher
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import free_port
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import LoseCommitReply
from syncer.testkit.postgrest import find_postgrest
from syncer.testkit.processes import PidFile, spawn


@pytest.fixture
def wire(fresh_supabase) -> Iterator[FaultProxy]:
    port = int(conninfo_to_dict(fresh_supabase.database_url)["port"])
    with FaultProxy.start("127.0.0.1", port, mode="postgres") as proxy:
        yield proxy


@pytest.fixture
def postgrest(fresh_supabase, wire, tmp_path: Path) -> Iterator[str]:
    """A second PostgREST whose connections to Postgres run through the proxy."""
    password = conninfo_to_dict(fresh_supabase.database_url)["password"]
    port = free_port()
    settings = {
        "PGRST_DB_URI": f"postgresql://authenticator:{password}@127.0.0.1:{wire.port}/postgres",
        "PGRST_DB_SCHEMAS": "public",
        "PGRST_DB_ANON_ROLE": "anon",
        "PGRST_JWT_SECRET": fresh_supabase.jwt_secret,
        "PGRST_DB_POOL": "2",
        "PGRST_DB_CHANNEL_ENABLED": "false",  # its own commits are none of this test
        "PGRST_SERVER_HOST": "127.0.0.1",
        "PGRST_SERVER_PORT": str(port),
    }
    log_file = tmp_path / "postgrest.log"
    process = PidFile(tmp_path / "postgrest.pid")
    process.write(spawn([str(find_postgrest())], log_file=log_file, env={**os.environ, **settings}))
    url = f"http://127.0.0.1:{port}"

    def serves() -> bool:
        try:
            return httpx.get(url).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(serves)
        yield url
    finally:
        process.end()


class Direct(SupabaseRemote):
    """supabase-py, pointed at a PostgREST without the gateway's prefix."""

    def _enter(self):
        line = super()._enter()
        line.client.rest_url = type(line.client.rest_url)(self._url)
        return line


def test_a_lost_reply_to_commit_is_an_unknown_outcome_and_the_resend_a_duplicate(
    fresh_supabase, postgrest, wire, tmp_path
):
    remote = Direct(postgrest, fresh_supabase.secret_key)
    clock = ManualClock()
    with LocalStore.open(tmp_path / "buffer", tables=SESSION_TABLES) as store:
        store.write([Insert("sessions", {"id": new_id()})], user_id="github:42")
        flusher = Flusher(store, remote, clock=clock, jitter=lambda: 0.0)
        wire.set(LoseCommitReply())
        lost = flusher.flush_once()
        assert (lost.stopped, lost.pending, lost.rejected) == ("outage", 1, 0)
        with psycopg.connect(fresh_supabase.database_url) as sql:
            assert sql.execute("select count(*) from sessions").fetchone() == (1,)
            assert sql.execute("select count(*) from sync.ledger").fetchone() == (1,)
        wire.clear()
        reports = []

        def resent() -> bool:
            clock.advance(60)
            reports.append(flusher.flush_once())
            return store.stats()["pending"] == 0

        wait_until(resent)  # PostgREST reconnects in its own time, and answers 503 until then
        assert (reports[-1].duplicate, reports[-1].applied) == (1, 0)
    remote.close()
