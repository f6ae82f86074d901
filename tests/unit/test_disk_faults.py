"""The disk's faults, each proven to happen, and the store under them."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from local_store import (
    BufferFull,
    CommitUnknown,
    DiskFailed,
    Insert,
    LocalStore,
    LocalStoreError,
    Outcome,
)
from local_store.clock import ManualClock, new_id
from syncer.testkit.disk_faults import DiskCall, DiskFaults, DiskRecorder, flip_bits
from syncer.testkit.sqlite_vfs import watching
from tests.unit.buffer_tables import TABLES, USER, add, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def disk(tmp_path: Path, clock: ManualClock) -> Iterator[DiskFaults]:
    with DiskFaults(tmp_path, clock=clock) as faults:
        yield faults


@pytest.fixture
def store(tmp_path: Path, disk: DiskFaults) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES) as opened:
        yield opened


def database(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "plain.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
    return connection


def exit_status(child: Callable[[], object]) -> int:
    """Run `child` in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- each injector happens, to whom it should, when it should ------------------------------------


def test_each_commit_is_counted_as_one_sync_of_the_log(tmp_path: Path, disk: DiskFaults):
    with closing(database(tmp_path)) as connection:
        before = disk.count("sync", "-wal")
        for n in range(5):
            connection.execute("INSERT INTO t VALUES (?)", (n,))
        assert disk.count("sync", "-wal") == before + 5
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("INSERT INTO t VALUES (5)")
        assert disk.count("sync", "-wal") == before + 5
        assert disk.count("write", "-wal") > 5


def test_the_nth_sync_fails_once_with_the_given_code(tmp_path: Path, disk: DiskFaults):
    with closing(database(tmp_path)) as connection:
        rule = disk.fail_sync("-wal", nth=2)
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("INSERT INTO t VALUES (2)")
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_IOERR_FSYNC
        connection.execute("INSERT INTO t VALUES (3)")
        assert (rule.met, rule.fired) == (3, 1)


def test_the_nth_write_fails_with_the_given_code(tmp_path: Path, disk: DiskFaults):
    with closing(database(tmp_path)) as connection:
        rule = disk.fail_write("-wal", nth=3, times=None)
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(9)])
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_IOERR_WRITE
        rule.release()
        connection.execute("INSERT INTO t VALUES (1)")


def test_an_open_fails_with_the_given_code(tmp_path: Path, disk: DiskFaults):
    disk.fail_open("plain.db")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        database(tmp_path).close()
    database(tmp_path).close()


def test_a_full_disk_refuses_until_space_returns(tmp_path: Path, disk: DiskFaults):
    with closing(database(tmp_path)) as connection:
        with disk.full():
            for _ in range(3):
                with pytest.raises(sqlite3.OperationalError, match="full"):
                    connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO t VALUES (1)")
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_a_full_disk_may_still_allow_overwriting(tmp_path: Path, disk: DiskFaults):
    with closing(database(tmp_path)) as connection:
        connection.execute("INSERT INTO t VALUES (zeroblob(40000))")
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # the log starts over in its old bytes
        with disk.full(overwrites_pass=True):
            connection.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(sqlite3.OperationalError, match="full"):
                connection.execute("INSERT INTO t VALUES (zeroblob(400000))")
        with disk.full(), pytest.raises(sqlite3.OperationalError, match="full"):
            connection.execute("INSERT INTO t VALUES (1)")


def test_a_slow_sync_takes_its_time_from_the_clock(
    tmp_path: Path, disk: DiskFaults, clock: ManualClock
):
    with closing(database(tmp_path)) as connection:
        disk.slow_sync(0.5, "-wal", times=2)
        for n in range(3):
            connection.execute("INSERT INTO t VALUES (?)", (n,))
    assert clock.monotonic() == 1.0


@pytest.mark.parametrize(
    ("step", "survives"),
    [("before write", False), ("after write", False), ("before sync", True), ("after sync", True)],
)
def test_a_process_dies_at_the_named_step(tmp_path: Path, step, survives: bool):
    def child() -> None:
        with DiskFaults(tmp_path) as faults:
            connection = database(tmp_path)
            faults.kill_at(step, "-wal")
            connection.execute("INSERT INTO t VALUES (1)")

    assert exit_status(child) == -signal.SIGKILL
    with closing(database(tmp_path)) as connection:  # the kernel keeps what was written
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (int(survives),)


def test_other_folders_and_older_connections_are_untouched(tmp_path: Path):
    (tmp_path / "watched").mkdir()
    with closing(database(tmp_path)) as older:
        with DiskFaults(tmp_path / "watched") as faults:
            rules = [faults.fail_sync(times=None), faults.fail_write(times=None)]
            older.execute("INSERT INTO t VALUES (1)")
            with closing(database(tmp_path)) as elsewhere:
                elsewhere.execute("INSERT INTO t VALUES (2)")
            assert [rule.met for rule in rules] == [0, 0]


def test_a_connection_outlives_the_watching(tmp_path: Path):
    with DiskFaults(tmp_path) as faults:
        faults.fail_sync("-wal", nth=100)
        connection = database(tmp_path)
        counted = faults.count("write")
    with closing(connection):
        connection.execute("INSERT INTO t VALUES (1)")
    assert faults.count("write") == counted


def test_a_failing_observer_is_an_io_error_and_is_raised_at_the_end(tmp_path: Path):
    class Broken:
        def before(self, call: DiskCall) -> int:
            if call.kind == "sync":
                raise KeyError("mistake")
            return 0

        def after(self, call: DiskCall, code: int) -> None:
            pass

    with pytest.raises(RuntimeError, match="observer failed") as caught:
        with watching(Broken()), pytest.raises(sqlite3.OperationalError):
            database(tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


def test_two_observers_see_the_same_disk(tmp_path: Path, disk: DiskFaults):
    with DiskRecorder(tmp_path) as recorder, closing(database(tmp_path)) as connection:
        start, failed = disk.count("sync", "-wal"), recorder.syncs("-wal")
        disk.fail_sync("-wal")
        with pytest.raises(sqlite3.OperationalError):
            connection.execute("INSERT INTO t VALUES (1)")
        assert recorder.unsynced_writes(len(recorder.events), "-wal") > 0  # a failed sync is none
        connection.execute("INSERT INTO t VALUES (1)")
        assert recorder.unsynced_writes(len(recorder.events), "-wal") == 0
        assert disk.count("sync", "-wal") - start == recorder.syncs("-wal") - failed == 1


def test_flipped_bits_are_as_many_as_asked_and_the_same_for_one_seed(tmp_path: Path):
    path = tmp_path / "bytes"
    content = bytes(range(256)) * 4
    path.write_bytes(content)
    positions = flip_bits(path, seed=3, count=5)
    changed = path.read_bytes()
    difference = int.from_bytes(content) ^ int.from_bytes(changed)
    assert difference.bit_count() == len(set(positions)) == 5
    assert flip_bits(path, seed=3, count=5) == positions
    assert path.read_bytes() == content  # flipped back


# -- the store under them -------------------------------------------------------------------------


def test_a_full_disk_is_buffer_full_and_nothing_is_half_done(store: LocalStore, disk: DiskFaults):
    kept = add(store, text="kept")
    refused = new_id()
    with disk.full():
        for _ in range(3):
            with pytest.raises(BufferFull, match="disk is full") as caught:
                add(store, id=refused, text="refused")
            assert caught.value.retry_after_s > 0
        assert store.get("notes", kept, user_id=USER)["text"] == "kept"  # reads go on
        assert store.get("notes", refused, user_id=USER) is None
        assert store.stats()["pending"] == 1
    add(store, id=refused, text="space again")  # on the same handle
    assert [txn.seq for txn in waiting(store)] == [1, 2]


def test_a_full_disk_refuses_a_record_and_it_can_be_repeated(store: LocalStore, disk: DiskFaults):
    row_id = add(store)
    (txn,) = waiting(store)
    outcome = Outcome(txn.txn_id, "applied", {f"notes/{row_id}": "v1"})
    with disk.full(), pytest.raises(BufferFull):
        store.record([outcome])
    assert store.state(txn.txn_id) == "pending"
    store.record([outcome])
    assert store.state(txn.txn_id) == "applied"


def test_a_full_disk_at_the_first_start_leaves_a_folder_that_opens_later(
    tmp_path: Path, disk: DiskFaults
):
    with disk.full(), pytest.raises(BufferFull):
        LocalStore.open(tmp_path, tables=TABLES)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        assert store.stats()["last_seq"] == 1


@pytest.mark.parametrize("fault", ["sync", "write"])
def test_a_failed_commit_is_unknown_and_the_file_is_opened_afresh(
    store: LocalStore, disk: DiskFaults, fault: str
):
    add(store)
    ops, txn_id = [Insert("notes", {"id": new_id(), "text": "once"})], new_id()
    opened = disk.count("open", ".db")
    rule = disk.fail_sync("-wal") if fault == "sync" else disk.fail_write("-wal", nth=2)
    with pytest.raises(CommitUnknown) as caught:
        store.write(ops, user_id=USER, txn_id=txn_id)
    assert (caught.value.txn_id, rule.fired) == (txn_id, 1)
    assert store.stats()["last_seq"] in (1, 2)
    assert disk.count("open", ".db") == opened + 2  # the handles that failed aren't asked again
    store.write([Insert("notes", {"text": "another"})], user_id=USER)
    store.write(ops, user_id=USER, txn_id=txn_id)
    assert [txn.seq for txn in waiting(store)] == [1, 2, 3]
    assert [txn.txn_id for txn in waiting(store)].count(txn_id) == 1


@pytest.mark.parametrize("nth", range(1, 5))
def test_repeating_the_txn_id_after_a_failed_sync_gives_exactly_one_transaction(
    tmp_path: Path, nth: int
):
    row_id, txn_id = new_id(), new_id()
    ops = [Insert("notes", {"id": row_id, "text": "once"})]
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        disk.fail_sync("-wal", times=nth)  # the closing checkpoint and the reopening meet it too
        for _ in range(6):
            try:
                receipt = store.write(ops, user_id=USER, txn_id=txn_id)
                break
            except (CommitUnknown, DiskFailed):
                continue
        else:
            pytest.fail("the store never came back")
        assert receipt == store.write(ops, user_id=USER, txn_id=txn_id)
        assert [txn.txn_id for txn in waiting(store)] == [txn_id]
        assert store.get("notes", row_id, user_id=USER)["_version"] == 1


def test_a_disk_that_stays_broken_refuses_and_recovers_without_a_restart(
    store: LocalStore, disk: DiskFaults
):
    add(store)
    with disk.full(".db"):  # not used by commits; shows that only the log matters here
        add(store)
    broken = [disk.fail_sync(times=None), disk.fail_write(times=None)]
    for _ in range(4):
        with pytest.raises((CommitUnknown, DiskFailed)):
            add(store)
    for rule in broken:
        rule.release()
    add(store)
    assert [txn.seq for txn in waiting(store)] == [1, 2, 3]


def test_a_disk_that_turns_read_only_refuses_writes_answers_reads_and_recovers(
    store: LocalStore, disk: DiskFaults
):
    row_id = add(store, text="kept")
    rules = [
        disk.fail_write(suffix, times=None, code=sqlite3.SQLITE_READONLY)
        for suffix in ("-wal", ".db")
    ]
    for _ in range(3):
        with pytest.raises((CommitUnknown, DiskFailed)):
            add(store)
        assert store.get("notes", row_id, user_id=USER)["text"] == "kept"
    assert rules[0].fired
    for rule in rules:
        rule.release()
    add(store)
    assert [txn.seq for txn in waiting(store)] == [1, 2]


def test_a_descriptor_shortage_while_reopening_is_a_clean_error(
    store: LocalStore, disk: DiskFaults
):
    add(store)
    disk.fail_sync("-wal")
    with pytest.raises(CommitUnknown):
        add(store)
    disk.fail_open(".db", times=2)
    with pytest.raises(DiskFailed, match=r"buffer\.db: unable to open"):
        add(store)
    with pytest.raises(DiskFailed):
        store.stats()
    add(store)
    assert store.stats()["last_seq"] == 2


def test_a_checkpoint_that_fails_refuses_nobody(store: LocalStore, disk: DiskFaults):
    rule = disk.fail_write(".db", times=None)
    for n in range(80):
        add(store, text=f"{n} " + "x" * 60_000)  # 15 pages each: past the checkpoint's threshold
    assert rule.fired > 0
    rule.release()
    assert store.stats()["last_seq"] == 80


@pytest.mark.parametrize("existing", [False, True])
def test_a_read_only_folder_is_a_clear_error_with_its_path(tmp_path: Path, existing: bool):
    folder = tmp_path / "buffer"
    if existing:
        with LocalStore.open(folder, tables=TABLES) as store:
            add(store)
        for path in folder.iterdir():
            path.chmod(0o444)
    else:
        folder.mkdir()
    folder.chmod(0o555)

    def child() -> None:
        if os.geteuid() == 0:  # the superuser may write anywhere
            for parent in (tmp_path, *tmp_path.parents[:3]):
                os.chmod(parent, 0o755)
            os.setuid(65534)
        with pytest.raises((OSError, LocalStoreError), match=str(folder)):
            LocalStore.open(folder, tables=TABLES)

    before = [(parent, parent.stat().st_mode) for parent in (tmp_path, *tmp_path.parents[:3])]
    try:
        assert exit_status(child) == 0
    finally:
        for parent, mode in before:
            parent.chmod(mode & 0o7777)
        folder.chmod(0o700)
