"""Power loss: what was acknowledged must be on the disk, whatever the cache still held.

A run of real writes is recorded below SQLite, then the power is cut at seeded moments of it and the
store opened on what the disk may hold. `POWER_LOSS_IMAGES=20000` looks longer, `POWER_LOSS_SEED`
looks elsewhere.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from local_store import CommitUnknown, Delete, DiskFailed, Insert, LocalStore, Outcome, Row, Update
from local_store.clock import new_id
from syncer.testkit.disk_faults import DiskFaults, DiskRecorder
from tests.unit.buffer_tables import TABLES, USER, add, waiting

IMAGES = int(os.environ.get("POWER_LOSS_IMAGES", "200"))
SEED = int(os.environ.get("POWER_LOSS_SEED", "1"))
STEPS = 300

Rows = dict[str, dict[str, Row]]


@dataclass
class Run:
    """What a recorded run did, as its caller knows it."""

    disk: DiskRecorder
    txn_ids: list[str] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=dict)  # mark → how many transactions
    settled: dict[str, set[str]] = field(default_factory=dict)  # mark → txn_ids known as applied
    rows: list[Rows] = field(default_factory=list)  # after each transaction, beginning with none


def record_run(folder: Path, synchronous: str | None = None, steps: int = STEPS) -> Run:
    dice = Random(f"{SEED}/run")
    with DiskRecorder(folder) as disk:
        run = Run(disk, rows=[{spec.name: {} for spec in TABLES}])
        store = open_store(folder, synchronous)
        for step in range(steps):
            if step % 110 == 100:  # a restart: the last connection checkpoints and drops the log
                store.close()
                store = open_store(folder, synchronous)
            if step % 60 == 50:
                truncate_log(store)
            if step % 25 == 20:
                settle(store, run, dice)
            write(store, run, dice)
        store.close()
    return run


def open_store(folder: Path, synchronous: str | None) -> LocalStore:
    """Open as any caller does; `synchronous` then weakens what the store chose for itself."""
    store = LocalStore.open(folder, tables=TABLES)
    if synchronous is not None:
        connection(store).execute(f"PRAGMA synchronous = {synchronous}")
    return store


def connection(store: LocalStore) -> sqlite3.Connection:
    """Reach past the door: these are settings no caller can make."""
    assert store._file._connection is not None
    return store._file._connection


def truncate_log(store: LocalStore) -> None:
    connection(store).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def write(store: LocalStore, run: Run, dice: Random) -> None:
    rows = copy.deepcopy(run.rows[-1])
    ops = [random_op(rows, dice) for _ in range(dice.choice((1, 1, 1, 2, 5)))]
    receipt = store.write(ops, user_id=USER)
    run.txn_ids.append(receipt.txn_id)
    run.rows.append(rows)
    mark = f"acknowledged {receipt.seq}"
    run.disk.mark(mark)
    run.acknowledged[mark] = receipt.seq


def random_op(rows: Rows, dice: Random) -> Insert | Update | Delete:
    """Choose an op that the store will accept, and apply it to `rows`."""
    table = dice.choice(("notes", "notes", "comments", "replies"))
    kind = dice.choice(("insert", "insert", "update", "update", "delete"))
    text = "x" * dice.choice((3, 30, 300, 9_000))
    parent = {"comments": ("note_id", "notes"), "replies": ("comment_id", "comments")}.get(table)
    if kind != "insert" and rows[table]:
        row_id = dice.choice(sorted(rows[table]))
        if kind == "update":
            rows[table][row_id]["text"] = text
            return Update(table, row_id, {"text": text})
        drop(rows, table, row_id)
        return Delete(table, row_id)
    values: Row = {"text": text}
    if parent is not None:
        if not rows[parent[1]]:
            return random_op(rows, dice)
        values[parent[0]] = dice.choice(sorted(rows[parent[1]]))
    row_id = new_id()
    rows[table][row_id] = dict(values)
    return Insert(table, {"id": row_id, **values})


def drop(rows: Rows, table: str, row_id: str) -> None:
    del rows[table][row_id]
    for spec in TABLES:
        if spec.parent is not None and spec.parent[1] == table:
            for child, values in list(rows[spec.name].items()):
                if values[spec.parent[0]] == row_id:
                    drop(rows, spec.name, child)


def settle(store: LocalStore, run: Run, dice: Random) -> None:
    known = set().union(*run.settled.values()) if run.settled else set()
    chosen = waiting(store)[: dice.randrange(1, 40)]
    store.record([Outcome(txn.txn_id, "applied", {}) for txn in chosen])
    mark = f"recorded {len(run.settled)}"
    run.disk.mark(mark)
    run.settled[mark] = known | {txn.txn_id for txn in chosen}


def complaints(run: Run, folder: Path, at: int) -> list[str]:
    """Judge what is left in `folder` after the power was lost at event `at`."""
    marks = run.disk.marks(at)
    promised = max((run.acknowledged.get(mark, 0) for mark in marks), default=0)
    # A reply is recorded without a sync of its own: the next acknowledged write brings it along.
    last = max((place for place, mark in enumerate(marks) if mark in run.acknowledged), default=0)
    settled = set().union(*(run.settled.get(mark, set()) for mark in marks[:last]))
    with LocalStore.open(folder, tables=TABLES) as store:
        logs = store.logs()  # an image is another file: it starts a log of its own
        entries = store.entries(log_id=logs[0]["log_id"])
        found = len(entries)
        wrong: list[str] = []
        if found < promised:
            wrong.append(f"lost: {promised} acknowledged, {found} found")
        if [entry.seq for entry in entries] != list(range(1, found + 1)):
            wrong.append("seq isn't gap-free")
        if [entry.txn_id for entry in entries] != run.txn_ids[:found]:
            wrong.append("other transactions than were written")
        if any(store.state(txn_id) is None for txn_id in run.txn_ids[:promised]):
            wrong.append("lost: an acknowledged transaction has no state")
        reopened = {entry.txn_id for entry in entries if entry.state != "applied"} & settled
        if reopened and found >= promised:
            wrong.append(f"lost: {len(reopened)} recorded replies")
        if shown(store) != run.rows[min(found, len(run.rows) - 1)]:
            wrong.append(f"rows don't agree with the first {found} transactions")
        if (logs[0]["last_seq"], store.stats()["pending"]) != (found, len(waiting(store))):
            wrong.append(f"the totals {logs} don't agree with the log")
        if connection(store).execute("PRAGMA integrity_check").fetchone() != ("ok",):
            wrong.append("the database is damaged")
        add(store)
        if (found, store.stats()["last_seq"]) not in (
            (0, 1),
            (found, 1 if logs[1:] else found + 1),
        ):
            wrong.append("the next write has the wrong seq")
    return wrong


def shown(store: LocalStore) -> Rows:
    found: Rows = {}
    for spec in TABLES:
        columns = ("text", spec.parent[0]) if spec.parent else ("text",)
        found[spec.name] = {
            row["id"]: {column: row[column] for column in columns}
            for row in store.select(spec.name, user_id=USER, limit=100_000)
        }
    return found


def losses(run: Run, images: int, folder: Path) -> list[str]:
    """Cut the power at seeded moments; what each image does wrong, with how to see it again."""
    dice = Random(f"{SEED}/images")
    found: list[str] = []
    for _ in range(images):
        at, seed = dice.randrange(1, len(run.disk.events) + 1), dice.randrange(2**32)
        style = run.disk.power_loss_image(at, seed, folder)
        wrong = complaints(run, folder, at)
        found += [f"POWER_LOSS_SEED={SEED} at={at} seed={seed} style={style}: {w}" for w in wrong]
        shutil.rmtree(folder)
    return found


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record_run(tmp_path_factory.mktemp("normal"), synchronous="NORMAL")


def test_power_loss_keeps_every_acknowledged_transaction(full: Run, tmp_path: Path):
    assert len(full.txn_ids) == STEPS
    assert full.disk.syncs(".db") > 5  # checkpoints happened on the way
    assert losses(full, IMAGES, tmp_path / "image") == []


def test_without_full_synchronous_power_loss_loses_acknowledged_transactions(
    normal: Run, tmp_path: Path
):
    found = losses(normal, 60, tmp_path / "image")
    assert sum("lost:" in complaint for complaint in found) > 10


def unsynced_acknowledgements(run: Run) -> int:
    return sum(
        run.disk.unsynced_writes(run.disk.events_before(mark), "-wal") > 0
        for mark in run.acknowledged
    )


def test_every_acknowledgement_is_preceded_by_a_sync_of_the_log(full: Run, normal: Run):
    assert unsynced_acknowledgements(full) == 0
    assert full.disk.syncs("-wal") >= len(full.acknowledged)
    assert unsynced_acknowledgements(normal) > STEPS / 2
    assert normal.disk.syncs("-wal") < len(normal.acknowledged)


def test_each_kind_of_image_is_built_and_one_seed_gives_one_image(full: Run, tmp_path: Path):
    at = len(full.disk.events) // 2
    styles = {full.disk.power_loss_image(at, seed, tmp_path / str(seed)) for seed in range(40)}
    assert styles == {"lost", "kept", "writes", "sectors"}
    full.disk.power_loss_image(at, 7, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "7")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_process_killed_before_the_sync_leaves_nothing_that_a_repeat_takes_for_durable(
    tmp_path: Path,
):
    """A written but unsynced log is found by the next process; power can still take it."""
    folder, txn_id = tmp_path / "buffer", new_id()
    ops = [Insert("notes", {"id": new_id(), "text": "repeated"})]
    with LocalStore.open(folder, tables=TABLES) as store:
        add(store)
    pid = os.fork()
    if pid == 0:
        with DiskFaults(folder) as faults, LocalStore.open(folder, tables=TABLES) as store:
            add(store)  # starts the log: its header is synced by itself
            faults.kill_at("before sync", "-wal")
            store.write(ops, user_id=USER, txn_id=txn_id)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    with DiskRecorder(folder, unsynced=["-wal"]) as disk:
        with LocalStore.open(folder, tables=TABLES) as store:
            assert store.state(txn_id) == "pending"  # so the repeat writes nothing
            store.write(ops, user_id=USER, txn_id=txn_id)
            disk.mark("acknowledged")
    for seed in range(12):
        disk.power_loss_image(disk.events_before("acknowledged"), seed, tmp_path / str(seed))
        with LocalStore.open(tmp_path / str(seed), tables=TABLES) as store:
            assert store.state(txn_id) == "pending", f"seed {seed}"


@pytest.mark.parametrize("failures", range(1, 7))
def test_a_repeat_after_failed_syncs_is_durable_once_acknowledged(tmp_path: Path, failures: int):
    folder, txn_id = tmp_path / "buffer", new_id()
    ops = [Insert("notes", {"id": new_id(), "text": "repeated"})]
    with DiskRecorder(folder) as disk, DiskFaults(folder) as faults:
        with LocalStore.open(folder, tables=TABLES) as store:
            faults.fail_sync(times=failures)
            for _ in range(failures + 1):
                try:
                    store.write(ops, user_id=USER, txn_id=txn_id)
                    break
                except (CommitUnknown, DiskFailed):
                    continue
            disk.mark("acknowledged")
    for seed in range(12):
        disk.power_loss_image(disk.events_before("acknowledged"), seed, tmp_path / str(seed))
        with LocalStore.open(tmp_path / str(seed), tables=TABLES) as store:
            assert store.state(txn_id) == "pending", f"seed {seed}"


def test_the_model_keeps_what_was_synced_and_only_that_for_sure(tmp_path: Path):
    """What SQLite documents about its own rollback journal is what the images show."""
    lost = {}
    for synchronous in ("OFF", "FULL", "EXTRA"):
        folder = tmp_path / synchronous
        folder.mkdir()
        with DiskRecorder(folder) as disk, closing(sqlite3.connect(folder / "a.db")) as plain:
            plain.isolation_level = None
            plain.execute(f"PRAGMA synchronous = {synchronous}")
            plain.execute("CREATE TABLE t (x)")
            for n in range(20):
                plain.execute("INSERT INTO t VALUES (?)", (n,))
        counts = [count_rows(disk, seed, tmp_path / f"{synchronous}-{seed}") for seed in range(40)]
        lost[synchronous] = {20 - count for count in counts}
    assert max(lost["OFF"]) == 20
    assert lost["FULL"] == {0, 1}  # the last journal's delete may be undone: FULL isn't EXTRA
    assert lost["EXTRA"] == {0}


def count_rows(disk: DiskRecorder, seed: int, folder: Path) -> int:
    disk.power_loss_image(len(disk.events), seed, folder)
    with closing(sqlite3.connect(folder / "a.db")) as plain:
        try:
            return int(plain.execute("SELECT count(*) FROM t").fetchone()[0])
        except sqlite3.DatabaseError:
            return 0
