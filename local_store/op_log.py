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

from local_store.decoding import RecordDamaged
from local_store.ops import (
    SETTLED,
    UNSETTLED,
    LogEntry,
    Outcome,
    Selection,
    TableSpec,
    TransactionState,
    WireOp,
    user_uuid,
)
from local_store.schema import PENDING, intact
from local_store.views import Key

DUE_AHEAD_MAX_S = 3_600.0
"""A due time further ahead than this came from a clock that was stepped back: due now."""
AT = "position = (SELECT position FROM names WHERE txn_id = ?1) AND txn_id = ?1"
"""Finds a transaction by its id; the record has the last word, since names have no checksum."""


@dataclass(frozen=True, slots=True)
class Marks:
    """How far the file has come: its last position, and the newest log with its last seq.

    `total_bytes` counts everything ever accepted, `closed` and `closed_bytes` what isn't
    undelivered any more; what is undelivered is the difference, so that accepting counts nothing.
    """

    position: int
    log: int
    seq: int
    total_bytes: int
    closed: int
    closed_bytes: int
    listed: int
    change_counter: int

    @property
    def undelivered(self) -> int:
        """How many are undelivered."""
        return self.position - self.closed

    @property
    def undelivered_bytes(self) -> int:
        """The bytes of their ops."""
        return self.total_bytes - self.closed_bytes


def read_marks(connection: sqlite3.Connection) -> Marks:
    """Return how far the file has come."""
    found = connection.execute(
        "SELECT t.last_position, t.log, t.last_seq, t.total_bytes, t.closed, t.closed_bytes,"
        " t.listed, t.change_counter, l.position, l.log, l.seq, l.total_bytes"
        " FROM totals t LEFT JOIN op_log l ON l.position = (SELECT max(position) FROM op_log)"
    ).fetchone()
    if found is None or None in found[:8]:
        raise RecordDamaged
    position, log, seq, total_bytes, *rest = found[:8]
    last = found[8:]
    if last != (None, None, None, None):  # the log isn't empty
        if None in last:
            raise RecordDamaged
        position, total_bytes = max(position, last[0]), max(total_bytes, last[3])
        seq = max(seq, last[2]) if last[1] == log else seq
    return Marks(position, log, seq, total_bytes, *rest)


def next_counter(connection: sqlite3.Connection) -> int:
    """Advance the change counter in the open transaction and return it."""
    found = connection.execute(
        "UPDATE totals SET change_counter = change_counter + 1 RETURNING change_counter"
    ).fetchone()
    return int(found[0])


def close(connection: sqlite3.Connection, transactions: int, size_bytes: int) -> None:
    """Count transactions as no longer undelivered; negative when they are so again."""
    if transactions or size_bytes:
        connection.execute(
            "UPDATE totals SET closed = closed + ?, closed_bytes = closed_bytes + ?",
            (transactions, size_bytes),
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a transaction before its reply is recorded."""

    position: int
    state: TransactionState
    parked: bool
    size_bytes: int


def open_transaction(connection: sqlite3.Connection, txn_id: str) -> Found | None:
    """Return a transaction that isn't settled; None for one that is, or was never accepted."""
    found = connection.execute(
        f"SELECT position, state, parked, size_bytes, {intact()} FROM op_log WHERE {AT}",
        (txn_id,),
    ).fetchone()
    if found is None:
        # Let go of long ago; or it is there, and what leads to it isn't: that would be sent for
        # ever. No index tells, but this is rare.
        if connection.execute("SELECT 1 FROM op_log WHERE txn_id = ?", (txn_id,)).fetchone():
            raise RecordDamaged
        return None
    if found[1] in SETTLED:
        return None
    if not found[4]:
        raise RecordDamaged
    return Found(found[0], found[1], bool(found[2]), found[3])


@dataclass(frozen=True, slots=True)
class Applied:
    """What an applied transaction was applied on and what it made, as JSON of versions by row."""

    bases: str
    versions: str


def record(
    connection: sqlite3.Connection,
    found: Found,
    outcome: Outcome,
    applied: Applied | None,
    now_iso: str,
    now_s: float,
) -> None:
    """Write what became of an open transaction; the bases it was first applied on stay."""
    settled = outcome.state in SETTLED
    parked = not settled and (outcome.parked or outcome.state in ("conflict", "dead"))
    open_before = found.state in UNSETTLED and not found.parked
    open_after = outcome.state in UNSETTLED and not parked
    if outcome.state == "applied":
        wake_dependants(connection, found.position)
    connection.execute(
        "UPDATE op_log SET state = ?1, parked = ?2, attempts = attempts + 1, due_at = ?3,"
        " settled_at = ?4, reply = CASE WHEN ?1 = 'applied' THEN NULL ELSE coalesce(?5, reply) END,"
        " held_since = CASE WHEN ?1 = 'held' THEN coalesce(held_since, ?6) END,"
        " bases = coalesce(bases, ?7), versions = coalesce(?8, versions) WHERE position = ?9",
        (
            outcome.state,
            parked,
            0.0 if settled else now_s + min(outcome.retry_after_s, DUE_AHEAD_MAX_S),
            now_iso if settled else None,
            None if outcome.reply is None else orjson.dumps(outcome.reply).decode(),
            now_iso,
            None if applied is None else applied.bases,
            None if applied is None else applied.versions,
            found.position,
        ),
    )
    change = int(open_before) - int(open_after)
    close(connection, change, change * found.size_bytes)


def touched_by(
    tables: Mapping[str, TableSpec],
    ops: Sequence[WireOp],
    children: Sequence[Mapping[str, str | None] | None],
) -> dict[Key, str | None]:
    """Return the rows that ops change, cascades included, each with the parent that it is given."""
    touched: dict[Key, str | None] = {}
    for op, taken_along in zip(ops, children, strict=True):
        spec = tables.get(op.table)
        parent_id = op.values.get(spec.parent[0]) if spec and spec.parent else None
        key = (op.table, op.id)
        touched[key] = parent_id or touched.get(key)
        for name in taken_along or ():
            table, _, row_id = name.partition("/")
            touched.setdefault((table, row_id), None)
    return touched


def touch(
    connection: sqlite3.Connection,
    position: int,
    keys: Mapping[Key, str | None],
    *,
    stage: int = PENDING,
) -> None:
    """Mark rows as changed by the transaction at `position`.

    One that was confirmed and still waits to be folded in isn't in its row yet: it is pending.
    """
    connection.executemany(
        "INSERT INTO touches (tbl, id, position, parent_id, stage) VALUES (?, ?, ?, ?, ?)"
        f" ON CONFLICT DO UPDATE SET stage = {PENDING}",
        [(*key, position, parent_id, stage) for key, parent_id in keys.items()],
    )


def wake_dependants(connection: sqlite3.Connection, position: int) -> None:
    """Let what was held behind a transaction go at once, on its rows and on their children."""
    if connection.execute("SELECT 1 FROM op_log WHERE state = 'held' LIMIT 1").fetchone() is None:
        return
    connection.execute(
        "UPDATE op_log SET due_at = 0 WHERE state = 'held' AND position IN ("
        " SELECT t.position FROM touches own JOIN touches t ON t.tbl = own.tbl AND t.id = own.id"
        " WHERE own.position = ?1 UNION"
        " SELECT t.position FROM touches own JOIN rows r ON r.parent_id = own.id"
        " JOIN touches t ON t.tbl = r.tbl AND t.id = r.id WHERE own.position = ?1 UNION"
        " SELECT t.position FROM touches own JOIN touches t ON t.parent_id = own.id"
        " WHERE own.position = ?1)",
        (position,),
    )


def recheck(connection: sqlite3.Connection, txn_ids: Iterable[str]) -> None:
    """Make parked transactions due: something may have been decided about them."""
    connection.executemany(
        f"UPDATE op_log SET due_at = 0 WHERE {AT} AND parked = 1",
        [(txn_id,) for txn_id in txn_ids],
    )


def hurry(connection: sqlite3.Connection) -> None:
    """Make what is held here due."""
    connection.execute("UPDATE op_log SET due_at = 0 WHERE state = 'held' AND parked = 0")


def parked_among(connection: sqlite3.Connection, txn_ids: Sequence[str]) -> set[str]:
    """Return which of these transactions the server keeps parked, as far as is known here."""
    found: set[str] = set()
    for txn_id in dict.fromkeys(txn_ids):
        row = connection.execute(
            f"SELECT 1 FROM op_log WHERE {AT} AND parked = 1", (txn_id,)
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
        f"SELECT t.log, min(t.position) FROM names n JOIN turns t ON t.position = n.position"
        f" WHERE n.txn_id IN ({marks}) GROUP BY t.log",
        tuple(txn_ids),
    ).fetchall()
    moving: list[tuple[int, int]] = []
    for log, start in starts:
        moving += connection.execute(
            "SELECT position, log FROM turns WHERE log = ? AND position >= ?",
            (log, start),
        ).fetchall()
    for seq, (position, _) in enumerate(sorted(moving), start=1):
        connection.execute(
            "UPDATE op_log SET log = ?, seq = ?, due_at = 0 WHERE position = ?",
            (ordinal, seq, position),
        )
    for log in {log for _, log in moving}:
        connection.execute(
            "UPDATE logs SET last_seq = (SELECT coalesce(max(seq), 0) FROM places WHERE log = ?)"
            " WHERE ordinal = ?",
            (log, log),
        )
    return len(moving)


def narrowing(selection: Selection | None) -> tuple[str, tuple[str, ...]]:
    """Return what narrows a query on op_log to a selection, and its values."""
    clauses, values = "", []
    if selection is None:
        return "", ()
    if selection.since is not None:
        clauses += " AND l.accepted_at >= ?"
        values.append(selection.since)
    if selection.until is not None:
        clauses += " AND l.accepted_at < ?"
        values.append(selection.until)
    if selection.user_id is not None:
        clauses += " AND l.user_id = ?"
        values.append(user_uuid(selection.user_id))
    if selection.table is not None:
        clauses += (
            " AND EXISTS (SELECT 1 FROM json_each(l.ops) o"
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
    undelivered = set(states) <= set(UNSETTLED)
    source = "turns t CROSS JOIN op_log l ON l.position = t.position" if undelivered else "op_log l"
    found = connection.execute(
        f"SELECT count(*) FROM {source} WHERE state IN ({marks}) AND parked = 0{narrowed}",
        (*states, *values),
    ).fetchone()
    return int(found[0])


def state_of(connection: sqlite3.Connection, txn_id: str) -> TransactionState | None:
    """Return where a transaction stands, or None when it isn't in this file."""
    found = connection.execute(f"SELECT state FROM op_log WHERE {AT}", (txn_id,)).fetchone()
    return None if found is None else found[0]


def entries(
    connection: sqlite3.Connection, log_id: str | None, after_seq: int, limit: int
) -> list[LogEntry]:
    """Return a log (None: the newest) without its ops, in seq order, for an audit."""
    found = connection.execute(
        "SELECT l.seq, l.txn_id, l.user_id, l.digest, l.state FROM places p"
        " CROSS JOIN op_log l ON l.position = p.position WHERE p.log ="
        " (SELECT max(ordinal) FROM logs WHERE ?1 IS NULL OR log_id = ?1)"
        " AND p.seq > ?2 ORDER BY p.seq LIMIT ?3",
        (log_id, after_seq, limit),
    )
    return [LogEntry(*entry) for entry in found]


def reply_of(connection: sqlite3.Connection, txn_id: str) -> Any:
    """Return the server's evidence kept with a transaction, or None."""
    found = connection.execute(f"SELECT reply FROM op_log WHERE {AT}", (txn_id,)).fetchone()
    return None if found is None or found[0] is None else orjson.loads(found[0])
