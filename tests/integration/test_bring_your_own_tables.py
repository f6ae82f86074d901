"""A user's own tables, end to end, as the document shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from local_store import Column, Insert, TableSpec, user_uuid
from local_store.clock import new_id
from local_store.ops import Row
from syncer.doctor import examine
from syncer.errors import NotAuthorized
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from syncer.testkit.buffer import wait_until
from syncer.testkit.local_supabase import LocalSupabase

DOCUMENT = Path(__file__).parents[2] / "docs" / "BRING_YOUR_OWN_TABLES.md"
ANA, BEN = user_uuid("github:42"), user_uuid("github:43")
DROP = """
do $$ begin
  if to_regclass('public.notes') is not null then
    perform public.sync_unregister_table('public.notes');
  end if;
  if to_regclass('public.projects') is not null then
    perform public.sync_unregister_table('public.projects');
  end if;
end $$;
drop table if exists public.notes, public.projects;
drop function if exists public.touch();
notify pgrst, 'reload schema';
"""
PROJECTS = TableSpec(
    "projects",
    {
        "id": Column("uuid"),
        "user_id": Column("uuid"),
        "updated_at": Column("timestamp"),
        "name": Column("text", nullable=False),
    },
)


def blocks(language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)


def execute(stack: LocalSupabase, script: str) -> None:
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute(script)


def count(stack: LocalSupabase, table: str) -> int:
    with psycopg.connect(stack.database_url) as connection:
        [found] = connection.execute(f"select count(*) from public.{table}").fetchone()
        return found


def as_user(stack: LocalSupabase, user: str, statement: str) -> list[tuple[Any, ...]]:
    claims = json.dumps({"sub": user, "role": "authenticated"})
    with psycopg.connect(stack.database_url) as connection:
        connection.execute(
            "select set_config('role', 'authenticated', true),"
            " set_config('request.jwt.claims', %s, true)",
            (claims,),
        )
        return connection.execute(statement).fetchall()


@pytest.fixture
def stack(fresh_supabase) -> Iterator[LocalSupabase]:
    execute(fresh_supabase, DROP)
    yield fresh_supabase
    execute(fresh_supabase, DROP)


def test_the_document_works_as_pasted(stack, tmp_path):
    tables, registration = blocks("sql")
    execute(stack, tables)
    execute(stack, registration)
    [example] = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(example.replace("/var/lib/app/buffer", str(tmp_path / "buffer")))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**stack.env(), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["host second", "3 applied"]
    assert as_user(stack, ANA, "select name, settings from projects") == [
        ("Atlas", {"colour": "red"})
    ]
    assert as_user(stack, ANA, "select body from notes") == [("second",)]
    assert as_user(stack, BEN, "select 1 from projects union select 1 from notes") == []


def test_the_registration_of_the_document_draws_no_warning(stack):
    tables, registration = blocks("sql")
    execute(stack, tables)
    with psycopg.connect(stack.database_url) as connection:
        for statement in registration.strip().split(";\n"):
            [told] = connection.execute(statement).fetchone()
            assert told["warnings"] == []


def test_what_is_written_before_the_registration_waits_and_arrives_after_it(stack, buffered_store):
    tables, registration = blocks("sql")
    execute(stack, tables)
    app = buffered_store([PROJECTS])
    receipt = app.store.write([Insert("projects", {"name": "early"})], user_id="github:42")
    report = app.flush_once()
    assert (report.held, report.pending) == (1, 1)
    assert app.store.state(receipt.txn_id) == "held"
    assert app.store.reply(receipt.txn_id)["sqlstate"] == "42P01"
    assert count(stack, "projects") == 0

    execute(stack, registration)
    app.flush_once()
    assert app.store.state(receipt.txn_id) == "applied"
    assert as_user(stack, ANA, "select name from projects") == [("early",)]
    assert app.audit().balanced


def test_an_id_that_somebody_else_has_is_not_taken_over(stack, buffered_store):
    tables, registration = blocks("sql")
    execute(stack, tables + registration)
    mine, theirs = buffered_store([PROJECTS]), buffered_store([PROJECTS])
    row_id = new_id()
    mine.store.write([Insert("projects", {"id": row_id, "name": "ana's"})], user_id="github:42")
    mine.drain()
    taken = theirs.store.write([Insert("projects", {"id": row_id, "name": "x"})], user_id=BEN)
    theirs.drain()
    assert theirs.store.state(taken.txn_id) != "applied"
    assert as_user(stack, ANA, "select name from projects") == [("ana's",)]
    assert as_user(stack, BEN, "select 1 from projects") == []


def test_two_registrations_at_once_wait_for_each_other(stack):
    execute(stack, blocks("sql")[0])
    with (
        ThreadPoolExecutor() as pool,
        psycopg.connect(stack.database_url) as first,
        psycopg.connect(stack.database_url, autocommit=True) as second,
        psycopg.connect(stack.database_url, autocommit=True) as watcher,
    ):
        first.execute("select public.sync_register_table('public.projects')")
        late = pool.submit(second.execute, "select public.sync_register_table('public.notes')")
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        pid = second.info.backend_pid
        wait_until(lambda: watcher.execute(waits, (pid,)).fetchone() == (True,))
        first.commit()
        [told] = late.result(timeout=30).fetchone()
    assert told["registered"]


class OverHttp:
    """Asks the doctor's RPC through gateway and PostgREST with the key it is given."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def doctor(self) -> Row:
        reply = httpx.post(
            f"{self._url}/rest/v1/rpc/sync_doctor_v1",
            headers={"apikey": self._key, "Authorization": f"Bearer {self._key}"},
            json={"p": {}},
        )
        if reply.json().get("code") == "42501":
            raise NotAuthorized(f"Supabase answered {reply.status_code} (42501)")
        return reply.json()


def test_the_doctor_is_content_with_a_fresh_project(stack, tmp_path):
    settings = Settings(
        supabase_url=stack.url, supabase_secret_key=stack.secret_key, data_dir=tmp_path
    )
    remote = OverHttp(stack.url, stack.secret_key)
    report = examine(settings, tmp_path, SESSION_TABLES, remote=remote, environ={})
    assert [check for check in report.checks if not check.ok and check.severity == "error"] == []
    assert report.ok
    text = json.dumps(report.to_json())
    assert stack.secret_key not in text
    assert stack.secret_key.split(".")[2] not in text


def test_the_doctor_names_an_anon_key_in_the_secrets_place(stack, tmp_path):
    settings = Settings(supabase_url=stack.url, supabase_secret_key=stack.anon_key)
    remote = OverHttp(stack.url, stack.anon_key)
    report = examine(settings, tmp_path, SESSION_TABLES, remote=remote, environ={})
    failed = {check.name: check for check in report.checks if check.severity == "error"}
    assert set(failed) == {"server.key", "server.authorized"}
    assert "anon" in failed["server.key"].detail


def test_the_doctor_finds_a_table_that_nobody_registered(stack, tmp_path):
    execute(stack, blocks("sql")[0])
    settings = Settings(supabase_url=stack.url, supabase_secret_key=stack.secret_key)
    remote = OverHttp(stack.url, stack.secret_key)
    report = examine(settings, tmp_path, [*SESSION_TABLES, PROJECTS], remote=remote, environ={})
    [found] = [check for check in report.checks if check.severity == "error"]
    assert found.name == "spec.projects.registered"
    execute(stack, found.remedy)
    assert examine(settings, tmp_path, SESSION_TABLES, remote=remote, environ={}).ok
