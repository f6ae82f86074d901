"""Forks with an open store: both sides go on, and nothing is lost or doubled (fact 5.5)."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from local_store import DiskFailed, Insert, LocalStore, StoreClosed, forks
from syncer.testkit.disk_faults import DiskFaults
from tests.unit.buffer_tables import TABLES, USER, add, waiting
from tests.unit.forking import DEADLINE_S, Line, assert_whole, ended, forked


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


def test_files_that_nobody_has_open_any_more_are_forgotten_and_open_ones_are_not(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        add(store)
        found = os.stat(tmp_path / "buffer.db")
        for number in range(3 * forks.KNOWN_MAX):
            forks.note((-1, number))  # no device has this number
        assert len(forks._known) <= 2 * forks.KNOWN_MAX
        assert (found.st_dev, found.st_ino) in forks._known
