"""The lock of a file: exclusive, waited for, and honest about a descriptor that is none."""

from __future__ import annotations

import os
import threading
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

import pytest

from local_store import file_locks

PATIENCE_S = 30.0


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def test_what_was_taken_is_locked_for_others_until_it_is_left(tmp_path: Path) -> None:
    mine, other = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    file_locks.take(mine)
    with pytest.raises(BlockingIOError):
        flock(other, LOCK_EX | LOCK_NB)
    file_locks.leave(mine)
    flock(other, LOCK_EX | LOCK_NB)
    for descriptor in (mine, other):
        os.close(descriptor)


def test_a_lock_that_somebody_has_is_waited_for(tmp_path: Path) -> None:
    mine, other = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    flock(other, LOCK_EX)
    order: list[str] = []

    def wait() -> None:
        file_locks.take(mine)
        order.append("taken")

    waiting = threading.Thread(target=wait)
    waiting.start()
    order.append("left")
    file_locks.leave(other)
    waiting.join(PATIENCE_S)
    assert order == ["left", "taken"]
    for descriptor in (mine, other):
        os.close(descriptor)


@pytest.mark.parametrize("call", [file_locks.take, file_locks.leave])
def test_a_descriptor_that_is_closed_is_an_error(tmp_path: Path, call: object) -> None:
    descriptor = opened(tmp_path / "lock")
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        call(descriptor)  # type: ignore[operator]
