"""What a fork can't wait for: the child refuses the store, and spoils nothing of its parent's."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import os
import resource
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_store import Insert, LocalStore, StoreClosed
from local_store.clock import SystemClock
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting
from tests.unit.forking import DEADLINE_S, Line, assert_whole, ended, forked


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
