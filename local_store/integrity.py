"""What became unreadable is set aside, counted and told; the rest goes on.

Functions take the open connection, in a transaction that writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import orjson

from local_store.decoding import decode_ops
from local_store.op_log import read_marks, touched_by
from local_store.ops import SETTLED, TableSpec
from local_store.schema import CONTENT, PENDING, REPLAYED, STATUS, intact, row_intact

COMPARED_AT_ONCE = 500  # turns: about 2 ms of a look that found nothing to send

_RAW = ", ".join(f"'{c.strip()}', hex({c.strip()})" for c in f"{CONTENT}, {STATUS}".split(","))


def quarantine(connection: sqlite3.Connection, found_at: str) -> int:
    """Take every record out of the log that fails its checksum, as it is; returns how many.

    Damaged copies of the server's rows are dropped: they come again with the next read.
    """
    _fix_end(connection)
    damaged = [
        position
        for (position,) in connection.execute(
            f"SELECT position FROM op_log WHERE NOT coalesce({intact()}, false)"
        )
    ]
    for position in damaged:
        _check_place(connection, position)
        connection.execute(
            "INSERT OR REPLACE INTO quarantine (position, log, seq, record, found_at)"
            f" SELECT position, p.log, p.seq, json_object({_RAW.replace('hex(', 'hex(l.')}), ?"
            " FROM op_log l LEFT JOIN places p USING (position) WHERE position = ?",
            (found_at, position),
        )
        for table in ("op_log", "touches", "names", "places", "turns"):
            connection.execute(f"DELETE FROM {table} WHERE position = ?", (position,))
    connection.execute(f"DELETE FROM rows WHERE NOT coalesce({row_intact()}, false)")
    recount(connection)
    return len(damaged)


def check_totals(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError, as for a damaged page, when a mark isn't a number any more.

    Flipped bits can make a text or a blob of one, and those are above all numbers.
    """
    marks = connection.execute("SELECT * FROM totals").fetchone() or (None,)
    if not all(isinstance(mark, int) for mark in marks):
        raise _malformed("the totals are malformed")


def _check_place(connection: sqlite3.Connection, position: int) -> None:
    """Raise as above when a damaged record isn't where its position leads.

    A flipped bit in the position itself leaves it out of order in its tree, where another one may
    be found in its stead: an intact one, and perhaps a newer one.
    """
    found = connection.execute(
        f"SELECT coalesce({intact()}, false) FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    if found is None or found[0]:
        raise _malformed("a record is out of order")


def _malformed(what: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _fix_end(connection: sqlite3.Connection) -> None:
    """Fix where the log ends, so that no position and no seq is given out twice.

    What isn't listed yet belongs to the newest log, without gaps; its own numbers may be damaged.
    """
    check_totals(connection)
    last = "coalesce((SELECT max(position) FROM op_log), 0)"
    connection.execute(
        "UPDATE totals SET last_seq = max(last_seq, coalesce((SELECT max(p.seq) FROM places p"
        f"  WHERE p.log = totals.log AND typeof(p.seq) = 'integer'), 0)) + max(0, {last} - listed),"
        f" last_position = max(last_position, {last}),"
        " total_bytes = max(total_bytes, coalesce((SELECT max(total_bytes) FROM op_log"
        f"  WHERE {intact()}), 0))"
    )


def recount(connection: sqlite3.Connection) -> None:
    """Count anew what is undelivered."""
    connection.execute(
        "UPDATE totals SET closed = max(last_position,"
        "  coalesce((SELECT max(position) FROM op_log), 0)) - n,"
        " closed_bytes = max(total_bytes, coalesce((SELECT total_bytes FROM op_log"
        "  ORDER BY position DESC LIMIT 1), 0)) - size"
        " FROM (SELECT count(*) AS n, coalesce(sum(size_bytes), 0) AS size FROM op_log"
        "  WHERE state IN ('pending', 'held') AND parked = 0)"
    )


def relist(connection: sqlite3.Connection, tables: Mapping[str, TableSpec]) -> None:
    """Make anew everything by which transactions are found, from the log alone."""
    for table in ("names", "places", "turns", "touches"):
        connection.execute(f"DELETE FROM {table}")
    connection.execute("INSERT INTO names SELECT txn_id, position FROM op_log")
    connection.execute("INSERT INTO places SELECT log, seq, position FROM op_log")
    connection.execute(
        "INSERT INTO turns SELECT log, user_id, position, due_at FROM op_log"
        " WHERE state IN ('pending', 'held') AND parked = 0"
    )
    marks = ",".join("?" * len(SETTLED))
    for position, ops, schemas, children, is_replay in connection.execute(
        "SELECT position, ops, schemas, children, bases IS NOT NULL FROM op_log"
        f" WHERE state NOT IN ({marks})",
        SETTLED,
    ).fetchall():
        keys = touched_by(tables, decode_ops(ops, schemas, {}), orjson.loads(children))
        connection.executemany(
            "INSERT INTO touches (tbl, id, position, parent_id, stage) VALUES (?, ?, ?, ?, ?)",
            [
                (*key, position, parent, REPLAYED if is_replay else PENDING)
                for key, parent in keys.items()
            ],
        )
    connection.execute(
        "UPDATE totals SET listed = coalesce((SELECT max(position) FROM op_log), listed)"
    )
    recount(connection)


def is_consistent(connection: sqlite3.Connection) -> bool:
    """Tell whether what can be found is what was counted; costs a look at a small index."""
    (found,) = connection.execute("SELECT count(*) FROM turns").fetchone()
    return int(found) == read_marks(connection).undelivered


def next_misplaced(connection: sqlite3.Connection, after: int) -> int | None:
    """Compare some turns behind a position with their records; returns where to go on, 0: anew.

    None when one of them leads to a record that isn't where, whose or when it says: nobody would
    ever send that.
    """
    found = connection.execute(
        "SELECT t.position, t.log = l.log AND t.user_id = l.user_id AND t.due_at = l.due_at"
        " AND l.log IN (SELECT ordinal FROM logs) AND EXISTS (SELECT 1 FROM turns o"
        "  INDEXED BY sqlite_autoindex_turns_1 WHERE o.log = l.log AND o.user_id = l.user_id"
        "  AND o.position = l.position AND o.due_at = l.due_at)"
        " FROM turns t INDEXED BY turns_by_position LEFT JOIN op_log l ON l.position = t.position"
        " WHERE t.position > ? ORDER BY t.position LIMIT ?",
        (after, COMPARED_AT_ONCE),
    ).fetchall()
    if not all(fits for _, fits in found):
        return None
    return int(found[-1][0]) if len(found) == COMPARED_AT_ONCE else 0


def damage(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many records were set aside, and how many are missing at the ends of logs."""
    (quarantined,) = connection.execute("SELECT count(*) FROM quarantine").fetchone()
    (lost,) = connection.execute("SELECT coalesce(sum(lost), 0) FROM logs").fetchone()
    return {"quarantined": int(quarantined), "lost": int(lost)}
