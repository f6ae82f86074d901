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

from local_store import Column, Delete, Insert, Op, Update, user_uuid
from local_store.clock import ManualClock, new_id
from local_store.ops import Selection
from syncer import operators
from syncer.flusher import Flusher
from syncer.remote import TableRead
from syncer.replay import ReplayReport, replay
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.postgres import find_postgres

USER = "github:42"
TABLES = [replace(spec, policy="merge") for spec in SESSION_TABLES]
ANY_STATUS = {**TABLES[0].columns, "status": Column("text")}
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
    flusher = Flusher(app.store, app.remote, clock=clock, jitter=lambda: 0.0, selection=everything)
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


@pytest.mark.parametrize("columns", ["same", "other"])
def test_two_containers_replay_what_one_wrote_on_top_of_the_other(
    buffered_store, dump, user_columns, columns
):
    first, second = buffered_store(TABLES), buffered_store(TABLES)
    row_id = session(first, metadata={"n": 0})
    first.drain()
    backup = dump()
    update(first, row_id, metadata={"n": 1})
    first.drain()
    learn(second, row_id)
    update(
        second, row_id, **({"metadata": {"n": 2}} if columns == "same" else {"status": "abandoned"})
    )
    second.drain()
    before = user_columns()
    backup.restore()
    assert replayed(first).complete
    report = replayed(second)
    assert (report.complete, report.applied) == (True, 1)
    assert user_columns() == before
    balanced(first, second)


@pytest.mark.parametrize("first", [0, 1])
def test_one_value_written_in_turn_is_left_to_a_person_after_a_restore(
    buffered_store, dump, user_columns, first
):
    """Neither buffer knows that the other's writes lay between its own, so both sides are kept."""
    apps = [buffered_store(TABLES), buffered_store(TABLES)]
    row_id = session(apps[0])
    apps[0].drain()
    backup = dump()
    for n in range(1, 5):
        app = apps[n % 2]
        learn(app, row_id)
        update(app, row_id, finalized_at=f"2026-01-0{n}T00:00:00+00:00")
        app.drain()
    before = user_columns()
    backup.restore()
    reports = [replayed(app) for app in (apps[first], apps[1 - first])]
    assert [(report.conflict, report.remaining) for report in reports] == [(0, 0), (1, 0)]
    [record] = operators.conflicts(apps[0].remote)
    days = {side: record[side]["finalized_at"][:10] for side in ("mine", "theirs")}
    assert sorted(days.values()) == ["2026-01-03", "2026-01-04"]
    choice = max(days, key=days.__getitem__)
    results = operators.resolve(apps[0].remote, record["id"], choice)
    assert {result["verdict"] for result in results} == {"applied"}
    assert user_columns() == before
    for app in apps:
        app.store.recheck([entry.txn_id for entry in app.store.entries()])
        app.drain()
    balanced(*apps)


def test_what_was_parked_after_the_backup_is_handed_over_again(buffered_store, dump):
    app = buffered_store([replace(TABLES[0], columns=ANY_STATUS), *TABLES[1:]])
    session(app)
    app.drain()
    backup = dump()
    dead = write(app, Insert("sessions", {"status": "bogus"}))
    app.drain()
    backup.restore()
    assert operators.dead_letters(app.remote) == []
    report = replayed(app)
    assert (report.remaining, report.rejected) == (0, 0)  # it was known before
    [letter] = operators.dead_letters(app.remote)
    assert (letter["txn_id"], letter["state"]) == (dead, "dead")
    balanced(app)


# -- yesterday's copy of a buffer's folder --


def copy_closed(app: BufferedApp, target: Path) -> None:
    app.store.close()
    shutil.copytree(app.folder, target)
    app.restart()


def copy_open(app: BufferedApp, target: Path) -> None:
    """Through SQLite's own backup, while the container writes on."""
    target.mkdir()
    with (
        closing(sqlite3.connect(app.folder / "buffer.db")) as source,
        closing(sqlite3.connect(target / "buffer.db")) as copy,
    ):
        source.backup(copy)


@pytest.fixture
def opened(fresh_supabase: LocalSupabase) -> Iterator[Callable[[Path], BufferedApp]]:
    made: list[BufferedApp] = []

    def open_folder(folder: Path) -> BufferedApp:
        app = BufferedApp(folder, TABLES, fresh_supabase.url, fresh_supabase.secret_key)
        made.append(app)
        return app

    yield open_folder
    for app in made:
        app.close()


def ids_of(sql_url: str) -> set[str]:
    with psycopg.connect(sql_url) as sql:
        return {str(row_id) for (row_id,) in sql.execute("select id from sessions").fetchall()}


def parked(url: str) -> int:
    with psycopg.connect(url) as sql:
        found = sql.execute("select count(*) from sync.parked").fetchone()
        assert found is not None
        return int(found[0])


@pytest.mark.parametrize("copied", [copy_closed, copy_open])
def test_a_restored_copy_of_a_buffer_delivers_beside_its_original(
    buffered_store, opened, fresh_supabase, tmp_path, copied
):
    original = buffered_store(TABLES)
    rows = [session(original)]
    original.drain()
    rows += [session(original), session(original)]  # pending in the copy too
    update(original, rows[0], status="finalized")
    copied(original, tmp_path / "restored")
    rows.append(session(original))
    original.drain()
    restored = opened(tmp_path / "restored")
    assert restored.store.log_id != original.store.log_id
    rows += [session(restored), session(restored)]
    update(restored, rows[1], metadata={"from": "the copy"})
    report = restored.drain()
    assert (report.duplicate, report.applied, report.rejected, report.conflict) == (3, 3, 0, 0)
    rows.append(session(original))
    original.drain()
    assert ids_of(fresh_supabase.database_url) == set(rows)
    assert parked(fresh_supabase.database_url) == 0
    balanced(original, restored)


def test_an_older_file_put_back_in_place_starts_a_new_log_where_the_server_knows_its_positions(
    buffered_store, fresh_supabase, tmp_path
):
    app = buffered_store(TABLES)
    rows = [session(app)]
    app.drain()
    app.store.close()
    yesterday = (app.folder / "buffer.db").read_bytes()
    app.restart()
    rows += [session(app), session(app)]
    app.drain()
    app.store.close()
    inode = os.stat(app.folder / "buffer.db").st_ino
    with (app.folder / "buffer.db").open("r+b") as file:
        file.write(yesterday)
        file.truncate()
    # With the mark beside it the buffer sees by itself that its end is missing.
    for name in ("buffer.db-wal", "buffer.db-shm", "acknowledged"):
        (app.folder / name).unlink(missing_ok=True)
    app.restart()
    assert os.stat(app.folder / "buffer.db").st_ino == inode
    log_id = app.store.log_id
    rows += [session(app), session(app), session(app)]  # the first two take known positions
    update(app, rows[0], status="finalized")
    report = app.drain()
    assert (report.applied, report.conflict, report.pending) == (4, 0, 0)
    assert app.store.log_id != log_id
    assert ids_of(fresh_supabase.database_url) == set(rows)
    assert parked(fresh_supabase.database_url) == 0
    balanced(app)
