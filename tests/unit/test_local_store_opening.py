"""The buffer's edges: its limits, its file, opening and closing."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest

from local_store import (
    BufferFull,
    Column,
    Insert,
    LocalStore,
    SchemaTooNew,
    StoreClosed,
    TableSpec,
)
from local_store.clock import ManualClock, new_id
from local_store.limits import StoreLimits
from local_store.ops import Chains, Selection
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as opened:
        yield opened


def raw(folder: Path, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(folder / "buffer.db")) as connection, connection:
        return connection.execute(sql).fetchall()


def test_at_the_limit_of_transactions_the_buffer_is_full_until_some_settle(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, buffer_transactions_max=2) as store:
        txn_id, ops = new_id(), [Insert("notes", {"id": new_id()})]
        first = store.write(ops, user_id=USER, txn_id=txn_id)
        kept = add(store)
        with pytest.raises(BufferFull, match="buffer_transactions_max = 2") as caught:
            add(store)
        assert caught.value.retry_after_s == 5.0
        assert store.write(ops, user_id=USER, txn_id=txn_id) == first  # no new transaction
        assert store.get("notes", kept, user_id=USER) is not None
        settle_all(store)
        add(store)


def test_at_the_limit_of_bytes_the_buffer_is_full_until_some_settle(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, buffer_bytes_max=5_000) as store:
        add(store, text="x" * 4_000)
        with pytest.raises(BufferFull, match="buffer_bytes_max = 5000"):
            add(store, text="x" * 2_000)
        add(store, text="small")
        settle_all(store)
        assert store.stats()["bytes"] == 0
        add(store, text="x" * 2_000)


def test_statistics_tell_the_backlog_and_its_age(store: LocalStore, clock: ManualClock):
    assert store.stats() == {
        "log_id": store.log_id,
        "last_seq": 0,
        "pending": 0,
        "parked": 0,
        "bytes": 0,
        "oldest_age_s": None,
    }
    add(store)
    clock.advance(30)
    add(store)
    stats = store.stats()
    assert (stats["last_seq"], stats["pending"], stats["oldest_age_s"]) == (2, 2, 30.0)
    assert stats["bytes"] == sum(txn.size_bytes for txn in waiting(store)) > 0
    clock.set_wall(clock.now().replace(year=2025))  # stepped back: no negative age
    assert store.stats()["oldest_age_s"] == 0.0


def test_files_are_private_whatever_the_umask(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    with LocalStore.open(folder, tables=TABLES) as store:
        add(store)
        assert folder.stat().st_mode & 0o777 == 0o700
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes) >= {"buffer.db", "buffer.db-wal", "buffer.db-shm", "buffer.lock"}
    assert set(modes.values()) == {0o600}


def test_a_closed_store_refuses_everything_and_closing_twice_is_harmless(store: LocalStore):
    row_id = add(store)
    store.close()
    store.close()
    for call in (
        lambda: add(store),
        lambda: store.get("notes", row_id, user_id=USER),
        lambda: waiting(store),
        lambda: store.record([]),
        lambda: store.chains([("notes", row_id)], user_id=USER),
        lambda: store.rebase(Chains(0, ()), [], {}),
        lambda: store.start_new_log(),
        lambda: store.reopen(Selection()),
        lambda: store.count(),
        lambda: store.logs(),
        lambda: store.recheck([]),
        lambda: store.flushing().__enter__(),
    ):
        with pytest.raises(StoreClosed):
            call()


def test_a_file_of_newer_code_is_refused_and_left_alone(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    (table,) = raw(tmp_path, "SELECT name FROM sqlite_master WHERE name LIKE '%migrations'")[0]
    raw(
        tmp_path,
        f"INSERT INTO {table} (migration_set, name, applied_at)"
        " VALUES ('local_store', 'm999_from_the_future', '2030-01-01')",
    )
    before = (tmp_path / "buffer.db").read_bytes()
    with pytest.raises(SchemaTooNew, match="m999_from_the_future") as caught:
        LocalStore.open(tmp_path, tables=TABLES)
    assert caught.value.known == "create_buffer"
    assert (tmp_path / "buffer.db").read_bytes() == before


def test_a_table_that_is_no_longer_registered_is_still_delivered(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store, "comments", note_id=add(store))
    with LocalStore.open(tmp_path, tables=TABLES[:1]) as store:
        assert [txn.ops[0].table for txn in waiting(store)] == ["notes", "comments"]
        settle_all(store)
        assert store.stats()["pending"] == 0


def test_specs_that_contradict_each_other_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="share a name"):
        LocalStore.open(tmp_path, tables=[TABLES[0], TABLES[0]])
    orphan = TableSpec("orphans", {"id": Column("uuid")}, parent=("p", "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        LocalStore.open(tmp_path, tables=[orphan])
    with pytest.raises(TypeError, match="no_such_limit"):
        LocalStore.open(tmp_path, tables=TABLES, no_such_limit=1)


def test_a_write_waits_for_another_program_that_holds_the_file(store: LocalStore, tmp_path: Path):
    path = tmp_path / "buffer.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE logs SET log_id = log_id")
        release = threading.Timer(0.2, other.execute, ("COMMIT",))
        release.start()
        add(store)
        release.join()
    assert store.stats()["last_seq"] == 1


def test_the_example_of_the_document_runs_as_it_stands(tmp_path: Path, monkeypatch, capsys):
    document = Path(__file__).parents[2] / "docs" / "LOCAL_STORE.md"
    (example,) = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(document), "exec"), {})
    assert capsys.readouterr().out == "host 2\n"


def test_every_limit_stands_in_the_document():
    document = (Path(__file__).parents[2] / "docs" / "LOCAL_STORE.md").read_text()
    missing = [f.name for f in fields(StoreLimits) if f"`{f.name}`" not in document]
    assert missing == ["full_retry_after_s"]  # it is what BufferFull says
