"""The files under a simulated process: taken as it dies, put back for the one that comes up."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_store import LocalStore, file_forks, opening, space

Image = dict[str, bytes]
LOG = "-wal"
_SHARED_MEMORY = "-shm"  # made anew by the first who opens the file
_SHARED_HEADER_BYTES = 136  # https://sqlite.org/walformat.html, 2.1
_LEFT_ALONE = (space.FILE_NAME,)  # a MiB of zeros, given up on a full disk only


def image_of(folder: Path) -> Image:
    """Return the bytes of a folder's files."""
    return {
        entry.name: Path(entry.path).read_bytes()
        for entry in os.scandir(folder)
        if entry.is_file()
        and entry.name not in _LEFT_ALONE
        and not entry.name.endswith(_SHARED_MEMORY)
    }


def restore(folder: Path, image: Image) -> None:
    """Put a folder's bytes back into the same files, so that they keep their identity.

    Connections may have them open, but no transaction: they find the shared memory invalid.
    """
    for entry in list(os.scandir(folder)):
        if entry.is_dir():
            shutil.rmtree(entry.path)
        elif entry.name.endswith(_SHARED_MEMORY):
            _overwrite(entry.path, bytes(_SHARED_HEADER_BYTES))
        elif entry.name.endswith(LOG):
            os.truncate(entry.path, 0)
        elif entry.name not in image and entry.name not in _LEFT_ALONE:
            os.unlink(entry.path)
    for name, content in image.items():
        _overwrite(folder / name, content)
        os.truncate(folder / name, len(content))


def _overwrite(path: str | Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)


def nobody_reads(connection: sqlite3.Connection) -> bool:
    """Tell whether no cursor holds a state of the file: a checkpoint has to wait for each."""
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError:
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout = {opening.BUSY_TIMEOUT_MS}")
    return not is_busy


class Handles:
    """Connections to folders' files that outlive the stores which opened them.

    Opening a file anew and compiling every statement again is most of what a start costs. What lets
    go of a folder's files has them put back next, with their shared memory made invalid: SQLite
    then recovers the log, as it does for the first who opens a file. It forgets its pages by itself
    only if the log's header is another one, and those of two empty logs are alike.
    """

    def __init__(self) -> None:
        self._left: dict[Path, list[sqlite3.Connection]] = {}

    def take_from(self, store: LocalStore, folder: Path) -> None:
        """Take a dead process's connections from it."""
        file = store._file
        is_mine = file._identity is not None and file._identity == file._identity_on_disk()
        connections = file._let_go()
        for connection in connections:
            connection.rollback()
        if is_mine and len(connections) == 2 and nobody_reads(connections[1]):
            self._left[folder] = connections
        else:
            file_forks.close_all(connections)

    @contextmanager
    def handed_down(self, folder: Path) -> Iterator[None]:
        """Let whoever opens a folder's file in the block go on with its connections."""
        connect, left = opening.connect, self._left.pop(folder, [])  # the reader's, the writer's
        for connection in left:
            connection.execute("PRAGMA shrink_memory")

        def connect_again(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
            return left.pop() if left else connect(path, readonly=readonly)

        opening.connect = connect_again
        try:
            yield
        finally:
            opening.connect = connect
            file_forks.close_all(left)

    def drop(self, folder: Path) -> None:
        """Close what is left of a folder: the next process is to open it itself."""
        file_forks.close_all(self._left.pop(folder, []))
