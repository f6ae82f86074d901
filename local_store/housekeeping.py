"""What the buffer lets go: settled transactions past their time, and copies of clean rows.

Functions take the open connection, in a transaction that writes. Nothing undelivered, parked or
still needed to read a row is ever touched.
"""

from __future__ import annotations

import sqlite3

import orjson

AT_ONCE = 200  # per call: writers wait for about 3 ms meanwhile


def is_due(
    connection: sqlite3.Connection, settled_before: str, cache_bytes_max: int, file_bytes_max: int
) -> bool:
    """Tell whether there is anything to let go; costs a look at two numbers and an index."""
    size_bytes, oldest = connection.execute(
        "SELECT rows_bytes, (SELECT min(settled_at) FROM op_log WHERE settled_at IS NOT NULL)"
        " FROM totals"
    ).fetchone()
    if size_bytes > cache_bytes_max:
        return True
    return oldest is not None and (oldest < settled_before or _is_above(connection, file_bytes_max))


def evict(connection: sqlite3.Connection, cache_bytes_max: int) -> int:
    """Drop the least recently changed clean rows above the limit; returns how many.

    They are the server's and come again with the next read. What was deleted here stays known.
    """
    (size_bytes,) = connection.execute("SELECT rows_bytes FROM totals").fetchone()
    if size_bytes <= cache_bytes_max:
        return 0
    found = connection.execute(
        "SELECT r.rowid, coalesce(length(r.body), 0) + 200, r.version FROM rows r"
        " WHERE r.body IS NOT NULL AND NOT EXISTS"
        "  (SELECT 1 FROM touches t WHERE t.tbl = r.tbl AND t.id = r.id)"
        " ORDER BY r.changed_at LIMIT ?",
        (AT_ONCE,),
    ).fetchall()
    dropped: list[tuple[int, int]] = []
    for rowid, freed, version in found:
        if size_bytes <= cache_bytes_max:
            break
        size_bytes -= freed
        dropped.append((rowid, version))
    _drop_rows(connection, dropped)
    return len(dropped)


def _drop_rows(connection: sqlite3.Connection, dropped: list[tuple[int, int]]) -> None:
    """Drop rows; their versions never come back, or a stale caller could match them."""
    if dropped:
        floor = max(version for _, version in dropped)
        connection.execute("UPDATE totals SET version_floor = max(version_floor, ?)", (floor,))
        connection.executemany("DELETE FROM rows WHERE rowid = ?", [(row,) for row, _ in dropped])


def compact(connection: sqlite3.Connection, settled_before: str, file_bytes_max: int) -> int:
    """Remove settled transactions; returns how many.

    Those settled before `settled_before` go, and while the file is above `file_bytes_max` the
    oldest of the others too. The newest record stays: it tells where the log ends.
    """
    before = "9999" if _is_above(connection, file_bytes_max) else settled_before
    found = connection.execute(
        "SELECT position, children, ops FROM op_log WHERE settled_at < ?"
        " AND position < (SELECT max(position) FROM op_log)"
        " AND position NOT IN (SELECT position FROM touches WHERE stage = 2)"
        " ORDER BY settled_at LIMIT ?",
        (before, AT_ONCE),
    ).fetchall()
    for position, _, ops in found:
        connection.execute("DELETE FROM op_log WHERE position = ?", (position,))
        _forget_deletions(connection, ops)
    return len(found)


def _forget_deletions(connection: sqlite3.Connection, ops: str) -> None:
    """Forget that rows were deleted here, when the transaction that did it is forgotten."""
    for op in orjson.loads(ops):
        if op["kind"] == "delete":
            found = connection.execute(
                "SELECT r.rowid, r.version FROM rows r WHERE r.body IS NULL AND (r.parent_id = ?2"
                " OR (r.tbl = ?1 AND r.id = ?2)) AND NOT EXISTS"
                " (SELECT 1 FROM touches t WHERE t.tbl = r.tbl AND t.id = r.id)",
                (op["table"], op["id"]),
            ).fetchall()
            _drop_rows(connection, found)


def _is_above(connection: sqlite3.Connection, file_bytes_max: int) -> bool:
    """Tell whether more bytes of the file are in use than may be."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    if int(pages) * int(page_bytes) <= file_bytes_max:
        return False
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return (int(pages) - int(free)) * int(page_bytes) > file_bytes_max
