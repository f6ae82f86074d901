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


def _fix_end(connection: sqlite3.Connection) -> None:
    """Fix where the log ends, so that no position and no seq is given out twice.

    What isn't listed yet belongs to the newest log, without gaps; its own numbers may be damaged.
    """
    # Flipped bits can make a text or a blob of a number, and those are above all numbers.
    kinds = connection.execute(
        "SELECT typeof(last_position) || typeof(last_seq) || typeof(total_bytes) || typeof(listed)"
        " FROM totals"
    ).fetchone()
    if kinds != ("integer" * 4,):
        error = sqlite3.DatabaseError("the totals are malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT  # as a page would be: carried over
        raise error
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


def damage(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many records were set aside, and how many are missing at the ends of logs."""
    (quarantined,) = connection.execute("SELECT count(*) FROM quarantine").fetchone()
    (lost,) = connection.execute("SELECT coalesce(sum(lost), 0) FROM logs").fetchone()
    return {"quarantined": int(quarantined), "lost": int(lost)}
