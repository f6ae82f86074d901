"""The local Supabase: several at once, faults, crashes of whoever started it, any user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psycopg
import pytest

from local_store.clock import SystemClock
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.processes import started_at

PATIENCE_S = 30.0


def until(condition) -> None:
    clock = SystemClock()
    end = clock.monotonic() + PATIENCE_S
    while not condition():
        assert clock.monotonic() < end, "did not happen in time"
        clock.sleep(0.02)


def get(stack: LocalSupabase, path: str, key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["apikey"] = key
    return httpx.get(f"{stack.url}/rest/v1/{path}", headers=headers, timeout=20.0)


def test_a_user_token_sees_its_own_rows_through_the_gateway(local_supabase):
    mine = local_supabase.user_token("github:42")
    headers = {"Authorization": f"Bearer {mine}", "Prefer": "return=representation"}
    made = httpx.post(
        f"{local_supabase.url}/rest/v1/sessions",
        json={},
        headers={**headers, "apikey": local_supabase.anon_key},
    )
    assert made.status_code == 201, made.text
    row = made.json()[0]
    path = f"sessions?id=eq.{row['id']}"
    own = get(local_supabase, path, local_supabase.anon_key, Authorization=f"Bearer {mine}")
    other = local_supabase.user_token("github:43")
    theirs = get(local_supabase, path, local_supabase.anon_key, Authorization=f"Bearer {other}")
    assert (len(own.json()), theirs.json()) == (1, [])


@pytest.mark.parametrize("key", [None, "nonsense"])
def test_a_request_without_a_valid_apikey_is_refused(local_supabase, key):
    reply = get(local_supabase, "sessions", key)
    assert reply.status_code == 401
    assert "message" in reply.json()


def test_the_gateway_answers_5xx_while_postgrest_is_gone(local_supabase):
    local_supabase.stop_postgrest()
    try:
        reply = get(local_supabase, "sessions", local_supabase.secret_key)
        assert reply.status_code in (502, 503)
    finally:
        local_supabase.start_postgrest()
    assert get(local_supabase, "sessions", local_supabase.secret_key).status_code == 200


def test_postgrest_recovers_after_postgres_was_gone(local_supabase):
    local_supabase.stop_postgres()
    try:
        # A connection that dies under a request gives a 400 without a code; then it knows better.
        first = get(local_supabase, "sessions", local_supabase.secret_key)
        assert first.status_code >= 400
        until(lambda: get(local_supabase, "sessions", local_supabase.secret_key).status_code == 503)
    finally:
        local_supabase.start_postgres()
    until(lambda: get(local_supabase, "sessions", local_supabase.secret_key).status_code == 200)


def test_committed_rows_survive_an_immediate_stop(local_supabase):
    with psycopg.connect(local_supabase.database_url, autocommit=True) as sql:
        for _ in range(20):
            sql.execute("insert into sessions (user_id) values (gen_random_uuid())")
        stored = sql.execute("select count(*) from sessions").fetchone()
        with local_supabase.outage():
            pass
    with psycopg.connect(local_supabase.database_url) as sql:
        assert sql.execute("select count(*) from sessions").fetchone() == stored


def test_a_second_stack_runs_beside_the_first_and_leaves_nothing_behind(local_supabase):
    with LocalSupabase.start(migrated=False) as second:
        pids, folder = second.pids(), second.folder
        assert len(pids) == 3
        assert second.url != local_supabase.url
        assert get(second, "", second.secret_key).status_code == 200
        assert get(second, "", local_supabase.secret_key).status_code == 401
    assert [pid for pid in pids if started_at(pid)] == []
    assert not folder.exists()


# It waits to be killed; should the test end before that, it ends by itself.
STARTER = """
import sys, time
from syncer.testkit.local_supabase import LocalSupabase
stack = LocalSupabase.start(migrated=False)
print(stack.folder, *stack.pids(), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_starter_is_killed():
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    folder, *pids = starter.stdout.readline().split()
    assert len(pids) == 3
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    until(lambda: not any(started_at(int(pid)) for pid in pids))
    until(lambda: not Path(folder).exists())


def test_a_folder_whose_processes_were_killed_starts_again_with_its_data(tmp_path):
    stack = LocalSupabase.start(tmp_path / "stack")
    try:
        with psycopg.connect(stack.database_url, autocommit=True) as sql:
            sql.execute("insert into sessions (user_id) values (gen_random_uuid())")
        for pid in stack.pids():
            os.kill(pid, signal.SIGKILL)
        stack = LocalSupabase.start(tmp_path / "stack")
        with psycopg.connect(stack.database_url) as sql:
            assert sql.execute("select count(*) from sessions").fetchone() == (1,)
    finally:
        stack.remove()
    assert stack.pids() == []
    assert not stack.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="run as an ordinary user: every other test shows it")
def test_an_ordinary_user_can_start_it(local_supabase):
    del local_supabase  # its start has fetched PostgREST into the cache, which nobody may read only
    home = Path(f"/tmp/syncer-nobody-{os.getpid()}")
    home.mkdir()
    shutil.chown(home, "nobody")
    # The interpreter may live under root's home; the capability opens the way to it, no more.
    reach = "+dac_read_search"
    command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    command += [f"--inh-caps={reach}", f"--ambient-caps={reach}", sys.executable, "-c"]
    script = (
        "import os\nfrom syncer.testkit.local_supabase import LocalSupabase\n"
        "with LocalSupabase.start() as stack:\n    print(os.getuid(), len(stack.pids()))\n"
    )
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": cache}
    try:
        done = subprocess.run(
            [*command, script], env=env, cwd="/tmp", capture_output=True, text=True, timeout=120
        )
    finally:
        shutil.rmtree(home)
    assert done.returncode == 0, done.stderr
    uid, processes = done.stdout.split()
    assert int(uid) != 0
    assert int(processes) == 3
