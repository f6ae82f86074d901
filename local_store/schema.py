"""The buffer file: its tables, its pragmas, and how two first starts at once stay harmless.

    logs      the identities this file has had: a copy found elsewhere starts a new one
    op_log    one row per transaction: `position` orders the file, `seq` (gap-free) its log; its
              `state` says where it stands
    touches   which unsettled transaction wrote which row: pending marks, predecessors
    rows      the merged local copy: what the API reads back at once
    totals    one row of running counts, so that no write has to count

WAL with synchronous=FULL is the only mode called durable here: a commit returns after the fsync of
the write-ahead log. NORMAL loses acknowledged commits at a power loss.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path

import orjson
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from local_store.errors import DiskFailed, LocalStoreError, SchemaTooNew, StoreCorrupt

FILE_NAME = "buffer.db"
LOCK_NAME = "buffer.lock"
FLUSHER_LOCK_NAME = "flusher.lock"
BUSY_TIMEOUT_MS = 5_000  # only readers can meet a lock: writers queue on the folder's flock
CACHED_STATEMENTS = 128

migrations = Migrations("local_store")


@migrations()
def create_op_log(db: Database) -> None:
    """Create the tables of the first version."""
    db.conn.execute(
        """
        CREATE TABLE op_log (
            position     INTEGER PRIMARY KEY,
            log          INTEGER NOT NULL,
            seq          INTEGER NOT NULL,
            txn_id       TEXT NOT NULL UNIQUE,
            user_id      TEXT NOT NULL,
            digest       TEXT NOT NULL,
            accepted_at  TEXT NOT NULL,
            ops          TEXT NOT NULL,
            before       TEXT NOT NULL,
            children     TEXT NOT NULL,
            records      TEXT NOT NULL DEFAULT '[]',
            bases        TEXT,
            versions     TEXT,
            size_bytes   INTEGER NOT NULL,
            schema_version INTEGER NOT NULL,
            state        TEXT NOT NULL DEFAULT 'pending',
            parked       INTEGER NOT NULL DEFAULT 0,
            attempts     INTEGER NOT NULL DEFAULT 0,
            due_at       REAL NOT NULL DEFAULT 0,
            held_since   TEXT,
            settled_at   TEXT,
            reply        TEXT,
            UNIQUE (log, seq)
        ) STRICT
        """
    )
    undelivered = "state IN ('pending', 'held') AND parked = 0"
    # due_at stands in each, so that a long backlog which isn't due is passed over in the index.
    db.conn.execute(
        f"CREATE INDEX op_log_undelivered ON op_log (position, log, due_at) WHERE {undelivered}"
    )
    db.conn.execute(
        "CREATE INDEX op_log_in_turn ON op_log (log, user_id, position, due_at)"
        f" WHERE {undelivered}"
    )
    db.conn.execute("CREATE INDEX op_log_held ON op_log (due_at) WHERE state = 'held'")
    db.conn.execute("CREATE INDEX op_log_parked ON op_log (log, position, due_at) WHERE parked = 1")
    db.conn.execute(
        """
        CREATE TABLE touches (
            tbl TEXT NOT NULL, id TEXT NOT NULL, position INTEGER NOT NULL,
            PRIMARY KEY (tbl, id, position)
        ) STRICT, WITHOUT ROWID
        """
    )
    db.conn.execute("CREATE INDEX touches_position ON touches (position)")
    db.conn.execute(
        """
        CREATE TABLE rows (
            tbl        TEXT NOT NULL,
            id         TEXT NOT NULL,
            user_id    TEXT NOT NULL,
            parent_id  TEXT,
            body       TEXT NOT NULL,
            base       TEXT,
            touched_at TEXT NOT NULL,
            version    INTEGER NOT NULL,
            changed_at INTEGER NOT NULL,
            deleted    INTEGER NOT NULL DEFAULT 0,
            UNIQUE (tbl, id)
        ) STRICT
        """
    )
    db.conn.execute("CREATE INDEX rows_of_user ON rows (user_id, tbl, id)")
    db.conn.execute("CREATE INDEX rows_of_parent ON rows (parent_id, tbl)")
    db.conn.execute(
        """
        CREATE TABLE totals (
            only            INTEGER PRIMARY KEY CHECK (only = 1),
            last_position   INTEGER NOT NULL,
            log             INTEGER NOT NULL,
            last_seq        INTEGER NOT NULL,
            change_counter  INTEGER NOT NULL,
            unsettled       INTEGER NOT NULL,
            unsettled_bytes INTEGER NOT NULL
        ) STRICT
        """
    )
    db.conn.execute("INSERT INTO totals VALUES (1, 0, 0, 0, 0, 0, 0)")
    db.conn.execute(
        """
        CREATE TABLE logs (
            ordinal  INTEGER PRIMARY KEY,
            log_id   TEXT NOT NULL UNIQUE,
            device   INTEGER NOT NULL,
            inode    INTEGER NOT NULL,
            last_seq INTEGER NOT NULL DEFAULT 0
        ) STRICT
        """
    )


@contextmanager
def folder_lock(lock_fd: int) -> Iterator[None]:
    """Hold the folder's lock against other processes.

    It covers each write and each checkpoint, because SQLite before 3.51.3 can corrupt a WAL whose
    reset by one connection races a commit by another; and it makes simultaneous first starts queue.
    """
    flock(lock_fd, LOCK_EX)
    try:
        yield
    finally:
        flock(lock_fd, LOCK_UN)


def make_folder(folder: Path) -> None:
    """Create the folder (mode 0700) and sync the entries that lead to it.

    A synced file in a folder whose own entry was never synced can vanish with it at a power loss.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def clean_error(path: Path, error: BaseException) -> LocalStoreError | None:
    """Say in this package's words what SQLite reported; None for anything else."""
    code = getattr(error, "sqlite_errorcode", None)
    undecodable = isinstance(error, sqlite3.OperationalError) and code is None
    if undecodable or isinstance(error, UnicodeDecodeError | orjson.JSONDecodeError):
        return StoreCorrupt(path, "damaged text")  # the original message quotes users' data
    if not isinstance(error, sqlite3.DatabaseError) or code is None:
        return None
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorrupt(path, str(error))
    return DiskFailed(f"{path}: {error}; nothing was written")


def open_file(path: Path, log_id: str) -> sqlite3.Connection:
    """Open or create the buffer file; the folder lock is held.

    Raises StoreCorrupt, SchemaTooNew, or sqlite3.Error when the disk refuses.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = connect(path)
    try:
        migrate(connection)
        _identify(connection, path, log_id)
        # A process that died between writing the log and syncing it leaves a transaction that
        # everybody can read and a power loss can take. Its caller repeats the txn_id and is
        # acknowledged without a write, so what was found here is made durable first.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def connect(path: Path) -> sqlite3.Connection:
    """Open the file for writing; raises sqlite3.DatabaseError when it isn't a database.

    Transactions are opened by hand (`isolation_level=None`), always with BEGIN IMMEDIATE: a
    deferred one that turns to writing gets SQLITE_BUSY at once, whatever the busy timeout.
    """
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=CACHED_STATEMENTS
    )
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest schema; the folder lock is held."""
    db = Database(connection)
    known = [migration.name for migration in migrations._migrations]
    foreign = [m.name for m in migrations.applied(db) if m.name not in known]
    if foreign:
        raise SchemaTooNew(foreign[-1], known[-1])
    if migrations.pending(db):
        migrations.apply(db)


def _identify(connection: sqlite3.Connection, path: Path, log_id: str) -> None:
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
    if known != identity:
        connection.execute("BEGIN IMMEDIATE")
        start_log(connection, log_id, identity)
        connection.execute("COMMIT")


def start_log(
    connection: sqlite3.Connection, log_id: str, identity: tuple[int, int] | None = None
) -> int:
    """Begin a new log in the open transaction; returns its ordinal."""
    log, last_seq = connection.execute("SELECT log, last_seq FROM totals").fetchone()
    connection.execute("UPDATE logs SET last_seq = ? WHERE ordinal = ?", (last_seq, log))
    if identity is None:
        identity = connection.execute(
            "SELECT device, inode FROM logs WHERE ordinal = ?", (log,)
        ).fetchone()
    ordinal = int(log) + 1
    connection.execute(
        "INSERT INTO logs (ordinal, log_id, device, inode) VALUES (?, ?, ?, ?)",
        (ordinal, log_id, *(identity or (0, 0))),
    )
    connection.execute("UPDATE totals SET log = ?, last_seq = 0", (ordinal,))
    return ordinal


def read_log_id(connection: sqlite3.Connection) -> str:
    """Return the identity of this file's life, the newest of them."""
    with closing(
        connection.execute("SELECT log_id FROM logs ORDER BY ordinal DESC LIMIT 1")
    ) as cursor:
        return str(cursor.fetchone()[0])
