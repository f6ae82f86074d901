"""Backups that come back: Postgres from an older dump, a buffer's folder from yesterday's copy."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Delete, Insert, LocalStore, Op, Update, user_uuid
from local_store.clock import ManualClock, new_id
from local_store.ops import Selection
from syncer.audit import audit
from syncer.flusher import Flusher
from syncer.remote import TableRead
from syncer.replay import ReplayReport, replay
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.postgres import find_postgres

USER = "github:42"
TABLES = [replace(spec, policy="merge") for spec in SESSION_TABLES]
SERVERS = ("created_at", "updated_at")

Make = Callable[..., BufferedApp]


def write(app: BufferedApp, *ops: Op) -> str:
    return app.store.write(ops, user_id=USER).txn_id


def session(app: BufferedApp, **values: Any) -> str:
    row_id = new_id()
    write(app, Insert("sessions", {"id": row_id, **values}))
    return row_id


def update(app: BufferedApp, row_id: str, **values: Any) -> str:
    return write(app, Update("sessions", row_id, values))


def learn(app: BufferedApp, row_id: str) -> None:
    """Read through: take the server's row into the local copy."""
    as_of, where = app.store.change_counter(), {"id": row_id}
    [rows] = app.remote.read(user_uuid(USER), [TableRead("sessions", where)])
    app.store.refresh("sessions", rows, user_id=USER, as_of=as_of, where=where)


def replayed(app: BufferedApp, *, settled: bool = True) -> ReplayReport:
    clock, everything = ManualClock(), Selection()
    flusher = Flusher(
        app.store, app.remote, clock=clock, jitter=lambda: 0.0, selection=everything
    )
    return replay(app.store, flusher, everything, clock, settled=settled)


# -- Postgres restored from an older dump --


class Dump:
    """What pg_dump took of a stack; `restore` puts exactly that back."""

    def __init__(self, stack: LocalSupabase, file: Path) -> None:
        self._stack = stack
        self._file = file
        self._run("pg_dump", "--format=custom", "--data-only", f"--file={file}")

    def restore(self) -> None:
        with psycopg.connect(self._stack.database_url, autocommit=True) as sql:
            found = sql.execute(
                "select format('%I.%I', schemaname, tablename) from pg_tables"
                " where schemaname in ('public', 'sync')"
            ).fetchall()
            sql.execute(f"truncate {', '.join(name for (name,) in found)} cascade")
        self._run("pg_restore", "--data-only", "--disable-triggers", str(self._file))

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(find_postgres() / program), *arguments, "--schema=public", "--schema=sync"]
        command += [f"--dbname={self._stack.database_url}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def dump(fresh_supabase: LocalSupabase, tmp_path: Path) -> Callable[[], Dump]:
    return lambda: Dump(fresh_supabase, tmp_path / f"{new_id()}.dump")


@pytest.fixture
def user_columns(fresh_supabase: LocalSupabase) -> Iterator[Callable[[], dict[str, Any]]]:
    """Everything users wrote, by table and id, without what the server stamps."""
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as sql:

        def read() -> dict[str, Any]:
            rows = {}
            for spec in TABLES:
                query = f"select to_jsonb(t) from {spec.name} t"
                for (row,) in sql.execute(query).fetchall():
                    kept = {name: value for name, value in row.items() if name not in SERVERS}
                    rows[f"{spec.name}/{row['id']}"] = kept
            return rows

        yield read


def revision(row_id: str, content: str) -> Insert:
    values = {"session_id": row_id, "content": content, "revision_type": "manual_edit"}
    return Insert("session_revisions", {"id": new_id(), **values})


def balanced(*apps: BufferedApp) -> None:
    for app in apps:
        report = app.audit()
        assert report.balanced, report.total
        assert (report.total.pending, report.total.held) == (0, 0)


def test_one_container_replays_what_a_restored_server_forgot(buffered_store, dump, user_columns):
    app = buffered_store(TABLES)
    kept, gone = session(app, metadata={"n": 0}), session(app)
    app.drain()
    backup = dump()
    update(app, kept, metadata={"n": 1})
    update(app, kept, metadata={"n": 2}, status="finalized")
    write(app, revision(kept, "after the backup"))
    later = session(app)
    write(app, Delete("sessions", gone))
    app.drain()
    update(app, later, status="abandoned")
    app.drain()
    before = user_columns()
    backup.restore()
    assert not app.audit().balanced
    report = replayed(app)
    assert (report.complete, report.remaining, report.duplicate) == (True, 0, 2)
    assert user_columns() == before
    balanced(app)
    assert replayed(app).applied == 0  # all of it is known by now


@pytest.mark.parametrize("first", [0, 1], ids=["writer first", "reader first"])
def test_two_containers_that_wrote_the_same_rows_in_turn_replay_to_the_same_rows(
    buffered_store, dump, user_columns, first
):
    apps = [buffered_store(TABLES), buffered_store(TABLES)]
    row_id = session(apps[0], metadata={"n": 0})
    apps[0].drain()
    backup = dump()
    for n in range(1, 5):
        app = apps[n % 2]
        learn(app, row_id)
        update(app, row_id, metadata={"n": n})
        app.drain()
    before = user_columns()
    backup.restore()
    order = [apps[first], apps[1 - first]]
    print([replayed(app) for app in order])
    print([replayed(app, settled=False) for app in order])
    print(user_columns(), before)
    assert user_columns() == before
    balanced(*apps)
