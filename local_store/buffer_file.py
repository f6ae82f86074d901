"""A process's connections to its buffer file, one that writes and one that reads, and the locks.

Every write and every checkpoint of the process goes through the first, under a lock of the process
and the folder's lock; readers have a connection of their own, so that none waits for a sync. What
SQLite reports comes out in this package's words, and says whether the write happened.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import orjson

from local_store import file_locks, forks, opening
from local_store.decoding import RecordDamaged
from local_store.errors import (
    BufferFull,
    CommitUnknown,
    LocalStoreError,
    StoreClosed,
    StoreCorrupt,
)
from local_store.file_life import FileLife, Upkeep
from local_store.listing import unlisted
from local_store.space import Ballast, check_free
from local_store.write_ahead import checkpoint

LOOK_BYTES = 256 * 1024  # appended between two looks at the free space
WAL_FRAMES_MAX = 1_000  # pages, 4 MB: a checkpoint of it takes about 10 ms, between two groups

Found = TypeVar("Found")


class BufferFile(FileLife):
    """The open buffer file of a folder; `read`, `change` and `appending` are the ways in.

    `generation` changes whenever the file changed by anything but an appended group of this
    process: what was remembered of it then is out of date.
    """

    def __init__(
        self,
        folder: Path,
        ids: Callable[[], str],
        full_retry_after_s: float,
        free_bytes_min: int,
        fork_wait_s: float,
        upkeep: Upkeep,
    ) -> None:
        self._folder = folder
        self._path = folder / opening.FILE_NAME
        self._ids = ids
        self._full_retry_after_s = full_retry_after_s
        self._free_bytes_min = free_bytes_min
        self._fork_wait_s = fork_wait_s
        self._upkeep = upkeep
        self._closed = False
        self._ballast = Ballast(folder)
        self._connection: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._damaged: tuple[int, int] | None = None  # the file that must not be used any more
        self._unlooked_bytes = LOOK_BYTES
        self._frames = 0  # in the write-ahead log since the last checkpoint, roughly
        self._is_pinned = False  # by a reader elsewhere, for long
        self.generation = 0
        self._begin_process()
        self._take_hold()
        forks.register(self)

    def open(self) -> None:
        """Open or create the file; what was found in it is durable when this returns."""
        with self._lock, opening.folder_lock(self._lock_fd), self._cleanly():
            try:
                with self._cleanly():
                    self._connect()
            except (RecordDamaged, StoreCorrupt, TypeError):
                # Not in a record: in what tells of the file, a NULL where a number was included.
                self._damaged = self._identity_on_disk()
                self._connect()

    def close(self) -> None:
        """Close the file; everything acknowledged is already durable."""
        if self._pid != os.getpid():
            self._keep_open()  # the file, and the lock that both share, are the parent's
            return
        with self._lock:
            self._closed = True
            lock_fd, self._lock_fd = self._lock_fd, -1
            if lock_fd < 0:  # closed before, or never used in this process
                return
            with opening.folder_lock(lock_fd):  # the last one to close checkpoints
                self._give_up()
            self._high_water.close()
            self._shared.close()
            os.close(lock_fd)

    def read(self, ask: Callable[[sqlite3.Connection], Found]) -> Found:
        """Return what `ask` finds in one consistent state of the file, the newest durable one."""
        self._check_process()
        return self._healing(lambda: self._read(ask))

    def change(
        self, what: str, body: Callable[[sqlite3.Connection], Found], *, synced: bool = True
    ) -> Found:
        """Return what `body` returns once what it did, in one SQLite transaction, is durable.

        `what` names the transaction in a CommitUnknown. On a full disk it has the ballast's room.
        Without `synced` it is durable with the next sync only: for what can be found out again.
        """
        try:
            return self._healing(lambda: self._change(what, body, synced))
        except BufferFull:  # the ballast is gone now
            return self._change(what, body, synced)

    def _healing(self, attempt: Callable[[], Found]) -> Found:
        """Set aside what is damaged and try again: first records, then the file."""
        try:
            return attempt()
        except RecordDamaged:
            with suppress(StoreCorrupt):  # then the file is carried over by the next look
                self._quarantine()
        except StoreCorrupt:
            pass  # given up already: the next look carries over what is intact
        try:
            return attempt()
        except (RecordDamaged, StoreCorrupt):
            self._give_up_damaged()
        try:
            return attempt()
        except RecordDamaged:
            raise StoreCorrupt(self._path, "what was carried over is damaged again") from None

    def _change(
        self, what: str, body: Callable[[sqlite3.Connection], Found], synced: bool
    ) -> Found:
        with self._transaction(what, synced) as connection:
            if unlisted(connection):
                self._upkeep.list_new(connection)
            found = body(connection)
        self.checkpoint()
        return found

    def _quarantine(self) -> None:
        with self._transaction("a quarantine") as connection:
            self._upkeep.mend(connection)

    def list_behind(self) -> None:
        """Make findable what was appended; a failure is left to those who look."""
        with suppress(LocalStoreError, RecordDamaged), self._locked() as connection:
            self._list_unsynced(connection)

    def _read(self, ask: Callable[[sqlite3.Connection], Found]) -> Found:
        with self._read_lock, self._cleanly():
            if self._reader is not None:
                self._reader.execute("BEGIN")
                try:
                    if not unlisted(self._reader):
                        return ask(self._reader)
                finally:
                    self._reader.execute("ROLLBACK")
        return self._read_behind(ask)

    def _read_behind(self, ask: Callable[[sqlite3.Connection], Found]) -> Found:
        """Make the newest findable, and read in that very state, whatever follows meanwhile."""
        with ExitStack() as reading, self._cleanly():
            with self._locked() as connection:
                try:
                    self._list_unsynced(connection)
                except sqlite3.OperationalError:
                    return self._read_unlisted(connection, ask)
                reading.enter_context(self._read_lock)
                reader = self._reader
                assert reader is not None
                reader.execute("BEGIN")
                reading.callback(reader.execute, "ROLLBACK")
                unlisted(reader)  # the first look fixes the state
            return ask(reader)

    def _read_unlisted(
        self, connection: sqlite3.Connection, ask: Callable[[sqlite3.Connection], Found]
    ) -> Found:
        """Read on a full or failing disk: what would be written is undone before it is."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._upkeep.list_new(connection)
            return ask(connection)
        finally:
            connection.rollback()

    @contextmanager
    def _transaction(self, what: str, synced: bool = True) -> Iterator[sqlite3.Connection]:
        with ExitStack() as stack:
            connection = stack.enter_context(self._locked())
            if not synced:
                stack.enter_context(self._unsynced(connection))
            changes = connection.total_changes
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException as error:
                self._undo(connection, error)
                raise
            finally:
                self.generation += 1
            self._frames += 3 + (connection.total_changes - changes) // 2
            self._commit(connection, what)

    def append(self, body: Callable[[sqlite3.Connection], Found], size_bytes: int) -> Found:
        """Return what `body`, which only appends about `size_bytes`, returns, once it is durable.

        What is remembered of the file stays valid. Refused before the disk is full to the brim.
        """
        return self._healing(lambda: self._append(body, size_bytes))

    def acknowledged(self, log_id: str, seq: int) -> None:
        """Note outside the file how far the newest log is durable."""
        self._high_water.write(log_id, seq)

    def _append(self, body: Callable[[sqlite3.Connection], Found], size_bytes: int) -> Found:
        # Spelled out instead of `_locked`: each context manager costs as much as its system call.
        self._check_process()
        with self._lock:
            if self._lock_fd < 0:
                self._come_back()
            file_locks.take(self._lock_fd)
            try:
                return self._append_locked(body, size_bytes)
            except BaseException as error:
                clean = self._cleaned(error)
                if clean is error:
                    raise
                raise clean from None if isinstance(clean, RecordDamaged) else error
            finally:
                file_locks.leave(self._lock_fd)

    def _append_locked(self, body: Callable[[sqlite3.Connection], Found], size_bytes: int) -> Found:
        connection = self._opened()
        self._note_others()
        self._check_room(size_bytes)
        changes = connection.total_changes
        try:
            found = body(connection)
        except BaseException as error:
            self._undo(connection, error)
            if opening.is_io_error(error):  # perhaps of the sync: then anything may be true
                self._give_up()
                raise CommitUnknown("a group", str(error)) from error
            raise
        # SQLite doesn't tell how long its log is; some changed rows share a page.
        self._frames += 3 + (connection.total_changes - changes) // 2 + size_bytes // 4_096
        if not self._is_found():
            self._follow("a group")
        return found

    def _check_room(self, size_bytes: int) -> None:
        """Look at the disk once for each quarter MiB appended: others fill it too."""
        self._unlooked_bytes += size_bytes
        if self._unlooked_bytes >= LOOK_BYTES:
            check_free(self._folder, self._free_bytes_min, self._full_retry_after_s)
            self._unlooked_bytes = 0

    def _come_back(self) -> None:
        """Refuse once the store is closed; else this is a forked child's first use of it."""
        if self._closed:
            raise StoreClosed("this store is closed")
        self._take_hold_again()

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        """Hold both locks, with the file that the folder leads to open."""
        self._check_process()
        with self._lock, self._cleanly():
            if self._lock_fd < 0:
                self._come_back()
            with opening.folder_lock(self._lock_fd):
                connection = self._opened()
                self._note_others()
                yield connection

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file once it has grown; a failure is no one's loss."""
        if self._frames < WAL_FRAMES_MAX:
            return
        with self._lock, suppress(sqlite3.Error, OSError):
            if self._connection is None or self._pid != os.getpid():
                return
            self._frames = 0
            with opening.folder_lock(self._lock_fd):
                self._is_pinned = checkpoint(self._connection, self._is_pinned)
            self._ballast.restore(self._free_bytes_min)

    @contextmanager
    def flushing(self) -> Iterator[bool]:
        """Hold the folder's flusher lock; yields False when somebody else holds it."""
        self._check_process()
        if self._closed:
            raise StoreClosed("this store is closed")
        with opening.flusher_lock(self._folder) as is_mine:
            yield is_mine

    def _opened(self) -> sqlite3.Connection:
        """Return the writing connection; both locks are held."""
        if self._damaged is not None:
            self._give_up()
        if self._connection is None:  # at first, and when it was given up
            self._connect()
        assert self._connection is not None
        return self._connection

    def _give_up_damaged(self) -> None:
        """Let the next look carry over what is intact, unless another process did so meanwhile."""
        with self._lock:
            self._damaged = self._identity
            self._give_up()

    def _note_others(self) -> None:
        """Notice that another process, or another store of this one, wrote since our last look.

        The lock's file names who held it last; asking SQLite would cost as much as a small insert.
        """
        if self._shared[:] != self._me:
            self._shared[:] = self._me
            self.generation += 1

    def _commit(self, connection: sqlite3.Connection, what: str) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                self._undo(connection, error)
                raise
            # After a failed fsync the page cache may claim what the disk never got, so nothing
            # these handles say can be trusted. The next call opens the file afresh; if the disk
            # still fails then, that call is refused and the one after it tries again.
            self._give_up()
            raise CommitUnknown(what, str(error)) from error
        if not self._is_found():
            self._follow(what)

    @contextmanager
    def _cleanly(self) -> Iterator[None]:
        """Turn what SQLite reports into this package's errors; all mean that nothing happened."""
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError, orjson.JSONDecodeError) as error:
            clean = self._cleaned(error)
            if clean is error:
                raise
            raise clean from None if isinstance(clean, RecordDamaged) else error

    def _cleaned(self, error: BaseException) -> BaseException:
        """Return what an error means to a caller; the same where it is clear already."""
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return BufferFull(self._full_retry_after_s, "the disk is full")
        if opening.is_undecodable(error):
            return RecordDamaged()  # without its cause: the message quotes users' data
        clean = opening.clean_error(self._path, error)
        if isinstance(clean, StoreCorrupt):
            self._damaged = self._identity
        return clean or error
