"""`syncer replay` and `syncer doctor`: what is run after an outage, and before one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert, LocalStore, Update, user_uuid
from local_store.clock import ManualClock, new_id
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import free_port
from syncer.testkit.faults import Delay
from tests.e2e.conftest import bare_environment

USER, OTHER = "github:42", "github:43"
NAMES = ["selected", "applied", "duplicate", "conflict", "rejected", "held", "remaining"]
_STATUS = replace(SESSION_TABLES[0].columns["status"], enum=None)
LOOSENED = [
    replace(SESSION_TABLES[0], columns={**SESSION_TABLES[0].columns, "status": _STATUS}),
    *SESSION_TABLES[1:],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


@pytest.fixture
def store(folder: Path) -> Iterator[LocalStore]:
    with LocalStore.open(folder, tables=LOOSENED) as opened:
        yield opened


@pytest.fixture
def env(fresh_supabase, folder: Path) -> dict[str, str]:
    return {**fresh_supabase.env(), "SYNCER_DATA_DIR": str(folder)}


@pytest.fixture
def replay(syncer, env) -> Any:
    return lambda *arguments: syncer("replay", "--json", *arguments, env=env)


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def session(store: LocalStore, user: str = USER, **values: Any) -> str:
    row_id = new_id()
    store.write([Insert("sessions", {"id": row_id, **values})], user_id=user)
    return row_id


def revision(store: LocalStore, row_id: str) -> None:
    values = {"session_id": row_id, "content": "x", "revision_type": "manual_edit"}
    store.write([Insert("session_revisions", values)], user_id=USER)


def count(sql: psycopg.Connection[Any], table: str = "sessions") -> int:
    found = sql.execute(f"select count(*) from {table}").fetchone()
    assert found is not None
    return int(found[0])


def counts(ran: Any, *names: str) -> tuple[int, ...]:
    return tuple(ran.document[name] for name in names)


def test_a_replay_delivers_everything_and_says_what_it_did(replay, store, sql, syncer, env):
    for _ in range(3):
        revision(store, session(store))
    ran = replay()
    assert ran.code == 0, ran.err
    assert list(ran.document) == NAMES
    assert counts(ran, "selected", "applied", "remaining") == (6, 6, 0)
    assert (count(sql), count(sql, "session_revisions")) == (3, 3)
    again = syncer("replay", env=env)
    assert (again.code, again.out[:10]) == (0, "0 selected")
    settled = replay("--settled")
    assert (settled.code, counts(settled, "selected", "applied", "duplicate")) == (0, (6, 0, 6))


def test_filters_narrow_what_is_delivered(replay, folder, sql):
    clock = ManualClock()
    with LocalStore.open(folder, tables=LOOSENED, clock=clock) as store:
        early = session(store)
        clock.advance(3_600)
        noon = clock.now()
        session(store)
        session(store, OTHER)
        clock.advance(3_600)
        revision(store, early)
        late = clock.now()
    theirs = replay("--user", OTHER)
    assert (theirs.code, counts(theirs, "selected", "applied")) == (0, (1, 1))
    [(owner,)] = sql.execute("select user_id::text from sessions").fetchall()
    assert owner == user_uuid(OTHER)
    between = replay("--since", noon.isoformat(), "--until", late.isoformat())
    assert counts(between, "selected", "applied") == (1, 1)
    # The parent isn't selected, so its child can't go.
    child = replay("--table", "session_revisions")
    assert (child.code, counts(child, "selected", "held", "remaining")) == (1, (1, 1, 1))
    rest = replay("--table", "sessions", "--since", "2000-01-01")
    assert (rest.code, counts(rest, "selected", "applied")) == (0, (1, 1))
    assert counts(replay(), "applied", "remaining") == (1, 0)
    assert (count(sql), count(sql, "session_revisions")) == (3, 1)
    assert replay("--since", "yesterday").code == 2


def test_a_dry_run_shows_what_would_change_and_sends_nothing(syncer, replay, store, env, sql):
    known = session(store, status="active")
    assert replay().code == 0
    fresh = session(store, metadata={"n": 1})
    store.write([Update("sessions", known, {"status": "finalized"})], user_id=USER)
    dead = session(store, status="bogus")
    assert replay().code == 1  # one is parked now, which a replay doesn't send
    assert count(sql) == 2
    store.write([Update("sessions", known, {"status": "abandoned"})], user_id=USER)
    revision(store, fresh)
    revision(store, dead)
    ran = syncer("replay", "--dry-run", env=env)
    assert ran.code == 0, ran.err
    assert f"update sessions/{known}" in ran.out
    assert "status: 'finalized' → 'abandoned'" in ran.out
    assert "(no such row yet)" in ran.out
    assert ran.out.splitlines()[-1] == "3 changes would be sent; nothing was"
    assert dead not in "".join(d["id"] for d in replay("--dry-run").document)
    assert (count(sql), count(sql, "session_revisions")) == (2, 0)
    assert replay("--dry-run", "--settled").code == 2


def test_a_refused_transaction_makes_the_replay_fail_once(replay, store, sql):
    session(store, status="bogus")
    session(store)
    ran = replay()
    assert (ran.code, counts(ran, "applied", "rejected", "remaining")) == (1, (1, 1, 0))
    again = replay()
    assert (again.code, counts(again, "rejected", "remaining")) == (0, (0, 0))


def test_dead_letters_are_tried_again_and_fail_the_replay_while_they_are_refused(
    replay, store, sql
):
    row_id = session(store, status="bogus")
    revision(store, row_id)
    assert replay().code == 1
    refused = replay("--dead-letters")
    assert (refused.code, counts(refused, "rejected")) == (1, (1,))
    sql.execute("alter table sessions drop constraint valid_status")
    try:
        ran = replay("--dead-letters")
        assert (ran.code, counts(ran, "rejected", "remaining")) == (0, (0, 0)), ran.err
        assert count(sql, "session_revisions") == 1
        assert store.stats()["parked"] == 0
    finally:
        sql.execute("truncate sessions cascade")
        sql.execute(
            "alter table sessions add constraint valid_status"
            " check (status in ('active', 'finalized', 'abandoned'))"
        )


def test_a_killed_replay_is_run_again_without_a_second_effect(
    replay, store, sql, env, fault_proxy, syncer
):
    for _ in range(40):
        revision(store, session(store))
    slow = {**env, "SUPABASE_URL": fault_proxy.url, "SYNCER_BATCH_OPS_MAX": "10"}
    fault_proxy.set(Delay(0.3, "after"))
    process = subprocess.Popen(
        [sys.executable, "-m", "syncer", "replay"],
        env={**bare_environment(), **slow},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: count(sql) > 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.stats()["pending"] > 0
    ran = replay()
    assert (ran.code, counts(ran, "remaining")) == (0, (0,))
    assert (count(sql), count(sql, "session_revisions"), count(sql, "sync.ledger")) == (40, 40, 80)
    assert syncer("audit", env=env).code == 0


def test_two_replays_at_once_deliver_each_transaction_once(store, sql, env, syncer):
    for _ in range(60):
        revision(store, session(store))
    command = [sys.executable, "-m", "syncer", "replay", "--json"]
    environment = {**bare_environment(), **env, "SYNCER_BATCH_OPS_MAX": "10"}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert (count(sql), count(sql, "sync.ledger")) == (60, 120)
    assert syncer("audit", env=env).code == 0


def test_with_supabase_gone_a_replay_exits_3_and_keeps_everything(store, syncer, env, replay, sql):
    session(store)
    gone = {**env, "SUPABASE_URL": f"http://127.0.0.1:{free_port()}"}
    for arguments in (["--settled", "--json"], ["--dead-letters"]):
        ran = syncer("replay", *arguments, env=gone)
        assert ran.code == 3, arguments
        assert env["SUPABASE_SECRET_KEY"] not in ran.out + ran.err
        assert "Traceback" not in ran.err
    assert (count(sql), store.stats()["pending"]) == (0, 1)
    assert counts(replay(), "applied", "remaining") == (1, 0)


# -- doctor --


def test_the_doctor_finds_a_good_setup_good(syncer, store, env):
    ran = syncer("doctor", "--json", env=env)
    assert ran.code == 0, ran.out
    assert ran.document["ok"] is True
    assert {"name", "ok", "severity", "detail", "remedy"} == set(ran.document["checks"][0])
    assert env["SUPABASE_SECRET_KEY"] not in ran.out
    assert env["DATABASE_URL"] not in ran.out


def failures(ran: Any) -> dict[str, str]:
    checks = ran.document["checks"]
    return {c["name"]: c["remedy"] for c in checks if not c["ok"] and c["severity"] == "error"}


def test_the_doctor_names_a_remedy_for_each_thing_that_is_wrong(syncer, env, folder, sql):
    anon = syncer("doctor", "--json", env={**env, "SUPABASE_SECRET_KEY": env["SUPABASE_ANON_KEY"]})
    assert anon.code == 1
    assert "SUPABASE_SECRET_KEY" in " ".join(failures(anon).values())
    gone = {**env, "SUPABASE_URL": f"http://127.0.0.1:{free_port()}"}
    unreachable = syncer("doctor", "--json", env=gone)
    assert (unreachable.code, list(failures(unreachable))) == (1, ["server.reachable"])
    sql.execute("alter table session_drafts disable row level security")
    try:
        open_table = syncer("doctor", "--json", env=env)
    finally:
        sql.execute("alter table session_drafts enable row level security")
    assert (open_table.code, list(failures(open_table))) == (
        1, ["table.session_drafts.row_security"],
    )  # fmt: skip
    bad = syncer("doctor", env={**env, "SYNCER_FLUSH_INTERVAL_S": "soon"})
    assert bad.code == 1
    assert "✗ setting.SYNCER_FLUSH_INTERVAL_S" in bad.out
    assert all("Traceback" not in ran.err for ran in (anon, unreachable, open_table, bad))


def test_the_doctor_finds_a_damaged_buffer(syncer, env, folder, store):
    store.close()
    with (folder / "buffer.db").open("r+b") as file:
        file.write(b"not a database at all")
    os.chmod(folder, 0o755)
    ran = syncer("doctor", "--json", env=env)
    assert (ran.code, "buffer.journal" in failures(ran)) == (1, True)
    warned = [check["name"] for check in ran.document["checks"] if not check["ok"]]
    assert "folder.mode" in warned
