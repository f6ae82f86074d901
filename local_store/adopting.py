"""Transactions of another buffer, taken in from its segments to be delivered in its stead.

They keep their log, their seq and what they were sealed with: an op's base, or the transactions it
was chained to. That outranks what this file could tell, which knows only what it took in. Once a
merge here gave a row another ground to stand on, that row's is forgotten.

Functions take the open connection, in a transaction that writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import orjson

from local_store.op_log import Marks, read_marks
from local_store.ops import PendingTransaction


@dataclass(frozen=True, slots=True)
class Sealed:
    """What an adopted transaction builds on, by the buffer that sealed it.

    `bases` by `table/id` for the first op of each row; `chained` rows were changed earlier by one
    of `after` and not confirmed yet. `met` is what a merge there last met, for each of its rows.
    """

    bases: Mapping[str, str | None]
    chained: frozenset[str]
    after: tuple[str, ...]
    met: Mapping[str, str | None]

    @classmethod
    def of(cls, transaction: PendingTransaction) -> Self:
        """Take it from a transaction as its segment has it."""
        bases: dict[str, str | None] = {}
        chained: set[str] = set()
        seen: set[str] = set()
        for op, base, follows in zip(
            transaction.ops, transaction.bases, transaction.chained, strict=True
        ):
            name = f"{op.table}/{op.id}"
            if name not in seen and op.kind != "insert":
                if follows:
                    chained.add(name)
                else:
                    bases[name] = base
            seen.add(name)
        return cls(bases, frozenset(chained), transaction.after, transaction.met)

    @classmethod
    def decode(cls, stored: str | None) -> Self:
        """Read it back; an own transaction has none of it."""
        found: dict[str, Any] = orjson.loads(stored) if stored is not None else {}
        return cls(
            found.get("bases", {}),
            frozenset(found.get("chained", ())),
            tuple(found.get("after", ())),
            found.get("met", {}),
        )

    def speaks_of(self, name: str) -> bool:
        """Tell whether it says what a row's first op builds on."""
        return name in self.bases or name in self.chained

    def encode(self) -> str:
        """Return what is stored."""
        told = {"bases": self.bases, "chained": sorted(self.chained), "after": self.after}
        return orjson.dumps({**told, "met": dict(self.met)}).decode()


def adopt(
    connection: sqlite3.Connection,
    transactions: Sequence[PendingTransaction],
    acknowledged_seq: int,
    schemas: Mapping[str, int],
) -> int:
    """Append transactions of one log, in order of seq; returns how many weren't here already.

    `schemas` are the versions of the tables that their ops are written in.
    """
    marks = read_marks(connection)
    ordinal = _log(connection, transactions[0].log_id, acknowledged_seq)
    position, total_bytes = marks.position, marks.total_bytes
    written_in = orjson.dumps({name: n for name, n in sorted(schemas.items()) if n != 1}).decode()
    taken = 0
    for transaction in transactions:
        if _is_known(connection, transaction.txn_id):
            continue
        position, total_bytes = position + 1, total_bytes + transaction.size_bytes
        _append(connection, transaction, (position, ordinal, total_bytes), written_in)
        taken += 1
    _end(connection, marks, position, total_bytes)
    return taken


def _log(connection: sqlite3.Connection, log_id: str, acknowledged_seq: int) -> int:
    """Return the log's ordinal: below the file's own, which stays the newest."""
    connection.execute(
        "INSERT OR IGNORE INTO logs (ordinal, log_id, device, inode)"
        " SELECT min(ordinal) - 1, ?, 0, 0 FROM logs",
        (log_id,),
    )
    found = connection.execute(
        "UPDATE logs SET last_seq = max(last_seq, ?) WHERE log_id = ? RETURNING ordinal",
        (acknowledged_seq, log_id),
    ).fetchone()
    return int(found[0])


def _is_known(connection: sqlite3.Connection, txn_id: str) -> bool:
    found = connection.execute("SELECT 1 FROM names WHERE txn_id = ?", (txn_id,)).fetchone()
    return found is not None


def _append(
    connection: sqlite3.Connection,
    transaction: PendingTransaction,
    place: tuple[int, int, int],
    schemas: str,
) -> None:
    position, ordinal, total_bytes = place
    connection.execute(
        "INSERT INTO op_log (position, log, seq, txn_id, user_id, digest, accepted_at, ops, before,"
        " children, records, schemas, size_bytes, total_bytes, content_crc)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        (
            position,
            ordinal,
            transaction.seq,
            transaction.txn_id,
            transaction.user_id,
            transaction.digest,
            transaction.accepted_at,
            orjson.dumps([op.to_json() for op in transaction.ops]).decode(),
            orjson.dumps(transaction.before).decode(),
            orjson.dumps(transaction.children).decode(),
            orjson.dumps(transaction.records).decode(),
            schemas,
            transaction.size_bytes,
            total_bytes,
        ),
    )
    # What changes a record seals it: its content and its status get their checksums here.
    connection.execute(
        "UPDATE op_log SET size_bytes = size_bytes, sealed = ?, held_since = ? WHERE position = ?",
        (Sealed.of(transaction).encode(), transaction.held_since, position),
    )


def _end(connection: sqlite3.Connection, marks: Marks, position: int, total_bytes: int) -> None:
    """Note the file's end; the own log's is where it was."""
    connection.execute(
        "UPDATE totals SET last_position = ?, total_bytes = ?, last_seq = ?",
        (position, total_bytes, marks.seq),
    )


def forget(connection: sqlite3.Connection, position: int, name: str) -> None:
    """Let a transaction's change of one row build on what is known of the row here."""
    (stored,) = connection.execute(
        "SELECT sealed FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    if stored is None:
        return
    sealed = Sealed.decode(stored)
    bases = {known: base for known, base in sealed.bases.items() if known != name}
    met = {known: version for known, version in sealed.met.items() if known != name}
    left = Sealed(bases, sealed.chained - {name}, sealed.after, met)
    connection.execute("UPDATE op_log SET sealed = ? WHERE position = ?", (left.encode(), position))
