"""Opening the buffer file: durably, with one schema, as one identity; two first starts at once too.

What SQLite reports while it is open is put into this package's words here.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path

import orjson
from sqlite_utils import Database

from local_store import file_locks, forks
from local_store.errors import DiskFailed, LocalStoreError, SchemaTooNew, StoreCorrupt
from local_store.schema import is_whole, migrations, seal, start_log

FILE_NAME = "buffer.db"
LOCK_NAME = "buffer.lock"
FLUSHER_LOCK_NAME = "flusher.lock"
POLL_S = 0.005  # between two looks at a lock that can't be waited for with a limit
BUSY_TIMEOUT_MS = 5_000  # only readers can meet a lock: writers queue on the folder's flock
CACHED_STATEMENTS = 512  # the text of an insert varies with the size of its group
WAL_BYTES_KEPT = 8 * 1024 * 1024  # twice what a checkpoint finds: cut after a reader made it grow


class _Turn(forks.Forkable):
    """An open flusher lock: it belongs to the open file, which a forked child shares.

    The child closes it at once; kept, it would prolong its parent's turn beyond that one's end.
    """

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder / FLUSHER_LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Leave the turn to the parent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def end(self) -> None:
        """End the turn, at once even if a child was forked just now; in the child do nothing."""
        if self.descriptor >= 0:
            flock(self.descriptor, LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


@contextmanager
def flusher_lock(folder: Path) -> Iterator[bool]:
    """Hold a folder's flusher lock; yields False when somebody else holds it.

    The lock belongs to an open file of its own, so it ends with the block or with the process.
    """
    turn = _Turn(folder)
    try:
        try:
            flock(turn.descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        turn.end()


@contextmanager
def folder_lock(lock_fd: int) -> Iterator[None]:
    """Hold the folder's lock against other processes.

    It covers each write and each checkpoint, because SQLite before 3.51.3 can corrupt a WAL whose
    reset by one connection races a commit by another; and it makes simultaneous first starts queue.
    """
    file_locks.take(lock_fd)
    try:
        yield
    finally:
        file_locks.leave(lock_fd)


@contextmanager
def folder_lock_within(lock_fd: int, seconds: float) -> Iterator[bool]:
    """Hold the folder's lock; yields False when it isn't to be had for that long."""
    never = threading.Event()
    for _ in range(max(1, int(seconds / POLL_S))):
        try:
            flock(lock_fd, LOCK_EX | LOCK_NB)
            break
        except BlockingIOError:
            never.wait(POLL_S)
    else:
        yield False
        return
    try:
        yield True
    finally:
        flock(lock_fd, LOCK_UN)


def make_folder(folder: Path) -> None:
    """Create the folder (mode 0700) and sync the entries that lead to it.

    A synced file in a folder whose own entry was never synced can vanish with it at a power loss.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: names, not contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_undecodable(error: BaseException) -> bool:
    """Tell whether a record holds what isn't text or JSON any more."""
    code = getattr(error, "sqlite_errorcode", None)
    no_text = isinstance(error, sqlite3.OperationalError) and code is None
    return no_text or isinstance(error, UnicodeDecodeError | orjson.JSONDecodeError)


def is_io_error(error: BaseException) -> bool:
    """Tell whether the disk failed under SQLite."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_IOERR


def is_nonsense(error: BaseException) -> bool:
    """Tell whether SQLite found statements wrong that suit any file which is what it should be."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_ERROR


class SchemaDamaged(sqlite3.DatabaseError):
    """A table, an index or a trigger isn't what it was made to be. Inside this package."""


def is_corrupt(error: BaseException) -> bool:
    """Tell whether the file itself is damaged.

    So it is where a rule of its tables is broken: what is written here keeps them all.
    """
    if isinstance(error, SchemaDamaged | sqlite3.IntegrityError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def clean_error(path: Path, error: BaseException) -> LocalStoreError | None:
    """Say in this package's words what SQLite reported; None for anything else."""
    code = getattr(error, "sqlite_errorcode", None)
    if not isinstance(error, sqlite3.DatabaseError) or code is None:
        return None
    if is_corrupt(error):
        return StoreCorrupt(path, str(error))
    return DiskFailed(f"{path}: {error}; nothing was written")


def open_file(path: Path) -> sqlite3.Connection:
    """Open or create the buffer file; the folder lock is held.

    Raises StoreCorrupt, SchemaTooNew, or sqlite3.Error when the disk refuses.
    """
    # Made by hand for its mode, and only where there is none: closing a descriptor of one's own
    # would drop the locks that another connection of this process holds on the file.
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = connect(path)
    try:
        migrate(connection)
        # A process that died between writing the log and syncing it leaves a transaction that
        # everybody can read and a power loss can take. Its caller repeats the txn_id and is
        # acknowledged without a write, so what was found here is made durable first.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """Open the file; raises sqlite3.DatabaseError when it isn't a database.

    Transactions are opened by hand (`isolation_level=None`), writing ones with BEGIN IMMEDIATE: a
    deferred one that turns to writing gets SQLITE_BUSY at once, whatever the busy timeout.
    Checkpoints are made by hand too, under the folder's lock, by the connection that writes.
    """
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=CACHED_STATEMENTS
    )
    try:
        found = os.stat(path)
        forks.note((found.st_dev, found.st_ino))
        connection.create_function("seal", -1, seal, deterministic=True)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA temp_store = MEMORY")  # a full disk must not stop a statement
        if readonly:
            connection.execute("PRAGMA query_only = ON")
            return connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest schema; the folder lock is held."""
    known = [migration.name for migration in migrations._migrations]
    applied = _applied(connection)
    foreign = [name for name in applied if name not in known]
    if foreign:
        if len(applied) <= len(known) and is_whole(connection):
            raise SchemaDamaged("a migration has another name, and all that it made is there")
        raise SchemaTooNew(foreign[-1], known[-1])
    if set(applied) != set(known):
        migrations.apply(Database(connection))
    if not is_whole(connection):
        raise SchemaDamaged("the schema isn't the one that was made")


def _applied(connection: sqlite3.Connection) -> list[str]:
    """Return what the file has seen of our migrations, in order; looked up with each open."""
    table = migrations.migrations_table
    has_table = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(has_table, (table,)).fetchone() is None:
        return []
    found = connection.execute(
        f"SELECT name FROM {table} WHERE migration_set = ? ORDER BY rowid", (migrations.name,)
    )
    return [name for (name,) in found.fetchall()]


def note_end(connection: sqlite3.Connection, mark: tuple[str, int] | None) -> bool:
    """Compare where the log ends with how far it was acknowledged; in the open transaction.

    Returns True when the end is missing: then it is counted as lost, and nothing is appended where
    something was acknowledged before.
    """
    if mark is None:
        return False
    log_id, seq = mark
    _mend_name(connection, log_id)
    found = connection.execute(
        "SELECT l.ordinal, max(l.last_seq, coalesce((SELECT max(seq) FROM places WHERE log ="
        " l.ordinal), 0), iif(l.ordinal = t.log, t.last_seq, 0)) FROM logs l, totals t"
        " WHERE l.log_id = ?",
        (log_id,),
    ).fetchone()
    if found is None:  # another file stood here; all that is known of it is how far it came
        (ordinal,) = connection.execute("SELECT coalesce(max(ordinal), 0) + 1 FROM logs").fetchone()
        connection.execute(
            "INSERT INTO logs (ordinal, log_id, device, inode, last_seq, lost)"
            " VALUES (?, ?, 0, 0, ?, ?)",
            (ordinal, log_id, seq, seq),
        )
        connection.execute("UPDATE totals SET log = ?, last_seq = ?", (ordinal, seq))
        return True
    ordinal, end = found
    if seq <= end:
        return False
    connection.execute(
        "UPDATE logs SET last_seq = ?, lost = lost + ? WHERE ordinal = ?", (seq, seq - end, ordinal)
    )
    return True


def _mend_name(connection: sqlite3.Connection, marked: str) -> None:
    """Give a log its name back, where one bit of it turned over in the file.

    Names are random: none is a bit away from another by chance. The mark has its own checksum.
    """
    known = connection.execute("SELECT ordinal, log_id FROM logs").fetchall()
    for ordinal, log_id in known:
        differing = int.from_bytes(log_id.encode()) ^ int.from_bytes(marked.encode())
        if differing.bit_count() == 1:
            connection.execute("UPDATE logs SET log_id = ? WHERE ordinal = ?", (marked, ordinal))


def identify(
    connection: sqlite3.Connection, path: Path, log_id: str, *, renew: bool = False
) -> None:
    """Start a log in a fresh file, and in one that was copied or restored from elsewhere.

    Appending to a copy would give out positions that the original gives out too. Inode numbers are
    reused, so this can miss a restore; the server then refuses a position that is taken.
    """
    found = os.stat(path)
    identity = (found.st_dev, found.st_ino)
    with closing(
        connection.execute("SELECT device, inode FROM logs ORDER BY ordinal DESC LIMIT 1")
    ) as cursor:
        known = cursor.fetchone()
    if known != identity or renew:
        connection.execute("BEGIN IMMEDIATE")
        start_log(connection, log_id, identity)
        connection.execute("COMMIT")


def copy(source: sqlite3.Connection, target: Path) -> None:
    """Write a consistent copy of an open file to `target`, durably."""
    os.close(os.open(target, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        source.backup(connection)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(target.parent)
