"""How an open buffer file gets over a fork: closed before it, opened again by whoever uses it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sqlite3
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from local_store import forks, opening
from local_store.errors import DiskFailed, StoreClosed
from local_store.fair_lock import FairLock
from local_store.high_water import HighWater

_CREATE = os.O_RDWR | os.O_CREAT
_NAME_BYTES = 16  # a random name per open store
_NONE = -1  # no descriptor


class FileForks(forks.Forkable):
    """The part of a BufferFile that its process holds: locks, descriptors, connections."""

    _folder: Path
    _path: Path
    _fork_wait_s: float
    _connection: sqlite3.Connection | None
    _reader: sqlite3.Connection | None
    _high_water: HighWater
    _me: bytes
    _shared: mmap.mmap
    generation: int

    def _begin_process(self) -> None:
        """Hold nothing yet but locks; nobody else has this object, or nobody any more."""
        self._pid = os.getpid()
        self._lock = FairLock()
        self._read_lock = threading.Lock()  # taken after the other one
        self._copying = threading.Lock()  # taken before both
        self._put_down: ExitStack | None = None
        self._lock_fd = _NONE

    def _take_hold(self) -> None:
        """Open what the processes of a folder share besides the file; raises OSError."""
        if forks.is_inherited(self._identity_on_disk()):
            raise StoreClosed(
                f"{self._path} was in use when this process was forked, for longer than a fork"
                " waits; start a fresh process (spawn, exec), or fork when nothing reads for long"
            )
        lock_fd = os.open(self._folder / opening.LOCK_NAME, _CREATE, 0o600)
        try:
            # Written first: a hole in a mapped file could meet a full disk as a signal.
            os.pwrite(lock_fd, bytes(_NAME_BYTES), 0)
            self._me, self._shared = os.urandom(_NAME_BYTES), mmap.mmap(lock_fd, _NAME_BYTES)
            self._high_water = HighWater(self._folder)
        except BaseException:
            os.close(lock_fd)
            raise
        self._lock_fd = lock_fd

    def _take_hold_again(self) -> None:
        """Open in a forked child what it must have of its own: a lock that is shared is none."""
        try:
            self._take_hold()
        except OSError as error:
            raise DiskFailed(f"{self._folder}: {error}; nothing was written") from error

    def before_fork(self) -> None:
        """Close the file once nobody uses it, and keep everybody off until the fork is done.

        Whoever can't be waited out keeps it open, and the child will refuse to open it.
        """
        with ExitStack() as held:
            for lock in (self._copying, self._lock, self._read_lock):
                if not lock.acquire(timeout=self._fork_wait_s):
                    return
                held.callback(lock.release)
            if self._connection is not None:
                with opening.folder_lock_within(self._lock_fd, self._fork_wait_s) as is_mine:
                    if not is_mine:
                        return
                    close_all(self._let_go())
            self._put_down = held.pop_all()

    def after_fork_in_parent(self) -> None:
        """Let those who wait go on; the first of them opens the file again."""
        held, self._put_down = self._put_down, None
        if held is not None:
            held.close()

    def after_fork_in_child(self) -> None:
        """Start with locks that nobody holds, and let go of what the parent holds too.

        A lock on the folder would otherwise outlive a killed parent for as long as this process
        lives: it belongs to the open file that both share.
        """
        self._keep_open()
        if self._lock_fd != _NONE:
            self._shared.close()  # it has a descriptor of its own
            os.close(self._lock_fd)
        self._begin_process()
        self.generation += 1

    def _let_go(self) -> list[sqlite3.Connection]:
        """Forget both connections; returns them, the reader first, so that the writer's is last.

        What is remembered of the file is void at once: the next one to be opened may be another.
        """
        self.generation += 1
        opened = [one for one in (self._reader, self._connection) if one is not None]
        self._reader = self._connection = None
        return opened

    def _identity_on_disk(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _check_process(self) -> None:
        """Refuse after a fork that Python wasn't told of: nothing was put down before it."""
        if self._pid != os.getpid():
            self._keep_open()
            raise StoreClosed("this store was opened before a fork; start a fresh process")

    def _keep_open(self) -> None:
        """Keep a forked child from ever closing what is its parent's.

        The last connection to close deletes the write-ahead log, and in the child SQLite takes
        itself for the last.
        """
        for opened in self._let_go():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened))


def close_all(opened: list[sqlite3.Connection]) -> None:
    """Close connections; what they committed is durable whether that succeeds or not."""
    for connection in opened:
        with suppress(sqlite3.Error):
            connection.close()
