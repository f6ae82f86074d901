"""The op log: the ordered list of accepted transactions and what became of each.

A transaction is written once and resent until the server's answer is recorded; there is no
persistent "in flight". Functions take the open connection; the store owns locks and transactions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from local_store.door import Accepted
from local_store.ops import (
    SETTLED,
    UNSETTLED,
    LogEntry,
    Outcome,
    Row,
    Selection,
    TransactionState,
    user_uuid,
)

DUE_AHEAD_MAX_S = 3_600.0
"""A due time further ahead than this came from a clock that was stepped back: due now."""
IS_UNDELIVERED = "state IN ('pending', 'held') AND parked = 0"
"""Spelled as in the partial indexes, or SQLite won't use them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a transaction goes: the position in the file, the log, and the seq in that log."""

    position: int
    log: int
    seq: int


def find(connection: sqlite3.Connection, txn_id: str) -> tuple[int, str, str, str, str] | None:
    """Return (seq, user_id, digest, accepted_at, state) of a transaction, or None."""
    found: tuple[int, str, str, str, str] | None = connection.execute(
        "SELECT seq, user_id, digest, accepted_at, state FROM op_log WHERE txn_id = ?", (txn_id,)
    ).fetchone()
    return found


def append(
    connection: sqlite3.Connection,
    place: Place,
    txn_id: str,
    user_id: str,
    accepted: Accepted,
    accepted_at: str,
    before: Sequence[Row | None],
    children: Sequence[Mapping[str, str | None] | None],
    schema_version: int,
) -> None:
    """Write the transaction's one row."""
    connection.execute(
        "INSERT INTO op_log (position, log, seq, txn_id, user_id, digest, accepted_at, ops, before,"
        " children, size_bytes, schema_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            place.position,
            place.log,
            place.seq,
            txn_id,
            user_id,
            accepted.digest,
            accepted_at,
            accepted.encoded.decode(),
            orjson.dumps(before).decode(),
            orjson.dumps(children).decode(),
            len(accepted.encoded),
            schema_version,
        ),
    )


def touch(connection: sqlite3.Connection, position: int, keys: Iterable[tuple[str, str]]) -> None:
    """Mark rows as changed by the unsettled transaction at `position`."""
    connection.executemany(
        "INSERT OR IGNORE INTO touches VALUES (?, ?, ?)",
        [(table, id_, position) for table, id_ in keys],
    )


def record(
    connection: sqlite3.Connection, outcome: Outcome, now_iso: str, now_s: float
) -> tuple[int, int] | None:
    """Write what became of a transaction; returns the change of (unsettled, bytes), None if stale.

    A settled transaction stays as it is: a late copy of an older reply can't reopen it.
    """
    found = connection.execute(
        "SELECT position, state, parked, size_bytes FROM op_log WHERE txn_id = ?",
        (outcome.txn_id,),
    ).fetchone()
    if found is None or found[1] in SETTLED:
        return None
    position, state, was_parked, size_bytes = found
    settled = outcome.state in SETTLED
    parked = not settled and (outcome.parked or outcome.state in ("conflict", "dead"))
    open_before = state in UNSETTLED and not was_parked
    open_after = outcome.state in UNSETTLED and not parked
    if outcome.state == "applied":
        wake_dependants(connection, position)
    connection.execute(
        "UPDATE op_log SET state = ?1, parked = ?2, attempts = attempts + 1, due_at = ?3,"
        " settled_at = ?4, reply = CASE WHEN ?1 = 'applied' THEN NULL ELSE coalesce(?5, reply) END,"
        " held_since = CASE WHEN ?1 = 'held' THEN coalesce(held_since, ?6) END WHERE position = ?7",
        (
            outcome.state,
            parked,
            0.0 if settled else now_s + min(outcome.retry_after_s, DUE_AHEAD_MAX_S),
            None if open_after else now_iso,
            None if outcome.reply is None else orjson.dumps(outcome.reply).decode(),
            now_iso,
            position,
        ),
    )
    if settled:
        connection.execute("DELETE FROM touches WHERE position = ?", (position,))
    change = int(open_after) - int(open_before)
    return change, change * size_bytes


def wake_dependants(connection: sqlite3.Connection, position: int) -> None:
    """Let what was held behind a transaction go at once, on its rows and on their children."""
    if connection.execute("SELECT 1 FROM op_log WHERE state = 'held' LIMIT 1").fetchone() is None:
        return
    connection.execute(
        "UPDATE op_log SET due_at = 0 WHERE state = 'held' AND position IN ("
        " SELECT t.position FROM touches own JOIN touches t ON t.tbl = own.tbl AND t.id = own.id"
        " WHERE own.position = ?1 UNION"
        " SELECT t.position FROM touches own JOIN rows r ON r.parent_id = own.id"
        " JOIN touches t ON t.tbl = r.tbl AND t.id = r.id WHERE own.position = ?1)",
        (position,),
    )


def recheck(connection: sqlite3.Connection, txn_ids: Iterable[str]) -> None:
    """Make parked transactions due: something may have been decided about them."""
    connection.executemany(
        "UPDATE op_log SET due_at = 0 WHERE txn_id = ? AND parked = 1",
        [(txn_id,) for txn_id in txn_ids],
    )


def parked_among(connection: sqlite3.Connection, txn_ids: Sequence[str]) -> set[str]:
    """Return which of these transactions the server keeps parked, as far as is known here."""
    found: set[str] = set()
    for txn_id in dict.fromkeys(txn_ids):
        row = connection.execute(
            "SELECT 1 FROM op_log WHERE txn_id = ? AND parked = 1", (txn_id,)
        ).fetchone()
        if row is not None:
            found.add(txn_id)
    return found


def renumber(connection: sqlite3.Connection, txn_ids: Sequence[str], ordinal: int) -> int:
    """Move undelivered transactions, and the later ones of their logs, into log `ordinal`.

    They keep their order and positions and get fresh seqs; returns how many were moved.
    """
    marks = ",".join("?" * len(txn_ids))
    starts = connection.execute(
        f"SELECT log, min(position) FROM op_log WHERE txn_id IN ({marks}) AND {IS_UNDELIVERED}"
        " GROUP BY log",
        tuple(txn_ids),
    ).fetchall()
    moved = 0
    for log, start in sorted(starts, key=lambda found: found[1]):
        positions = connection.execute(
            f"SELECT position FROM op_log WHERE log = ? AND position >= ? AND {IS_UNDELIVERED}"
            " ORDER BY position",
            (log, start),
        ).fetchall()
        for (position,) in positions:
            moved += 1
            connection.execute(
                "UPDATE op_log SET log = ?, seq = ?, due_at = 0 WHERE position = ?",
                (ordinal, moved, position),
            )
        connection.execute(
            "UPDATE logs SET last_seq = (SELECT coalesce(max(seq), 0) FROM op_log WHERE log = ?)"
            " WHERE ordinal = ?",
            (log, log),
        )
    return moved


def narrowing(selection: Selection | None) -> tuple[str, tuple[str, ...]]:
    """Return what narrows a query on op_log to a selection, and its values."""
    clauses, values = "", []
    if selection is None:
        return "", ()
    if selection.since is not None:
        clauses += " AND accepted_at >= ?"
        values.append(selection.since)
    if selection.until is not None:
        clauses += " AND accepted_at < ?"
        values.append(selection.until)
    if selection.user_id is not None:
        clauses += " AND user_id = ?"
        values.append(user_uuid(selection.user_id))
    if selection.table is not None:
        clauses += (
            " AND EXISTS (SELECT 1 FROM json_each(ops) o"
            " WHERE json_extract(o.value, '$.table') = ?)"
        )
        values.append(selection.table)
    return clauses, tuple(values)


def count(
    connection: sqlite3.Connection,
    selection: Selection | None,
    states: Sequence[TransactionState],
) -> int:
    """Return how many transactions in these states are selected; parked ones don't count."""
    narrowed, values = narrowing(selection)
    marks = ",".join("?" * len(states))
    found = connection.execute(
        f"SELECT count(*) FROM op_log WHERE state IN ({marks}) AND parked = 0{narrowed}",
        (*states, *values),
    ).fetchone()
    return int(found[0])


def state_of(connection: sqlite3.Connection, txn_id: str) -> TransactionState | None:
    """Return where a transaction stands, or None when it isn't in this file."""
    found = connection.execute("SELECT state FROM op_log WHERE txn_id = ?", (txn_id,)).fetchone()
    return None if found is None else found[0]


def entries(
    connection: sqlite3.Connection, log_id: str | None, after_seq: int, limit: int
) -> list[LogEntry]:
    """Return a log (None: the newest) without its ops, in seq order, for an audit."""
    found = connection.execute(
        "SELECT seq, txn_id, user_id, digest, state FROM op_log WHERE log ="
        " (SELECT max(ordinal) FROM logs WHERE ?1 IS NULL OR log_id = ?1)"
        " AND seq > ?2 ORDER BY seq LIMIT ?3",
        (log_id, after_seq, limit),
    )
    return [LogEntry(*entry) for entry in found]


def unsettled_of(
    connection: sqlite3.Connection, table: str, row_id: str, user_id: str
) -> list[tuple[str, int, TransactionState]]:
    """Return (txn_id, seq, state) of what is not settled on a row or on its children."""
    return connection.execute(
        "SELECT DISTINCT l.txn_id, l.seq, l.state FROM op_log l"
        " JOIN touches t ON t.position = l.position"
        " WHERE l.user_id = ? AND ((t.tbl = ? AND t.id = ?) OR (t.tbl, t.id) IN"
        "   (SELECT tbl, id FROM rows WHERE parent_id = ?)) ORDER BY l.position",
        (user_id, table, row_id, row_id),
    ).fetchall()


def reply_of(connection: sqlite3.Connection, txn_id: str) -> Any:
    """Return the server's evidence kept with a transaction, or None."""
    found = connection.execute("SELECT reply FROM op_log WHERE txn_id = ?", (txn_id,)).fetchone()
    return None if found is None or found[0] is None else orjson.loads(found[0])


def oldest_undelivered(connection: sqlite3.Connection, log: int | None = None) -> str | None:
    """Return when the oldest undelivered transaction (of a log) was accepted, or None."""
    found = connection.execute(
        f"SELECT accepted_at FROM op_log WHERE {IS_UNDELIVERED} AND (?1 IS NULL OR log = ?1)"
        " ORDER BY position LIMIT 1",
        (log,),
    ).fetchone()
    return None if found is None else found[0]


def count_parked(connection: sqlite3.Connection) -> dict[int, int]:
    """Return how many transactions of each log the server keeps parked."""
    found = connection.execute("SELECT log, count(*) FROM op_log WHERE parked = 1 GROUP BY log")
    return dict(found.fetchall())


def logs(connection: sqlite3.Connection) -> list[Row]:
    """Return each log with its end and what is undelivered in it, newest last."""
    current, last_seq, undelivered, size_bytes = connection.execute(
        "SELECT log, last_seq, unsettled, unsettled_bytes FROM totals"
    ).fetchone()
    parked, found = count_parked(connection), []
    for ordinal, log_id, end in connection.execute(
        "SELECT ordinal, log_id, last_seq FROM logs ORDER BY ordinal"
    ).fetchall():
        if ordinal == current:  # what the older ones don't have, so that nothing is counted
            held, held_bytes, end = undelivered, size_bytes, last_seq
        else:
            held, held_bytes = connection.execute(
                "SELECT count(*), coalesce(sum(size_bytes), 0) FROM op_log"
                f" WHERE log = ? AND {IS_UNDELIVERED}",
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
