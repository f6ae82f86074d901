"""A buffer file that SQLite can't use any more: moved aside, and what it still holds carried over.

Nothing is deleted: the damaged file stays in `quarantine/`, with a report beside it. Every record
that passes its checksum comes into the new file, in the log and at the seq it had. Where a disk
fails or the process dies before the new file is durable, the next start does all of it anew.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from local_store import opening, schema
from local_store.door import canonical_uuid
from local_store.pages import Pages

FOLDER_NAME = "quarantine"
UNFINISHED = "unfinished"  # stands beside a file that was moved aside, until the new one is durable
PAGE_BYTES = 4_096
_VALID_FOR = 92  # in the header: for which change the size in the header is valid
AT_ONCE = 200
UNREADABLE = (sqlite3.Error, UnicodeDecodeError, TypeError, AttributeError)  # damaged as they come
_READING = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ)  # a bad spot on the disk
_MACHINE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
)
UNREADABLE_MAX = 5_000  # positions tried one by one behind the last readable record


def free_folder(folder: Path) -> Path:
    """Make a fresh folder in the quarantine."""
    number = 1
    while (target := folder / FOLDER_NAME / str(number)).exists():
        number += 1
    opening.make_folder(target.parent)
    opening.make_folder(target)
    return target


def unfinished(folder: Path) -> Path | None:
    """Return where a file was moved to that nothing durable has replaced yet."""
    return next((mark.parent for mark in (folder / FOLDER_NAME).glob(f"*/{UNFINISHED}")), None)


def move_aside(folder: Path) -> Path:
    """Move the buffer file, and what belongs to it, into a fresh folder of the quarantine.

    Where an earlier attempt moved it already, what stands in its place goes: it was never used.
    """
    target = unfinished(folder)
    if target is None:
        target = free_folder(folder)
        os.close(os.open(target / UNFINISHED, os.O_WRONLY | os.O_CREAT, 0o600))
        opening.sync_folder(target)
    was_moved = (target / opening.FILE_NAME).exists()
    for suffix in ("-shm", "-wal", ""):  # the file goes last: while it stands, all is still to do
        name = opening.FILE_NAME + suffix
        with suppress(FileNotFoundError):
            if was_moved:
                os.unlink(folder / name)
            else:
                os.rename(folder / name, target / name)
    opening.sync_folder(target)
    opening.sync_folder(folder)
    return target


def finish(moved: Path) -> None:
    """Note that what a file still held is durable in the one that replaced it."""
    os.unlink(moved / UNFINISHED)
    opening.sync_folder(moved)


@contextmanager
def _despite_damage() -> Iterator[None]:
    """Go on behind what is damaged; a disk that is full or refuses isn't damage, and stops all."""
    try:
        yield
    except UNREADABLE as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code not in _READING and code & 0xFF in _MACHINE:
            raise


def carry_over(fresh: sqlite3.Connection, moved: Path, cause: str, found_at: str) -> None:
    """Copy what is intact into a new, empty buffer file; the caller lists it afterwards.

    First through SQLite, then, what that can't reach any more, from the pages themselves.
    Raises sqlite3.Error or OSError when the disk refuses.
    """
    copy = moved / "salvage.db"
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(moved / (opening.FILE_NAME + suffix), f"{copy}{suffix}")
    counts = {"records": 0, "from_pages": 0, "damaged": 0, "rows": 0}
    fresh.execute("BEGIN IMMEDIATE")
    with _despite_damage(), closing(_open_damaged(copy)) as source:
        with _despite_damage():  # what one part lost doesn't take the others along
            _copy_logs(source, fresh)
        with _despite_damage():
            _copy_records(source, fresh, counts)
        with _despite_damage():
            _copy_rows(source, fresh, counts)
    with _despite_damage():
        _copy_from_pages(moved, fresh, counts)
    fresh.execute("COMMIT")
    _remove(copy)
    report = {"found_at": found_at, "cause": cause, **counts}
    (moved / "report.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    os.chmod(moved / "report.json", 0o600)


def _remove(copy: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(f"{copy}{suffix}")


def _open_damaged(copy: Path) -> sqlite3.Connection:
    """Open a damaged file; where its header or schema is gone, with those of a new one.

    The tables are made in one order, so their roots are on the same pages in every buffer file.
    """
    with _despite_damage():
        return _readable(copy)
    pattern = copy.with_name("new.db")
    _remove(pattern)  # of an attempt that died
    opening.open_file(pattern).close()
    with open(pattern, "rb") as source, open(copy, "r+b") as target:
        for number in _schema_pages(source.read(PAGE_BYTES)):
            source.seek((number - 1) * PAGE_BYTES)
            target.seek((number - 1) * PAGE_BYTES)
            target.write(source.read(PAGE_BYTES))
        target.seek(_VALID_FOR)
        target.write(bytes(4))  # the size in the header isn't this file's: let SQLite measure it
    _remove(pattern)
    return _readable(copy, log_too=False)  # what else it holds is worth having without the log


def _schema_pages(first: bytes) -> list[int]:
    """Return the pages of the schema's B-tree: the first, and the leaves it points to.

    The page's layout is that of https://sqlite.org/fileformat2.html, section 1.6; the schema is
    larger than a page, so the first one only points to others.
    """
    _, _, cells, _, _, last = struct.unpack_from(">BHHHBI", first, 100)
    pointers = struct.unpack_from(f">{cells}H", first, 112)
    return [1, *(struct.unpack_from(">I", first, at)[0] for at in pointers), last]


def _readable(copy: Path, *, log_too: bool = True) -> sqlite3.Connection:
    connection = opening.connect(copy, readonly=True)
    try:
        connection.text_factory = bytes  # damaged text must not stop the reading
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if log_too:
            connection.execute("SELECT position FROM op_log LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _copy_logs(source: sqlite3.Connection, fresh: sqlite3.Connection) -> None:
    try:
        found = source.execute(
            "SELECT ordinal, CAST(log_id AS BLOB), device, inode, last_seq FROM logs"
        ).fetchall()
        totals = source.execute(
            "SELECT last_position, log, last_seq, total_bytes, change_counter, version_floor"
            " FROM totals"
        ).fetchone()
    except sqlite3.DatabaseError:
        return
    fresh.execute("DELETE FROM logs")
    fresh.executemany(
        "INSERT OR IGNORE INTO logs (ordinal, log_id, device, inode, last_seq)"
        " VALUES (?, ?, 0, 0, ?)",
        [
            (ordinal, name, end)
            for ordinal, log_id, _, _, end in found
            if (name := canonical_uuid(log_id.decode("ascii", "replace"))) is not None
        ],
    )
    if totals is not None:
        fresh.execute(
            "UPDATE totals SET last_position = ?, log = ?, last_seq = ?, total_bytes = ?,"
            " change_counter = ? + 1000, version_floor = ?",
            totals,
        )


def name_logs(
    fresh: sqlite3.Connection, mark: tuple[str, int] | None, ids: Callable[[], str]
) -> None:
    """Give logs whose names were unreadable others: the mark's to the newest, if it is free.

    The server knows what it has by txn_id, whichever log brings it again.
    """
    known = {log_id for (log_id,) in fresh.execute("SELECT log_id FROM logs")}
    nameless = fresh.execute(
        "SELECT DISTINCT log FROM op_log WHERE log NOT IN (SELECT ordinal FROM logs)"
        " ORDER BY log DESC"
    ).fetchall()
    for (ordinal,) in nameless:
        log_id = mark[0] if mark is not None and mark[0] not in known else ids()
        known.add(log_id)
        fresh.execute(
            "INSERT INTO logs (ordinal, log_id, device, inode, last_seq)"
            " SELECT ?1, ?2, 0, 0, max(seq) FROM op_log WHERE log = ?1",
            (ordinal, log_id),
        )


def _copy_records(
    source: sqlite3.Connection, fresh: sqlite3.Connection, counts: dict[str, int]
) -> None:
    columns = [row[1].decode() for row in source.execute("PRAGMA table_info(op_log)")]
    names = ", ".join(columns)
    marks = ", ".join("?" * len(columns))
    statement = f"SELECT {names}, coalesce({schema.intact()}, false) FROM op_log"
    for record in _walk(source, statement, "position"):
        if not record[-1]:
            counts["damaged"] += 1
            continue
        values = [v.decode() if isinstance(v, bytes) else v for v in record[:-1]]
        fresh.execute(f"INSERT OR IGNORE INTO op_log ({names}) VALUES ({marks})", values)
        counts["records"] += 1


def _copy_from_pages(moved: Path, fresh: sqlite3.Connection, counts: dict[str, int]) -> None:
    """Copy the records that no page above leads to any more.

    A page that was freed may hold a record as it was before its last change, and its newest state
    may be what is lost: then a settled transaction is pending again. To send it again is harmless.
    """
    shape = [(str(name), str(kind)) for _, name, kind, *_ in fresh.execute(
        "PRAGMA table_info(op_log)"
    )]  # fmt: skip
    names = ", ".join(name for name, _ in shape)
    given = ", ".join(f"? AS {name}" for name, _ in shape)
    # Nothing twice, whatever it is known by: they are made anew when all is there.
    fresh.execute("INSERT OR IGNORE INTO names SELECT txn_id, position FROM op_log")
    fresh.execute("INSERT OR IGNORE INTO places SELECT log, seq, position FROM op_log")
    statement = (
        f"INSERT OR IGNORE INTO op_log ({names}) SELECT * FROM (SELECT {given}) r"
        f" WHERE {schema.intact('r.')}"
        " AND NOT EXISTS (SELECT 1 FROM names n WHERE n.txn_id = r.txn_id)"
        " AND NOT EXISTS (SELECT 1 FROM places p WHERE p.log = r.log AND p.seq = r.seq)"
    )
    wal = moved / f"{opening.FILE_NAME}-wal"
    with closing(Pages(moved / opening.FILE_NAME, wal)) as pages:
        for record in pages.records([kind for _, kind in shape]):
            if fresh.execute(statement, record).rowcount > 0:
                known = dict(zip((name for name, _ in shape), record, strict=True))
                place = known["log"], known["seq"], known["position"]
                fresh.execute("INSERT INTO names VALUES (?, ?)", (known["txn_id"], place[2]))
                fresh.execute("INSERT INTO places VALUES (?, ?, ?)", place)
                counts["from_pages"] += 1


def _copy_rows(
    source: sqlite3.Connection, fresh: sqlite3.Connection, counts: dict[str, int]
) -> None:
    statement = (
        "SELECT rowid, tbl, id, user_id, parent_id, base, met, version, changed_at, body,"
        f" coalesce({schema.row_intact()}, false) FROM rows"
    )
    for record in _walk(source, statement, "rowid"):
        if record[-1]:
            values = [v.decode() if isinstance(v, bytes) else v for v in record[1:-1]]
            fresh.execute(
                "INSERT OR IGNORE INTO rows"
                " (tbl, id, user_id, parent_id, base, met, version, changed_at, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            counts["rows"] += 1


def _walk(source: sqlite3.Connection, statement: str, key: str) -> Iterator[tuple[Any, ...]]:
    """Yield a table's records by key; around unreadable pages one by one."""
    after, failures = 0, 0
    while failures < UNREADABLE_MAX:
        try:
            found = source.execute(
                f"{statement} WHERE {key} > ? ORDER BY {key} LIMIT {AT_ONCE}", (after,)
            ).fetchall()
            if not found:
                return
            if not after < int(found[0][0]) <= int(found[-1][0]):
                raise sqlite3.DatabaseError  # out of order: this would never end
            yield from found
            after, failures = int(found[-1][0]), 0
        except sqlite3.DatabaseError:
            for number in range(after + 1, after + AT_ONCE + 1):
                with suppress(sqlite3.DatabaseError):
                    one = source.execute(f"{statement} WHERE {key} = ?", (number,)).fetchone()
                    if one is not None:
                        failures = 0
                        yield one
                        continue
                failures += 1
            after += AT_ONCE
