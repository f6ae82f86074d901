"""The one connection of a process to its buffer file, and the locks around it.

Every write and every checkpoint of the process goes through this connection, under a thread lock
and the folder's lock. What SQLite reports comes out in this package's words, and says whether the
write happened.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path

import orjson

from local_store import schema
from local_store.errors import BufferFull, CommitUnknown, StoreClosed, StoreCorrupt

_CREATE = os.O_RDWR | os.O_CREAT


class BufferFile:
    """The open buffer file of a folder; `reading` and `transaction` are the two ways in."""

    def __init__(self, folder: Path, ids: Callable[[], str], full_retry_after_s: float) -> None:
        self._path = folder / schema.FILE_NAME
        self._ids = ids
        self._full_retry_after_s = full_retry_after_s
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._lock_fd = os.open(folder / schema.LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file; what was found in it is durable when this returns."""
        with self._lock:
            self._connect()

    def close(self) -> None:
        """Close the file; everything acknowledged is already durable."""
        if self._pid != os.getpid():
            return  # after a fork the file, and the lock that both share, are the parent's
        with self._lock:
            connection, self._connection = self._connection, None
            lock_fd, self._lock_fd = self._lock_fd, -1
            if connection is not None:
                with schema.folder_lock(lock_fd):  # the last one to close checkpoints
                    connection.close()
            if lock_fd >= 0:
                os.close(lock_fd)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Hand out the connection for reads."""
        self._check_process()
        with self._lock, self._cleanly():
            yield self._opened()

    @contextmanager
    def transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        """Run the body in one SQLite transaction; durable when the block has ended.

        `what` names the transaction in a CommitUnknown.
        """
        self._check_process()
        with self._lock, self._cleanly():
            connection = self._opened()
            with schema.folder_lock(self._lock_fd):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                self._commit(connection, what)

    @contextmanager
    def flushing(self) -> Iterator[bool]:
        """Hold the folder's flusher lock; yields False when somebody else holds it.

        The lock belongs to an open file of its own, so it ends with the block or with the process.
        """
        self._check_process()
        if self._lock_fd < 0:
            raise StoreClosed("this store is closed")
        descriptor = os.open(self._path.parent / schema.FLUSHER_LOCK_NAME, _CREATE, 0o600)
        try:
            try:
                flock(descriptor, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                try:
                    yield True
                finally:
                    # A process forked meanwhile shares this open file: closing ours wouldn't end
                    # the lock, and the child leaving the block must not end the parent's.
                    if self._pid == os.getpid():
                        flock(descriptor, LOCK_UN)
        finally:
            os.close(descriptor)

    def _connect(self) -> None:
        with schema.folder_lock(self._lock_fd), self._cleanly():
            self._connection = schema.open_file(self._path, self._ids())

    def _opened(self) -> sqlite3.Connection:
        if self._lock_fd < 0:
            raise StoreClosed("this store is closed")
        if self._connection is None:  # given up after a failed commit
            self._connect()
        assert self._connection is not None
        return self._connection

    def _commit(self, connection: sqlite3.Connection, what: str) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                connection.rollback()
                raise
            # After a failed fsync the page cache may claim what the disk never got, so nothing
            # this handle says can be trusted. The next call opens the file afresh; if the disk
            # still fails then, that call is refused and the one after it tries again.
            self._connection = None
            connection.close()
            raise CommitUnknown(what, str(error)) from error

    @contextmanager
    def _cleanly(self) -> Iterator[None]:
        """Turn what SQLite reports into this package's errors; all mean that nothing happened."""
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError, orjson.JSONDecodeError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                full = BufferFull(self._full_retry_after_s, "the disk is full")
                raise full from error
            clean = schema.clean_error(self._path, error)
            if clean is None:
                raise
            raise clean from None if isinstance(clean, StoreCorrupt) else error

    def _check_process(self) -> None:
        """Refuse after a fork, before the lock: another thread may have held it at that moment."""
        if self._pid != os.getpid():
            # SQLite's locks don't survive a fork: acknowledgements here would go nowhere.
            raise StoreClosed("this store was opened before a fork; open the folder again")
