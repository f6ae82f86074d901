"""How much there is: what stats, health and the ends of logs are made of.

Functions take the open connection.
"""

from __future__ import annotations

import sqlite3

from local_store.op_log import read_marks
from local_store.ops import Row


def oldest_undelivered(connection: sqlite3.Connection, log: int | None = None) -> str | None:
    """Return when the oldest undelivered transaction (of a log) was accepted, or None."""
    found = connection.execute(
        "SELECT accepted_at FROM op_log WHERE position = (SELECT position FROM turns"
        " WHERE ?1 IS NULL OR log = ?1 ORDER BY position LIMIT 1)",
        (log,),
    ).fetchone()
    return None if found is None else found[0]


def undelivered_after(connection: sqlite3.Connection, position: int) -> int:
    """Return how many undelivered transactions stand behind a position."""
    found = connection.execute("SELECT count(*) FROM turns WHERE position > ?", (position,))
    return int(found.fetchone()[0])


def count_parked(connection: sqlite3.Connection) -> dict[int, int]:
    """Return how many transactions of each log the server keeps parked."""
    found = connection.execute("SELECT log, count(*) FROM op_log WHERE parked = 1 GROUP BY log")
    return dict(found.fetchall())


def count_parked_states(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many parked transactions are in each state."""
    found = connection.execute("SELECT state, count(*) FROM op_log WHERE parked = 1 GROUP BY state")
    return dict(found.fetchall())


def logs(connection: sqlite3.Connection) -> list[Row]:
    """Return each log with its end and what is undelivered in it, newest last."""
    marks = read_marks(connection)
    undelivered, size_bytes = marks.undelivered, marks.undelivered_bytes
    parked, found = count_parked(connection), []
    for ordinal, log_id, end in connection.execute(
        "SELECT ordinal, log_id, last_seq FROM logs ORDER BY ordinal"
    ).fetchall():
        if ordinal == marks.log:  # what the older ones don't have, so that nothing is counted
            held, held_bytes, end = undelivered, size_bytes, marks.seq
        else:
            held, held_bytes = connection.execute(
                "SELECT count(*), coalesce(sum(l.size_bytes), 0) FROM turns t"
                " CROSS JOIN op_log l ON l.position = t.position WHERE t.log = ?",
                (ordinal,),
            ).fetchone()
            undelivered, size_bytes = undelivered - held, size_bytes - held_bytes
        found.append(
            {
                "log_id": log_id,
                "last_seq": end,
                "pending": held,
                "parked": parked.get(ordinal, 0),
                "bytes": held_bytes,
                "oldest": oldest_undelivered(connection, ordinal) if held else None,
            }
        )
    return found
