"""The commands: one JSON document on stdout, exit codes that mean something, clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from local_store import Insert, LocalStore, Update
from local_store.clock import new_id
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import free_port
from syncer.testkit.local_supabase import LocalSupabase
from tests.e2e.conftest import bare_environment

USER = "github:42"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


def write_session(folder: Path, **changes: object) -> str:
    row_id = new_id()
    with LocalStore.open(folder, tables=SESSION_TABLES) as store:
        store.write([Insert("sessions", {"id": row_id, **changes})], user_id=USER)
    return row_id


def settings(stack, folder: Path) -> dict[str, str]:
    return {**stack.env(), "SYNCER_DATA_DIR": str(folder)}


def test_flush_delivers_a_buffer_and_says_what_it_did(syncer, fresh_supabase, folder):
    write_session(folder)
    env = settings(fresh_supabase, folder)
    ran = syncer("flush", "--json", env=env)
    assert ran.code == 0, ran.err
    names = "sent applied duplicate conflict rejected held fenced pending breaker stopped"
    assert set(ran.document) == set(names.split())
    assert (ran.document["applied"], ran.document["stopped"]) == (1, "empty")
    again = syncer("flush", "--json", env=env)
    assert (again.code, again.document["sent"]) == (0, 0)


def test_backup_copies_a_buffer_that_another_process_has_open(syncer, folder, tmp_path):
    row_id = write_session(folder)
    target, env = tmp_path / "copy.db", {"SYNCER_DATA_DIR": str(folder)}
    with LocalStore.open(folder, tables=SESSION_TABLES):
        ran = syncer("backup", str(target), "--json", env=env)
    assert ran.code == 0, ran.err
    assert ran.document == {
        "target": str(target), "bytes": target.stat().st_size, "pending": 1
    }  # fmt: skip
    again = syncer("backup", str(target), env=env)
    assert again.code == 2
    assert str(target) in again.err
    (tmp_path / "restored").mkdir()
    target.rename(tmp_path / "restored" / "buffer.db")
    with LocalStore.open(tmp_path / "restored", tables=SESSION_TABLES) as store:
        assert store.get("sessions", row_id, user_id=USER)


def test_flush_with_supabase_gone_exits_3_and_keeps_everything(syncer, folder):
    write_session(folder)
    env = {
        "SUPABASE_URL": f"http://127.0.0.1:{free_port()}",
        "SUPABASE_SECRET_KEY": "eyJhbGciOiJIUzI1NiJ9.e30.c2VjcmV0",
        "SYNCER_DATA_DIR": str(folder),
    }
    ran = syncer("flush", "--json", env=env)
    assert ran.code == 3
    assert (ran.document["stopped"], ran.document["pending"]) == ("outage", 1)
    assert "c2VjcmV0" not in ran.out + ran.err


def test_flush_merges_a_conflict_by_policy_and_lists_its_record(syncer, fresh_supabase, folder):
    row_id = write_session(folder)
    env = settings(fresh_supabase, folder)
    syncer("flush", env=env)
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as sql:
        sql.execute("update sessions set status = 'abandoned'")
    with LocalStore.open(folder, tables=SESSION_TABLES) as store:
        store.write([Update("sessions", row_id, {"status": "finalized"})], user_id=USER)
    ran = syncer("flush", "--json", env=env)
    assert (ran.code, ran.document["conflict"], ran.document["applied"]) == (0, 0, 1)
    assert syncer("conflicts", "list", "--open", "--json", env=env).document == []
    [record] = syncer("conflicts", "list", "--json", env=env).document
    assert (record["outcome"], record["mine"], record["theirs"]) == (
        "remote", {"status": "finalized"}, {"status": "abandoned"},
    )  # fmt: skip


def test_audit_balances_and_finds_a_ledger_row_that_vanished(syncer, fresh_supabase, folder):
    write_session(folder)
    env = settings(fresh_supabase, folder)
    syncer("flush", env=env)
    ran = syncer("audit", "--json", env=env)
    assert (ran.code, ran.document["balanced"]) == (0, True)
    assert ran.document["total"]["applied"] == 1
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as sql:
        sql.execute("delete from sync.ledger")
    ran = syncer("audit", "--json", env=env)
    assert (ran.code, ran.document["total"]["lost"]) == (1, 1)


def test_audit_works_without_the_buffer(syncer, fresh_supabase, folder):
    write_session(folder)
    syncer("flush", env=settings(fresh_supabase, folder))
    ran = syncer("audit", "--json", env=fresh_supabase.env())
    assert (ran.code, ran.document["total"]["applied"]) == (0, 1)


def test_status_shows_what_waits(syncer, fresh_supabase, folder):
    write_session(folder)
    ran = syncer("status", "--json", env=settings(fresh_supabase, folder))
    [log] = ran.document["logs"]
    assert (ran.document["supabase"], log["pending"], log["last_seq"]) == ("up", 1, 1)
    assert {"log_id", "pending", "parked", "bytes", "oldest_age_s", "last_seq"} <= set(log)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, "SUPABASE_URL"),
        ({"SUPABASE_URL": "supabase.example"}, "SUPABASE_URL"),
        ({"SUPABASE_URL": "https://x.example"}, "SUPABASE_SECRET_KEY"),
        ({"SYNCER_FLUSH_INTERVAL_S": "soon"}, "SYNCER_FLUSH_INTERVAL_S"),
        ({"USE_SUPABASE": "false"}, "USE_SUPABASE"),
    ],
)
def test_a_bad_setting_exits_2_and_names_it(syncer, folder, env, named):
    write_session(folder)
    ran = syncer("flush", env={**env, "SYNCER_DATA_DIR": str(folder)})
    assert ran.code == 2
    assert named in ran.err
    assert "Traceback" not in ran.err


def test_a_folder_without_a_buffer_is_no_empty_buffer(syncer, fresh_supabase, folder):
    ran = syncer("flush", env=settings(fresh_supabase, folder))
    assert ran.code == 2
    assert "SYNCER_DATA_DIR" in ran.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        (None, "DATABASE_URL"),
        ("mysql://x", "DATABASE_URL"),
        ("postgresql://u:hunter2@127.0.0.1:1/x", "DATABASE_URL"),
    ],
)
def test_migrate_names_what_is_wrong_and_never_the_password(syncer, url, named):
    ran = syncer("migrate", env={} if url is None else {"DATABASE_URL": url})
    assert ran.code in (2, 3)
    assert named in ran.err
    assert "hunter2" not in ran.err
    assert "Traceback" not in ran.err


def test_migrate_on_a_migrated_project_applies_nothing(syncer, local_supabase):
    ran = syncer("migrate", "--json", env=local_supabase.env())
    assert (ran.code, ran.document["applied"]) == (0, [])


def test_worker_delivers_until_it_is_told_to_stop(fresh_supabase, folder, tmp_path):
    write_session(folder)
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-m", "syncer", "worker"],
            env={**bare_environment(), **settings(fresh_supabase, folder)},
            stdout=out,
            stderr=out,
        )
    try:
        with LocalStore.open(folder, tables=SESSION_TABLES) as store:
            wait_until(lambda: store.stats()["pending"] == 0)
            store.write([Insert("sessions", {})], user_id=USER)
            wait_until(lambda: store.stats()["pending"] == 0)
        worker.terminate()
        assert worker.wait(20) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()


def test_an_unknown_command_is_a_usage_error(syncer):
    assert syncer("frobnicate").code == 2


def test_a_local_supabase_starts_stops_and_keeps_its_data(syncer, tmp_path):
    folder = str(tmp_path / "stack")
    assert syncer("supabase", "env", "--dir", folder).code == 2
    try:
        started = syncer("supabase", "start", "--dir", folder)
        assert started.code == 0, started.err
        lines = syncer("supabase", "env", "--dir", folder).out.splitlines()
        env = dict(line.split("=", 1) for line in lines)
        assert set(env) == {
            "SUPABASE_URL",
            "SUPABASE_ANON_KEY",
            "SUPABASE_SECRET_KEY",
            "SUPABASE_JWT_SECRET",
            "DATABASE_URL",
        }
        with psycopg.connect(env["DATABASE_URL"]) as sql:
            sql.execute("insert into sessions (user_id) values (gen_random_uuid())")
        assert syncer("supabase", "stop", "--dir", folder).code == 0
        assert syncer("supabase", "start", "--dir", folder).code == 0
        with psycopg.connect(env["DATABASE_URL"]) as sql:
            assert sql.execute("select count(*) from sessions").fetchone() == (1,)
    finally:
        LocalSupabase.attach(tmp_path / "stack").remove()


def test_bench_flush_drains_an_outage_and_tells_it_in_one_document(syncer):
    ran = syncer("bench", "flush", "--transactions", "1000", "--users", "10", "--json")
    assert ran.code == 0, ran.err
    assert (ran.document["transactions"], ran.document["balanced"]) == (1_000, True)
    assert {"idle", "outage", "drain", "drain_s", "transactions_s", "rss_mb"} <= set(ran.document)
