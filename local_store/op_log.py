"""The op log: the ordered list of accepted transactions and what became of each.

A transaction is written once and resent until the server's answer is recorded; there is no
persistent "in flight". Functions take the open connection; the store owns locks and transactions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from local_store.door import Accepted, decode_ops
from local_store.ops import (
    SETTLED,
    UNSETTLED,
    LogEntry,
    Outcome,
    PendingTransaction,
    Row,
    TableSpec,
    TransactionState,
    WireOp,
)

DUE_AHEAD_MAX_S = 3_600.0
"""A due time further ahead than this came from a clock that was stepped back: due now."""


def find(connection: sqlite3.Connection, txn_id: str) -> tuple[int, str, str, str, str] | None:
    """Return (seq, user_id, digest, accepted_at, state) of a transaction, or None."""
    found: tuple[int, str, str, str, str] | None = connection.execute(
        "SELECT seq, user_id, digest, accepted_at, state FROM op_log WHERE txn_id = ?", (txn_id,)
    ).fetchone()
    return found


def append(
    connection: sqlite3.Connection,
    seq: int,
    txn_id: str,
    user_id: str,
    accepted: Accepted,
    accepted_at: str,
    before: Sequence[Row | None],
    schema_version: int,
) -> None:
    """Write the transaction's one row."""
    connection.execute(
        "INSERT INTO op_log (seq, txn_id, user_id, digest, accepted_at, ops, before, size_bytes,"
        " schema_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            seq,
            txn_id,
            user_id,
            accepted.digest,
            accepted_at,
            accepted.encoded.decode(),
            orjson.dumps(before).decode(),
            len(accepted.encoded),
            schema_version,
        ),
    )


def touch(connection: sqlite3.Connection, seq: int, keys: Iterable[tuple[str, str]]) -> None:
    """Mark rows as changed by the unsettled transaction `seq`."""
    connection.executemany(
        "INSERT OR IGNORE INTO touches VALUES (?, ?, ?)", [(table, id_, seq) for table, id_ in keys]
    )


def pending(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    transactions_max: int,
    bytes_max: int,
    now_s: float,
) -> list[PendingTransaction]:
    """Return the oldest transactions that are due, in seq order, within both limits.

    At least one is returned when any is due: one that is larger than the limit goes alone.
    """
    found = connection.execute(
        "SELECT seq, txn_id, user_id, digest, accepted_at, ops, size_bytes, attempts FROM op_log"
        " WHERE state IN ('pending', 'held') AND (due_at <= ? OR due_at > ?)"
        " ORDER BY seq LIMIT ?",
        (now_s, now_s + DUE_AHEAD_MAX_S, transactions_max),
    )
    chosen: list[PendingTransaction] = []
    size_bytes = 0
    for seq, txn_id, user_id, digest, accepted_at, encoded, size, attempts in found:
        size_bytes += size
        if chosen and size_bytes > bytes_max:
            break
        ops = decode_ops(encoded)
        bases, chained, after = _predecessors(connection, tables, seq, ops)
        chosen.append(
            PendingTransaction(
                seq,
                txn_id,
                user_id,
                digest,
                accepted_at,
                ops,
                bases,
                chained,
                after,
                size,
                attempts,
            )
        )
    return chosen


def _predecessors(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], seq: int, ops: Sequence[WireOp]
) -> tuple[tuple[str | None, ...], tuple[bool, ...], tuple[str, ...]]:
    """Find what each op builds on: a server version, or an unsettled change that goes first."""
    bases: list[str | None] = []
    chained: list[bool] = []
    after: dict[str, None] = {}  # ordered and without doubles
    seen: set[tuple[str, str]] = set()
    for op in ops:
        key = (op.table, op.id)
        earlier = _last_touch(connection, key, seq)
        spec = tables.get(op.table)  # None: no longer registered, and still to be delivered
        parent = spec.parent if spec else None
        parent_id = op.values.get(parent[0]) if parent else None
        if parent is not None and parent_id is not None:
            after.update(dict.fromkeys(_last_touch(connection, (parent[1], parent_id), seq)))
        after.update(dict.fromkeys(earlier))
        follows = bool(earlier) or key in seen
        chained.append(follows and op.kind != "insert")
        bases.append(None if follows or op.kind == "insert" else _base(connection, key))
        seen.add(key)
    return tuple(bases), tuple(chained), tuple(after)


def _last_touch(connection: sqlite3.Connection, key: tuple[str, str], seq: int) -> list[str]:
    found = connection.execute(
        "SELECT l.txn_id FROM touches t JOIN op_log l ON l.seq = t.seq"
        " WHERE t.tbl = ? AND t.id = ? AND t.seq < ? ORDER BY t.seq DESC LIMIT 1",
        (*key, seq),
    ).fetchone()
    return [] if found is None else [found[0]]


def _base(connection: sqlite3.Connection, key: tuple[str, str]) -> str | None:
    found = connection.execute("SELECT base FROM rows WHERE tbl = ? AND id = ?", key).fetchone()
    return None if found is None else found[0]


def record(
    connection: sqlite3.Connection, outcome: Outcome, now_iso: str, now_s: float
) -> tuple[int, int] | None:
    """Write what became of a transaction; returns the change of (unsettled, bytes), None if stale.

    A settled transaction stays as it is: a late copy of an older reply can't reopen it.
    """
    found = connection.execute(
        "SELECT seq, state, size_bytes FROM op_log WHERE txn_id = ?", (outcome.txn_id,)
    ).fetchone()
    if found is None or found[1] in SETTLED:
        return None
    seq, state, size_bytes = found
    open_before, open_after = state in UNSETTLED, outcome.state in UNSETTLED
    connection.execute(
        "UPDATE op_log SET state = ?, attempts = attempts + 1, due_at = ?, settled_at = ?,"
        " reply = ? WHERE seq = ?",
        (
            outcome.state,
            now_s + min(outcome.retry_after_s, DUE_AHEAD_MAX_S) if open_after else 0.0,
            None if open_after else now_iso,
            None if outcome.reply is None else orjson.dumps(outcome.reply).decode(),
            seq,
        ),
    )
    if outcome.state in SETTLED:
        connection.execute("DELETE FROM touches WHERE seq = ?", (seq,))
    change = int(open_after) - int(open_before)
    return change, change * size_bytes


def state_of(connection: sqlite3.Connection, txn_id: str) -> TransactionState | None:
    """Return where a transaction stands, or None when it isn't in this log."""
    found = connection.execute("SELECT state FROM op_log WHERE txn_id = ?", (txn_id,)).fetchone()
    return None if found is None else found[0]


def entries(connection: sqlite3.Connection, after_seq: int, limit: int) -> list[LogEntry]:
    """Return the log without its ops, in seq order, for an audit."""
    found = connection.execute(
        "SELECT seq, txn_id, user_id, digest, state FROM op_log WHERE seq > ? ORDER BY seq LIMIT ?",
        (after_seq, limit),
    )
    return [LogEntry(*entry) for entry in found]


def unsettled_of(
    connection: sqlite3.Connection, table: str, row_id: str, user_id: str
) -> list[tuple[str, int, TransactionState]]:
    """Return (txn_id, seq, state) of what is not settled on a row or on its children."""
    return connection.execute(
        "SELECT DISTINCT l.txn_id, l.seq, l.state FROM op_log l JOIN touches t ON t.seq = l.seq"
        " WHERE l.user_id = ? AND ((t.tbl = ? AND t.id = ?) OR (t.tbl, t.id) IN"
        "   (SELECT tbl, id FROM rows WHERE parent_id = ?)) ORDER BY l.seq",
        (user_id, table, row_id, row_id),
    ).fetchall()


def reply_of(connection: sqlite3.Connection, txn_id: str) -> Any:
    """Return the server's evidence kept with a transaction, or None."""
    found = connection.execute("SELECT reply FROM op_log WHERE txn_id = ?", (txn_id,)).fetchone()
    return None if found is None or found[0] is None else orjson.loads(found[0])


def oldest_unsettled(connection: sqlite3.Connection) -> str | None:
    """Return when the oldest undelivered transaction was accepted, or None."""
    found = connection.execute(
        "SELECT accepted_at FROM op_log WHERE state IN ('pending', 'held') ORDER BY seq LIMIT 1"
    ).fetchone()
    return None if found is None else found[0]


def count_parked(connection: sqlite3.Connection) -> int:
    """Return how many transactions wait for a person."""
    found = connection.execute(
        "SELECT count(*) FROM op_log WHERE state IN ('conflict', 'dead')"
    ).fetchone()
    return int(found[0])
