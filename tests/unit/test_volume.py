"""One handle, one thread, one commit at a time, and an answer in time for everybody."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from local_store.segment_files import write_file
from local_store.segment_names import SegmentName
from syncer.testkit.fake_volume import CommitFault, FakeVolume
from syncer.volume import Volume, VolumeResult
from tests.unit.segment_samples import sealed

SOON_S = 0.02  # for what can't happen in any time
LATE_S = 30.0  # for what happens at once


class Handle:
    """A commit that waits for the test: one permit of `began` for each, one of `go` ends it."""

    def __init__(self) -> None:
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.count = 0
        self.running = 0
        self.running_max = 0
        self.error: BaseException | None = None

    def commit(self) -> None:
        self.count += 1
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        self.began.release()
        assert self.go.acquire(timeout=LATE_S)
        self.running -= 1
        if self.error is not None:
            raise self.error


def callers(count: int, call: Callable[[], VolumeResult]) -> list[Future[VolumeResult]]:
    pool = ThreadPoolExecutor(count)
    found = [pool.submit(call) for _ in range(count)]
    pool.shutdown(wait=False)
    return found


def until_waiting(volume: Volume, count: int) -> None:
    """Return when `count` callers wait for a commit that hasn't begun."""
    clock = threading.Event()
    for _ in range(int(LATE_S / 0.001)):
        if len(volume._wishes) == count:
            return
        clock.wait(0.001)
    raise AssertionError(f"{len(volume._wishes)} wait, not {count}")


def test_a_plain_folder_has_nothing_to_call(tmp_path: Path):
    volume = Volume(tmp_path)
    assert volume.is_plain
    assert volume.commit(lambda: (tmp_path / "a").touch()) == VolumeResult("committed")
    assert volume.reload() == VolumeResult("reloaded")
    assert (tmp_path / "a").exists()


def test_no_thread_is_started_before_the_first_call(tmp_path: Path):
    volume = Volume(tmp_path)
    assert volume._thread is None
    volume.commit()
    thread = volume._thread
    assert thread is not None
    assert thread.daemon
    volume.commit()
    assert volume._thread is thread
    volume.close()
    thread.join(LATE_S)
    assert not thread.is_alive()


def test_callers_that_arrive_during_a_commit_share_the_next_one(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=LATE_S)
    first = callers(1, volume.commit)
    assert handle.began.acquire(timeout=LATE_S)
    others = callers(20, volume.commit)
    until_waiting(volume, 20)
    handle.go.release()
    assert first[0].result().state == "committed"
    assert handle.began.acquire(timeout=LATE_S)
    assert not any(other.done() for other in others)  # the first commit isn't theirs
    handle.go.release()
    assert {other.result().state for other in others} == {"committed"}
    assert (handle.count, handle.running_max) == (2, 1)


def test_the_outcome_of_a_commit_that_began_before_is_nobodys_elses(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=LATE_S)
    [first] = callers(1, volume.commit)
    assert handle.began.acquire(timeout=LATE_S)
    [second] = callers(1, volume.commit)
    until_waiting(volume, 1)
    handle.go.release()
    assert handle.began.acquire(timeout=LATE_S)
    handle.error = RuntimeError("conflict")
    handle.go.release()
    assert (first.result().state, second.result().state) == ("committed", "failed")


def test_writes_run_before_the_commit_that_answers_for_them(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=LATE_S)
    seen: list[tuple[str, int]] = []
    [first] = callers(1, lambda: volume.commit(lambda: seen.append(("first", handle.running))))
    assert handle.began.acquire(timeout=LATE_S)
    others = callers(3, lambda: volume.commit(lambda: seen.append(("other", handle.running))))
    until_waiting(volume, 3)
    assert seen == [("first", 0)]  # nothing is written during a commit
    handle.go.release(2)
    assert {it.result().state for it in [first, *others]} == {"committed"}
    assert seen == [("first", 0), *[("other", 0)] * 3]


def test_a_write_that_fails_is_its_callers_alone(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=LATE_S)
    gate = callers(1, volume.commit)
    assert handle.began.acquire(timeout=LATE_S)
    full = OSError(28, "No space left on device")

    def failing() -> None:
        raise full

    [bad] = callers(1, lambda: volume.commit(failing))
    [good] = callers(1, volume.commit)
    until_waiting(volume, 2)
    handle.go.release(2)
    assert bad.result().state == "failed"
    assert bad.result().error is full
    assert good.result().state == gate[0].result().state == "committed"
    assert handle.count == 2


def test_no_commit_is_made_for_writes_that_all_failed(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit)
    assert volume.commit(lambda: 1 / 0).state == "failed"
    assert handle.count == 0


def test_a_commit_that_hangs_is_unknown_after_the_timeout(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=SOON_S)
    assert volume.commit().state == "unknown"
    written: list[int] = []
    behind = volume.commit(lambda: written.append(1))
    assert (behind.state, behind.error) == ("failed", None)  # it never began
    handle.go.release(2)
    assert volume.commit(timeout_s=LATE_S).state == "committed"
    assert written == []  # and never will
    assert (handle.count, handle.running_max) == (2, 1)


def test_a_thousand_callers_behind_a_hung_commit_leave_nothing_behind(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=SOON_S)
    assert volume.commit().state == "unknown"
    for _ in range(1000):
        assert volume.commit(timeout_s=0).state == "failed"
    assert volume._wishes == []
    handle.go.release()


def test_an_error_becomes_a_value_with_a_hint_and_without_its_text(tmp_path: Path):
    error = RuntimeError("denied for token canary-secret")

    def failing() -> None:
        raise error

    volume = Volume(tmp_path, commit=failing, reload=failing)
    for result in (volume.commit(), volume.reload()):
        assert result.state == "failed"
        assert "RuntimeError" in result.reason
        assert result.hint
        assert "canary" not in repr(result)


def test_a_commit_that_ends_the_interpreter_or_is_cancelled_still_answers(tmp_path: Path):
    def leaving() -> None:
        raise SystemExit

    volume = Volume(tmp_path, commit=leaving, commit_timeout_s=LATE_S)
    assert volume.commit().state == "failed"
    assert volume.commit().state == "failed"


def test_a_reload_with_open_files_is_a_value_that_names_the_remedy(tmp_path: Path):
    mount = FakeVolume(tmp_path).host("worker")
    volume = Volume(mount.folder, commit=mount.commit, reload=mount.reload)
    with mount.held_open():
        result = volume.reload()
    assert result.state == "failed"
    assert "close it" in result.hint
    assert volume.reload().state == "reloaded"


def test_a_closed_volume_answers_those_who_wait_and_refuses_new_ones(tmp_path: Path):
    handle = Handle()
    volume = Volume(tmp_path, commit=handle.commit, commit_timeout_s=LATE_S)
    [first] = callers(1, volume.commit)
    assert handle.began.acquire(timeout=LATE_S)
    [second] = callers(1, volume.commit)
    until_waiting(volume, 1)
    volume.close()
    assert volume.commit().state == "failed"
    handle.go.release(2)
    assert first.result().state == second.result().state == "committed"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_the_child_commits_for_itself_while_the_parents_commit_hangs(tmp_path: Path):
    handle = Handle()
    parent = os.getpid()

    def commit() -> None:
        if os.getpid() == parent:
            handle.commit()

    volume = Volume(tmp_path, commit=commit, commit_timeout_s=LATE_S)
    [hanging] = callers(1, volume.commit)
    assert handle.began.acquire(timeout=LATE_S)
    with volume._wanted:  # the worst moment: the lock is held, and never released in the child
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # a child that waits for ever ends, and the test says so
            os._exit(0 if volume.commit().state == "committed" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    handle.go.release()
    assert hanging.result().state == "committed"


def test_fifty_writers_on_a_strict_volume_lose_nothing_that_was_answered_committed(tmp_path: Path):
    fake = FakeVolume(tmp_path, seed=5)
    api, worker = fake.host("api"), fake.host("worker")
    api.faults(*[CommitFault(error="504") if turn % 3 == 1 else CommitFault() for turn in range(9)])
    volume = Volume(api.folder, commit=api.commit, commit_timeout_s=LATE_S)
    committed: list[SegmentName] = []

    def ship(number: int) -> None:
        segment = sealed(number, number)
        for _ in range(20):  # the retries are the caller's business
            if volume.commit(lambda: write_file(api.folder, segment)).state == "committed":
                committed.append(segment.name)
                return

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ship, range(1, 51)))
    api.die()
    assert api.committers_max == 1
    assert len(committed) == 50
    assert all((worker.folder / name.path).exists() is False for name in committed)
    worker.reload()
    assert all((worker.folder / name.path).exists() for name in committed)
