"""Forks with an open store: both sides go on, and nothing is lost or doubled (fact 5.5).

Real forks of the test's own process; a child answers by its exit code.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_store import DiskFailed, Insert, LocalStore, StoreClosed
from local_store.clock import SystemClock
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting

DEADLINE_S = 60
HANGS_S = 30  # a child that takes longer is ended by its alarm


def forked(child: Callable[[], None], fork: Callable[[], int] = os.fork) -> int:
    """Run `child` in a forked process; returns its process id."""
    pid = fork()
    if pid == 0:
        try:
            signal.alarm(HANGS_S)
            child()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    return pid


def ended(pid: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Line:
    """A pipe through which one process tells another that it has come to some point."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def tell(self, what: str = "go") -> None:
        os.write(self.writer, what.encode() + b"\n")

    def hear(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            found += os.read(self.reader, 1)
        return found.decode().strip()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        os.close(self.writer)


def assert_whole(folder: Path, acknowledged: set[str] | int) -> None:
    """Every acknowledged transaction is there, once, and the log has no gap and no loss."""
    with LocalStore.open(folder, tables=TABLES) as store:
        found = store.undelivered(limit=-1)  # not a batch of them only
        assert [txn.seq for txn in found] == list(range(1, len(found) + 1))
        assert len({txn.txn_id for txn in found}) == len(found)
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": []}
        if isinstance(acknowledged, int):
            assert len(found) == acknowledged
        else:
            assert {txn.txn_id for txn in found} == acknowledged


def test_parent_and_child_go_on_with_the_same_store_and_share_its_log(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        before = add(store)

        def child() -> None:
            assert store.get("notes", before, user_id=USER)
            for _ in range(100):
                row_id = add(store)
                assert store.get("notes", row_id, user_id=USER)
            store.close()

        pid = forked(child)
        for _ in range(100):
            row_id = add(store)
            assert store.get("notes", row_id, user_id=USER)
        assert ended(pid) == 0
        assert store.stats()["pending"] == 201
    assert_whole(tmp_path, 201)


def test_a_child_goes_on_after_its_parent_closed(tmp_path: Path):
    """With the locks of its parent in mind it would write to a log that the parent deletes."""
    with Line() as closed:
        store = LocalStore.open(tmp_path, tables=TABLES)
        add(store)

        def child() -> None:
            for _ in range(50):
                add(store)
            closed.hear()
            for _ in range(50):
                add(store)
            os._exit(0)  # without closing

        pid = forked(child)
        for _ in range(50):
            add(store)
        store.close()
        closed.tell()
        assert ended(pid) == 0
    assert_whole(tmp_path, 151)


def test_a_parent_goes_on_after_its_child_closed(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)

        def child() -> None:
            add(store)
            store.close()
            with pytest.raises(StoreClosed, match="closed"):
                add(store)

        assert ended(forked(child)) == 0
        add(store)
    assert_whole(tmp_path, 3)


def test_a_child_that_is_killed_takes_nothing_along(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store, Line() as line:
        add(store)

        def child() -> None:
            while True:
                receipt = store.write([Insert("notes", {"text": "child"})], user_id=USER)
                line.tell(receipt.txn_id)

        pid = forked(child)
        told = [line.hear() for _ in range(20)]
        add(store)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        add(store)
        assert all(store.state(txn_id) == "pending" for txn_id in told)
        found = waiting(store)
        assert [txn.seq for txn in found] == list(range(1, len(found) + 1))
        assert store.damage()["lost"] == 0


def test_a_parent_that_is_killed_takes_nothing_along_and_leaves_no_lock_behind(tmp_path: Path):
    """The folder's lock belongs to an open file that both share: the child has to let go of it."""
    with Line() as to_child, Line() as to_test, ExitStack() as stack:

        def parent() -> None:
            disk = stack.enter_context(DiskFaults(tmp_path))
            store = LocalStore.open(tmp_path, tables=TABLES)
            add(store)

            def child() -> None:
                to_child.hear()
                for _ in range(50):
                    add(store)
                store.close()
                to_test.tell("done")

            with store.flushing():
                forked(child)
                for _ in range(50):
                    add(store)
                to_test.tell("written")
                disk.kill_at("after write", "-wal")  # in its turn, with the folder's lock
                add(store)

        assert ended(forked(parent)) == -signal.SIGKILL
        assert to_test.hear() == "written"
        with LocalStore.open(tmp_path, tables=TABLES) as store, store.flushing() as mine:
            assert mine  # though the child lives
        to_child.tell()
        assert to_test.hear() == "done"
    assert_whole(tmp_path, 101)


def test_forks_between_the_writes_of_many_threads_lose_and_double_nothing(tmp_path: Path):
    store = LocalStore.open(tmp_path, tables=TABLES)
    stop, acknowledged = threading.Event(), [set[str]() for _ in range(8)]

    def work(own: set[str]) -> None:
        while not stop.is_set():
            own.add(store.write([Insert("notes", {"text": "p"})], user_id=USER).txn_id)

    threads = [threading.Thread(target=work, args=(own,)) for own in acknowledged]
    for thread in threads:
        thread.start()
    told: set[str] = set()
    children = []
    with Line() as line:
        for number in range(12):

            def child(number: int = number) -> None:
                for _ in range(10):
                    receipt = store.write([Insert("notes", {"text": "c"})], user_id=USER)
                    line.tell(receipt.txn_id)
                if number % 3 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if number % 3 == 1:
                    store.close()

            children.append(forked(child))
            told |= {line.hear() for _ in range(10)}
        assert {ended(pid) for pid in children} == {0, -signal.SIGKILL}
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    store.close()
    assert_whole(tmp_path, told.union(*acknowledged))


async def test_a_fork_from_a_coroutine_leaves_its_neighbours_their_answers(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        calls = [
            asyncio.ensure_future(store.write_async([Insert("notes", {})], user_id=USER))
            for _ in range(300)
        ]
        await asyncio.sleep(0)  # they wait for the commit thread now

        def child() -> None:
            async def main() -> None:
                for _ in range(10):
                    await store.write_async([Insert("notes", {})], user_id=USER)

            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
            store.close()

        pid = forked(child)
        receipts = await asyncio.gather(*calls)
        assert ended(pid) == 0
        assert len({receipt.seq for receipt in receipts}) == 300
    assert_whole(tmp_path, 310)


def pool_work(count: int) -> list[str]:
    assert SHARED is not None
    return [SHARED.write([Insert("notes", {})], user_id=USER).txn_id for _ in range(count)]


SHARED: LocalStore | None = None  # as a preloaded application has it


def test_a_pool_of_forked_workers_uses_the_store_that_was_opened_before_it(tmp_path: Path):
    global SHARED
    with LocalStore.open(tmp_path, tables=TABLES) as SHARED:
        own = {SHARED.write([Insert("notes", {})], user_id=USER).txn_id}
        with multiprocessing.get_context("fork").Pool(4) as pool:
            answers = pool.map_async(pool_work, [25] * 4, chunksize=1)
            own |= {SHARED.write([Insert("notes", {})], user_id=USER).txn_id for _ in range(50)}
            for found in answers.get(DEADLINE_S):
                own |= set(found)
            pool.close()
            pool.join()
    assert len(own) == 151
    assert_whole(tmp_path, own)


def test_a_grandchild_goes_on_too(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)

        def child() -> None:
            add(store)
            assert ended(forked(lambda: store.close() if add(store) else None)) == 0
            assert ended(forked(lambda: None)) == 0  # one that never uses it
            add(store)

        assert ended(forked(child)) == 0
        add(store)
    assert_whole(tmp_path, 5)


def test_starting_a_program_does_not_close_the_file(tmp_path: Path):
    with DiskFaults(tmp_path) as disk, LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        opened = disk.count("open")
        subprocess.run([sys.executable, "-c", ""], check=True)
        add(store)
        assert disk.count("open") == opened
        subprocess.run([sys.executable, "-c", ""], check=True, preexec_fn=lambda: None)
        add(store)  # with Python code in the child it is a fork like others
        assert disk.count("open") > opened
    assert_whole(tmp_path, 3)


def test_a_child_wakes_no_flusher_of_its_parent(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        nudged: list[int] = []
        store.on_write(lambda: nudged.append(os.getpid()))

        def child() -> None:
            add(store)
            assert not nudged

        assert ended(forked(child)) == 0
        add(store)
        assert nudged == [os.getpid()]


def test_a_store_that_was_closed_before_a_fork_is_closed_in_the_child(tmp_path: Path):
    store = LocalStore.open(tmp_path, tables=TABLES)
    store.close()

    def child() -> None:
        for call in (lambda: add(store), lambda: waiting(store), store.flushing().__enter__):
            with pytest.raises(StoreClosed, match="closed"):
                call()
        store.close()

    assert ended(forked(child)) == 0


def test_a_child_whose_folder_can_not_be_opened_is_told_that_nothing_was_written(tmp_path: Path):
    folder = tmp_path / "buffer"
    with LocalStore.open(folder, tables=TABLES) as store:
        add(store)

        def child() -> None:
            aside = folder.rename(tmp_path / "aside")
            with pytest.raises(DiskFailed, match="nothing was written"):
                add(store)
            aside.rename(folder)
            (folder / "acknowledged").rename(folder / "mark")
            (folder / "acknowledged").mkdir()
            with pytest.raises(DiskFailed, match="nothing was written"):
                add(store)
            (folder / "acknowledged").rmdir()
            (folder / "mark").rename(folder / "acknowledged")
            add(store)

        assert ended(forked(child)) == 0
        add(store)
    assert_whole(folder, 3)


# -- what a fork can't wait for --------------------------------------------------------------------


def refuses(store: LocalStore, folder: Path) -> Callable[[], None]:
    """Let everything that a child may try be refused, and another folder work."""

    def child() -> None:
        for call in (
            lambda: add(store),
            lambda: waiting(store),
            lambda: LocalStore.open(folder, tables=TABLES),
        ):
            with pytest.raises(StoreClosed, match="in use when this process was forked"):
                call()
        store.close()
        with LocalStore.open(folder / "another", tables=TABLES) as own:
            add(own)

    return child


class Gate(SystemClock):
    """A clock whose sleepers wait until the gate is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def sleep(self, seconds: float) -> None:
        self.entered.set()
        self.opened.wait(DEADLINE_S)


@pytest.mark.parametrize("waits", [True, False])
def test_a_fork_waits_for_the_write_under_way_or_the_child_refuses(tmp_path: Path, waits: bool):
    gate, fork_wait_s = Gate(), DEADLINE_S if waits else 0.05
    with (
        DiskFaults(tmp_path, clock=gate) as disk,
        LocalStore.open(tmp_path, tables=TABLES, fork_wait_s=fork_wait_s) as store,
    ):
        disk.slow_sync(1, "-wal", times=1)
        writer = threading.Thread(target=add, args=(store,))
        writer.start()
        assert gate.entered.wait(DEADLINE_S)  # in the sync: it holds the thread and folder locks
        opener = threading.Timer(0.2 if waits else DEADLINE_S, gate.opened.set)
        opener.start()
        try:
            pid = (
                forked(lambda: store.close() if add(store) else None)
                if waits
                else forked(refuses(store, tmp_path))
            )
            assert ended(pid) == 0
            if not waits:  # nor did the child end the lock
                with open(tmp_path / "buffer.lock") as lock, pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            opener.cancel()
            gate.opened.set()
        writer.join(DEADLINE_S)
    assert_whole(tmp_path, 2 if waits else 1)


def test_a_fork_amid_a_read_of_its_own_thread_leaves_a_child_that_refuses(tmp_path: Path):
    """Nothing can wait for itself. Odd in an application's function, but no disaster."""
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        row_id = add(store, text="old")
    codes: list[int] = []

    def upcast(row: dict[str, Any]) -> dict[str, Any]:
        if not codes:
            codes.append(ended(forked(refuses(newer, tmp_path))))
        return row

    tables = [replace(TABLES[0], schema_version=2, upcasts={1: upcast}), *TABLES[1:]]
    with LocalStore.open(tmp_path, tables=tables, fork_wait_s=0.05) as newer:
        assert newer.get("notes", row_id, user_id=USER)
        assert codes == [0]
        add(newer)
        assert [txn.seq for txn in waiting(newer)] == [1, 2]
        assert newer.damage()["lost"] == 0


def test_a_fork_while_another_process_holds_the_folder_leaves_a_child_that_refuses(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, fork_wait_s=0.05) as store:
        add(store)
        with open(tmp_path / "buffer.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pid = forked(refuses(store, tmp_path))
        assert ended(pid) == 0
        add(store)
    assert_whole(tmp_path, 2)


def test_a_child_refuses_a_file_that_somebody_else_had_open_in_its_parent(tmp_path: Path):
    with (
        LocalStore.open(tmp_path, tables=TABLES) as store,
        closing(sqlite3.connect(tmp_path / "buffer.db")) as other,
    ):
        add(store)
        other.execute("SELECT count(*) FROM op_log").fetchone()
        assert ended(forked(refuses(store, tmp_path))) == 0
        add(store)
    assert_whole(tmp_path, 2)


def test_without_a_descriptor_to_look_with_a_child_takes_no_file_for_closed(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        assert ended(forked(lambda: None)) == 0  # it closed the file: the next has none to give up
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        taken: list[int] = []

        def fork() -> int:
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            return os.fork()

        def child() -> None:
            for descriptor in taken:
                os.close(descriptor)
            refuses(store, tmp_path)()

        pid = forked(child, fork)
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert ended(pid) == 0
        add(store)
    assert_whole(tmp_path, 2)


def test_a_fork_that_python_is_not_told_of_leaves_a_child_that_refuses(tmp_path: Path):
    raw_fork = ctypes.PyDLL(None).fork  # keeps the interpreter's lock, runs nothing else
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)

        def child() -> None:
            for call in (
                lambda: add(store),
                lambda: asyncio.run(store.write_async([Insert("notes", {})], user_id=USER)),
                lambda: waiting(store),
                store.flushing().__enter__,
            ):
                with pytest.raises(StoreClosed, match="before a fork"):
                    call()
            store.close()

        assert ended(forked(child, raw_fork)) == 0
        add(store)
    assert_whole(tmp_path, 2)


def test_what_a_child_can_not_use_it_never_closes_either(tmp_path: Path):
    """The last connection to close deletes the log, and an inherited one takes itself for it."""
    raw_fork = ctypes.PyDLL(None).fork
    with Line() as line:
        store = LocalStore.open(tmp_path, tables=TABLES)
        add(store)

        def child() -> None:
            line.hear()
            with pytest.raises(StoreClosed, match="before a fork"):
                add(store)
            store.close()
            gc.collect()

        def writer() -> None:
            with LocalStore.open(tmp_path, tables=TABLES) as own:
                add(own)
                os.kill(os.getpid(), signal.SIGKILL)  # what it wrote is in the log alone

        pid = forked(child, raw_fork)
        store.close()
        assert ended(forked(writer)) == -signal.SIGKILL
        line.tell()
        assert ended(pid) == 0
    assert_whole(tmp_path, 2)


# -- the flusher's turn ----------------------------------------------------------------------------


def test_a_flushers_turn_ends_with_its_block_in_the_parent_alone(tmp_path: Path):
    """A forked child shares the open file: it can't end the parent's turn, nor prolong it."""
    with (
        LocalStore.open(tmp_path, tables=TABLES) as store,
        LocalStore.open(tmp_path, tables=TABLES) as other,
        Line() as line,
    ):
        turn = store.flushing()
        assert turn.__enter__()

        def leaving() -> None:
            assert ended(forked(lambda: None)) == 0
            turn.__exit__(None, None, None)

        assert ended(forked(leaving)) == 0
        with other.flushing() as mine:
            assert not mine
        lingering = forked(lambda: line.hear() and None)
        turn.__exit__(None, None, None)
        with other.flushing() as mine:
            assert mine
        line.tell()
        assert ended(lingering) == 0
