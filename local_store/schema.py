"""The buffer file: its tables, its pragmas, and how two first starts at once stay harmless.

    op_log      one row per transaction: `position` orders the file, `seq` (gap-free) its log; its
                `state` says where it stands
    rows        rows as the server is known to have them: what a reader sees is a row here plus
                what its touches bring
    touches     which transaction changed which row, while that still matters for reading it
    names, places, turns   where a txn_id and a seq is found, and whose undelivered work is where
    logs        the identities this file has had: a copy found elsewhere starts a new one
    totals      one row of marks: what op_log alone can't tell
    quarantine  records that failed their checksum, as they were found

Accepting a transaction appends to op_log and to nothing else: no row is merged, no count is kept,
no index is searched while callers wait for the disk. Touches, names, places and turns follow behind
(listing.py); `totals.listed` says how far.

WAL with synchronous=FULL is the only mode called durable here: a commit returns after the fsync of
the write-ahead log. NORMAL loses acknowledged commits at a power loss.
"""

from __future__ import annotations

import sqlite3
import zlib
from contextlib import closing
from functools import cache

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

CONTENT = (
    "position, log, seq, txn_id, user_id, digest, accepted_at, ops, before, children, records,"
    " schemas, size_bytes, total_bytes"
)
STATUS = (
    "position, state, parked, attempts, due_at, held_since, settled_at, reply, bases, versions,"
    " sealed"
)
_TEXT = (
    "txn_id, user_id, digest, accepted_at, ops, before, children, records, schemas, state,"
    " held_since, settled_at, reply, bases, versions, sealed"
)
_ROW_TEXT = "tbl, id, user_id, parent_id, body, base, met"
ROW = "tbl, id, user_id, parent_id, body, base, met, version, changed_at"

# Stages of a touch. Only a REPLAYED one is not part of what a reader sees: its row has it already.
PENDING, REPLAYED, SETTLED = 0, 1, 2

migrations = Migrations("local_store")


def seal(*values: bytes | None) -> int:
    """Return the CRC-32 of a record's columns, each as SQLite casts it to bytes."""
    return crc_of(b"\x1f".join([b"\x00" if value is None else value for value in values]))


def crc_of(*parts: bytes) -> int:
    """Return the CRC-32 of bytes that follow each other, without copying them together."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _seal(columns: str, of: str = "") -> str:
    """Return the SQL that computes a record's seal; text is cast, since damaged text won't pass."""
    return f"seal({', '.join(f'CAST({of}{c.strip()} AS BLOB)' for c in columns.split(','))})"


def _is_text(columns: str, of: str) -> str:
    """Return the SQL that tells bytes from text: their casts are the same."""
    return " AND ".join(f"typeof({of}{c.strip()}) <> 'blob'" for c in columns.split(","))


@cache  # asked for with nearly every statement, and always the same text
def intact(of: str = "") -> str:
    """Return the SQL that tells whether an op_log row is as it was written."""
    # A status that never changed has no checksum: it must be what every record begins with.
    untouched = " AND ".join(
        f"{of}{column}"
        for column in (
            "state = 'pending'",
            "parked = 0",
            "attempts = 0",
            "due_at = 0",
            "held_since IS NULL",
            "settled_at IS NULL",
            "reply IS NULL",
            "bases IS NULL",
            "versions IS NULL",
            "sealed IS NULL",
        )
    )
    status = f"CASE WHEN {of}status_crc IS NULL THEN {untouched}"
    return (
        f"({of}content_crc = {_seal(CONTENT, of)} AND {_is_text(_TEXT, of)}"
        f" AND {status} ELSE {of}status_crc = {_seal(STATUS, of)} END)"
    )


@cache
def row_intact(of: str = "") -> str:
    """Return the SQL that tells whether a row of `rows` is as it was written."""
    return f"({of}crc = {_seal(ROW, of)} AND {_is_text(_ROW_TEXT, of)})"


AGE = "created_at"  # the column by which rows are listed


def age_of(of: str = "") -> str:
    """Return the SQL of when a row was made; nothing for a body that isn't JSON any more."""
    return f"CASE WHEN json_valid({of}body) THEN json_extract({of}body, '$.{AGE}') END"


_TABLES = (
    """
    CREATE TABLE op_log (
        position     INTEGER PRIMARY KEY,
        log          INTEGER NOT NULL,
        seq          INTEGER NOT NULL,
        user_id      TEXT NOT NULL,
        state        TEXT NOT NULL DEFAULT 'pending',
        parked       INTEGER NOT NULL DEFAULT 0,
        due_at       REAL NOT NULL DEFAULT 0,
        txn_id       TEXT NOT NULL,
        digest       TEXT NOT NULL,
        accepted_at  TEXT NOT NULL,
        size_bytes   INTEGER NOT NULL,
        total_bytes  INTEGER NOT NULL,
        content_crc  INTEGER NOT NULL,
        status_crc   INTEGER,
        attempts     INTEGER NOT NULL DEFAULT 0,
        held_since   TEXT,
        settled_at   TEXT,
        schemas      TEXT NOT NULL,
        ops          TEXT NOT NULL,
        before       TEXT NOT NULL,
        children     TEXT NOT NULL,
        records      TEXT NOT NULL DEFAULT '[]',
        bases        TEXT,
        versions     TEXT,
        reply        TEXT,
        sealed       TEXT
    ) STRICT
    """,
    "CREATE INDEX op_log_held ON op_log (due_at) WHERE state = 'held'",
    "CREATE INDEX op_log_parked ON op_log (log, position, due_at) WHERE parked = 1",
    "CREATE INDEX op_log_settled ON op_log (settled_at) WHERE settled_at IS NOT NULL",
    """
    CREATE TABLE touches (
        tbl TEXT NOT NULL, id TEXT NOT NULL, position INTEGER NOT NULL,
        parent_id TEXT, stage INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (tbl, id, position)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX touches_position ON touches (position)",
    "CREATE INDEX touches_of_parent ON touches (parent_id, tbl) WHERE parent_id IS NOT NULL",
    "CREATE INDEX touches_settled ON touches (position) WHERE stage = 2",
    """
    CREATE TABLE rows (
        tbl        TEXT NOT NULL,
        id         TEXT NOT NULL,
        user_id    TEXT NOT NULL,
        parent_id  TEXT,
        base       TEXT,
        met        TEXT,
        version    INTEGER NOT NULL,
        changed_at INTEGER NOT NULL,
        crc        INTEGER NOT NULL DEFAULT 0,
        body       TEXT,
        UNIQUE (tbl, id)
    ) STRICT
    """,
    "CREATE INDEX rows_of_user ON rows (user_id, tbl, id)",
    "CREATE INDEX rows_of_parent ON rows (parent_id, tbl, changed_at)",
    "CREATE INDEX rows_by_age ON rows (changed_at)",
    f"CREATE INDEX rows_by_creation ON rows (user_id, tbl, {age_of()}, id)"
    " WHERE parent_id IS NULL AND body IS NOT NULL",
    "CREATE TABLE names (txn_id TEXT PRIMARY KEY, position INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE places (log INTEGER NOT NULL, seq INTEGER NOT NULL, position INTEGER NOT NULL,"
    " PRIMARY KEY (log, seq)) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE turns (
        log INTEGER NOT NULL, user_id TEXT NOT NULL, position INTEGER NOT NULL,
        due_at REAL NOT NULL,
        PRIMARY KEY (log, user_id, position)
    ) STRICT, WITHOUT ROWID
    """,
    # due_at stands in it, so that a long backlog which isn't due is passed over in the index.
    "CREATE INDEX turns_by_position ON turns (position, log, due_at)",
    """
    CREATE TABLE totals (
        only            INTEGER PRIMARY KEY CHECK (only = 1),
        last_position   INTEGER NOT NULL DEFAULT 0,
        log             INTEGER NOT NULL DEFAULT 0,
        last_seq        INTEGER NOT NULL DEFAULT 0,
        total_bytes     INTEGER NOT NULL DEFAULT 0,
        closed          INTEGER NOT NULL DEFAULT 0,
        closed_bytes    INTEGER NOT NULL DEFAULT 0,
        listed          INTEGER NOT NULL DEFAULT 0,
        change_counter  INTEGER NOT NULL DEFAULT 0,
        version_floor   INTEGER NOT NULL DEFAULT 0,
        rows_bytes      INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "INSERT INTO totals (only) VALUES (1)",
    """
    CREATE TABLE logs (
        ordinal  INTEGER PRIMARY KEY,
        log_id   TEXT NOT NULL UNIQUE,
        device   INTEGER NOT NULL,
        inode    INTEGER NOT NULL,
        last_seq INTEGER NOT NULL DEFAULT 0,
        lost     INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    """
    CREATE TABLE quarantine (
        position INTEGER PRIMARY KEY, log INTEGER, seq INTEGER, record TEXT, found_at TEXT NOT NULL
    ) STRICT
    """,
    "CREATE TABLE schemas (tbl TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT",
)
_TRIGGERS = (
    # Whatever changes a record seals it again; so nothing but this code can change one.
    f"CREATE TRIGGER op_log_content AFTER UPDATE OF {CONTENT} ON op_log BEGIN"
    f" UPDATE op_log SET content_crc = {_seal(CONTENT, 'new.')} WHERE position = new.position; END",
    f"CREATE TRIGGER op_log_status AFTER UPDATE OF {STATUS} ON op_log BEGIN"
    f" UPDATE op_log SET status_crc = {_seal(STATUS, 'new.')} WHERE position = new.position; END",
    f"CREATE TRIGGER rows_inserted AFTER INSERT ON rows BEGIN"
    f" UPDATE rows SET crc = {_seal(ROW, 'new.')} WHERE rowid = new.rowid;"
    " UPDATE totals SET rows_bytes = rows_bytes + coalesce(length(new.body), 0) + 200; END",
    f"CREATE TRIGGER rows_updated AFTER UPDATE OF {ROW} ON rows BEGIN"
    f" UPDATE rows SET crc = {_seal(ROW, 'new.')} WHERE rowid = new.rowid;"
    " UPDATE totals SET rows_bytes = rows_bytes + coalesce(length(new.body), 0)"
    "  - coalesce(length(old.body), 0); END",
    "CREATE TRIGGER rows_deleted AFTER DELETE ON rows BEGIN"
    " UPDATE totals SET rows_bytes = rows_bytes - coalesce(length(old.body), 0) - 200; END",
    # A listed transaction stands in `turns` exactly while it is undelivered.
    "CREATE TRIGGER turns_kept AFTER UPDATE OF state, parked, due_at, log ON op_log BEGIN"
    " DELETE FROM turns WHERE log = old.log AND user_id = old.user_id AND position = old.position;"
    " INSERT INTO turns SELECT new.log, new.user_id, new.position, new.due_at"
    "  WHERE new.state IN ('pending', 'held') AND new.parked = 0; END",
    "CREATE TRIGGER places_kept AFTER UPDATE OF log, seq ON op_log BEGIN"
    " DELETE FROM places WHERE log = old.log AND seq = old.seq;"
    " INSERT INTO places VALUES (new.log, new.seq, new.position); END",
    "CREATE TRIGGER op_log_ended AFTER DELETE ON op_log BEGIN"
    " DELETE FROM names WHERE txn_id = old.txn_id;"
    " DELETE FROM places WHERE log = old.log AND seq = old.seq;"
    " DELETE FROM turns WHERE log = old.log AND user_id = old.user_id AND position = old.position;"
    " END",
)


_MADE = frozenset(
    text.strip() for text in (*_TABLES, *_TRIGGERS) if text.lstrip().startswith("CREATE")
)


def is_whole(connection: sqlite3.Connection) -> bool:
    """Tell whether every table, index and trigger is as it was made: no record of it suffices."""
    stored = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {text.strip() for (text,) in stored} >= _MADE


@migrations()
def create_buffer(db: Database) -> None:
    """Create the tables of the first version."""
    for statement in (*_TABLES, *_TRIGGERS):
        db.conn.execute(statement)


def start_log(
    connection: sqlite3.Connection, log_id: str, identity: tuple[int, int] | None = None
) -> int:
    """Begin a new log in the open transaction; returns its ordinal."""
    (log,) = connection.execute("SELECT log FROM totals").fetchone()
    connection.execute(
        "UPDATE logs SET last_seq = max(last_seq, coalesce("
        " (SELECT max(seq) FROM places WHERE log = ?1), 0), (SELECT last_seq FROM totals))"
        " WHERE ordinal = ?1",
        (log,),
    )
    if identity is None:
        identity = connection.execute(
            "SELECT device, inode FROM logs WHERE ordinal = ?", (log,)
        ).fetchone()
    (newest,) = connection.execute("SELECT coalesce(max(ordinal), 0) FROM logs").fetchone()
    ordinal = max(int(log), int(newest)) + 1
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
