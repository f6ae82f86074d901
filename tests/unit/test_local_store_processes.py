"""Several processes, killed processes: one folder stays one log."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from local_store import Insert, LocalStore, Update, VersionMismatch
from local_store.clock import new_id
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting

# Fresh interpreters: a fork would inherit the parent's locks and threads.
SPAWN = multiprocessing.get_context("spawn")
DEADLINE_S = 60


def run_all(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run `target(go, answers, *arguments)` in one process each, let them go at once."""
    go, answers = SPAWN.Barrier(len(arguments)), SPAWN.SimpleQueue()
    children = [SPAWN.Process(target=target, args=(go, answers, *args)) for args in arguments]
    for child in children:
        child.start()
    reader_result: list[Any] = []
    reader = threading.Thread(
        target=lambda: reader_result.extend(answers.get() for _ in children), daemon=True
    )
    reader.start()
    for child in children:
        finish(child)
    reader.join(DEADLINE_S)
    assert len(reader_result) == len(children)
    return reader_result


def finish(child: SpawnProcess) -> None:
    child.join(DEADLINE_S)
    if child.is_alive():
        child.kill()
        pytest.fail("a child process hangs")
    assert child.exitcode == 0


def first_starts(go: Any, answers: Any, folder: Path, starts: int) -> None:
    found = []
    for start in range(starts):
        go.wait(DEADLINE_S)
        with LocalStore.open(folder / str(start), tables=TABLES) as store:
            add(store)
            found.append(store.log_id)
    answers.put(found)


def test_two_first_starts_at_once_make_one_log(tmp_path: Path):
    starts = 20
    first, second = run_all(first_starts, [(tmp_path, starts)] * 2)
    assert first == second
    assert len(set(first)) == starts
    for start in range(starts):
        with LocalStore.open(tmp_path / str(start), tables=TABLES) as store:
            assert [txn.seq for txn in waiting(store)] == [1, 2]


def hundred_writes(go: Any, answers: Any, folder: Path, shared: str) -> None:
    won = 0
    with LocalStore.open(folder, tables=TABLES) as store:
        go.wait(DEADLINE_S)
        seqs = []
        for n in range(100):
            receipt = store.write([Insert("notes", {"number": n})], user_id=USER)
            seqs.append(receipt.seq)
            if n % 10 == 0:
                row = store.get("notes", shared, user_id=USER)
                assert row is not None
                change = Update("notes", shared, {"number": n}, expected_version=row["_version"])
                try:
                    store.write([change], user_id=USER)
                    won += 1
                except VersionMismatch:
                    pass
    answers.put((seqs, won))


def test_four_processes_share_one_gap_free_log(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        shared = add(store)
    answers = run_all(hundred_writes, [(tmp_path, shared)] * 4)
    seqs = [seq for found, _ in answers for seq in found]
    won = sum(times for _, times in answers)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        transactions = waiting(store)
        assert [txn.seq for txn in transactions] == list(range(1, 401 + won + 1))
        assert len(set(seqs)) == 400
        assert set(seqs) < {txn.seq for txn in transactions}
        assert len(store.select("notes", user_id=USER, limit=1_000)) == 401
        assert store.get("notes", shared, user_id=USER)["_version"] == 1 + won
        assert store.stats()["pending"] == 401 + won


def in_fork(child: Callable[[], None]) -> int:
    """Run `child` in a forked process; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_kill_right_after_the_acknowledgement_loses_nothing(tmp_path: Path):
    for count in range(1, 11):
        reader, writer = os.pipe()

        def child(writer: int = writer) -> None:
            store = LocalStore.open(tmp_path, tables=TABLES)
            receipt = store.write([Insert("notes", {"text": "x"})], user_id=USER)
            os.write(writer, receipt.txn_id.encode())
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_fork(child) == -signal.SIGKILL
        txn_id = os.read(reader, 100).decode()
        os.close(reader)
        os.close(writer)
        with LocalStore.open(tmp_path, tables=TABLES) as store:
            assert store.state(txn_id) == "pending"
            assert store.stats()["last_seq"] == count


@pytest.mark.parametrize("step", ["before write", "after write", "before sync", "after sync"])
def test_a_kill_at_any_step_of_a_commit_leaves_all_of_it_or_nothing(tmp_path: Path, step: Any):
    ids, nth = [], 0
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    while True:
        nth += 1
        ids.append((new_id(), new_id()))

        def child(note: str = ids[-1][0], comment: str = ids[-1][1], nth: int = nth) -> None:
            with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
                disk.kill_at(step, "-wal", nth=nth)
                ops = [
                    Insert("notes", {"id": note, "text": "x" * 6_000}),
                    Insert("comments", {"id": comment, "note_id": note}),
                ]
                store.write(ops, user_id=USER)

        code = in_fork(child)
        if code != -signal.SIGKILL or nth == 12:
            break
    assert nth > 2 or "sync" in step
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        log = waiting(store)
        assert [txn.seq for txn in log] == list(range(1, len(log) + 1))
        assert store.stats()["pending"] == len(log)
        in_log = {txn.ops[0].id for txn in log}
        for note, comment in ids:
            found = store.get("notes", note, user_id=USER) is not None
            assert found == (store.get("comments", comment, user_id=USER) is not None)
            assert found == (note in in_log)
        add(store)


def test_parent_and_child_both_write_when_each_opens_after_the_fork(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with LocalStore.open(tmp_path, tables=TABLES) as own:
                for _ in range(100):
                    add(own)
                os.read(told, 1)  # until the parent has closed
                for _ in range(100):
                    add(own)
            os._exit(0)
        except BaseException:
            os._exit(99)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        for _ in range(200):
            add(store)
    os.write(tell, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(told)
    os.close(tell)
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        assert [txn.seq for txn in waiting(store)] == list(range(1, 402))
        assert store.damage()["lost"] == 0
