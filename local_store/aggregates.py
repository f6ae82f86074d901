"""A row with its children as one thing: what it is, what of it is unsettled, and its stamp.

A stamp is to an aggregate what an entity tag is to a page: who keeps what was made of an aggregate
asks with the stamp it was made at, and nothing is read again while that still stands.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from local_store.comparing import Question
from local_store.ops import Row, TableSpec, TransactionState
from local_store.rows import Tables
from local_store.schema import SETTLED, read_log_id
from local_store.selecting import select

Unsettled = tuple[str, int, TransactionState]  # txn_id, seq, state
Stamp = tuple[str, int, int, tuple[tuple[int, int, int], ...]]

_OWN = "json_each(?1) k CROSS JOIN {0} x ON x.tbl = ?2 AND x.id = k.value"
_CHILDREN = "json_each(?1) k CROSS JOIN {0} x ON x.parent_id = k.value"
_IS_TOUCHED = "EXISTS (SELECT 1 FROM touches t WHERE t.tbl = x.tbl AND t.id = x.id)"
_BEARING = (
    "SELECT b.root, t.position, t.stage, l.content_crc, l.user_id, l.txn_id, l.seq, l.state FROM ("
    f" SELECT k.value AS root, x.tbl, x.id FROM {_OWN.format('touches')}"
    f" UNION SELECT k.value, x.tbl, x.id FROM {_CHILDREN.format('touches')}"
    # Where a change doesn't name the parent, the row does.
    f" UNION SELECT k.value, x.tbl, x.id FROM {_CHILDREN.format('rows')} WHERE {_IS_TOUCHED}"
    ") b CROSS JOIN touches t ON t.tbl = b.tbl AND t.id = b.id"
    " CROSS JOIN op_log l ON l.position = t.position GROUP BY b.root, t.position, t.stage"
    " ORDER BY t.position"
)
_KNOWN = (
    f"SELECT k.value, 1, x.changed_at FROM {_OWN.format('rows')}"
    f" UNION ALL SELECT k.value, count(*), max(x.changed_at) FROM {_CHILDREN.format('rows')}"
    " GROUP BY k.key"
)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One row and its children, all of one moment.

    `stamp` is equal to an earlier one only while a reader would see the same. `unsettled` is what
    of the author's isn't settled on any of them, `has_changes` whether the local copy differs from
    the server's rows as they are known. `rows` are by table; None when the caller knows the stamp.
    """

    stamp: Stamp
    unsettled: tuple[Unsettled, ...]
    has_changes: bool
    rows: Mapping[str, list[Row]] | None


def read(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    row_ids: Sequence[str],
    user_id: str,
    known: Mapping[str, Stamp],
) -> dict[str, Aggregate]:
    """Return the aggregates of these rows; reads those whose stamp isn't the known one."""
    bearing = _bearing(connection, spec.name, row_ids)
    stamps = _stamps(connection, spec.name, row_ids, bearing)
    unknown = [row_id for row_id in row_ids if known.get(row_id) != stamps[row_id]]
    rows = _rows(connection, tables, spec, unknown, user_id)
    return {
        row_id: Aggregate(
            stamps[row_id],
            _unsettled(bearing[row_id], user_id),
            bool(bearing[row_id]),
            rows.get(row_id),
        )
        for row_id in row_ids
    }


def unsettled_of(
    connection: sqlite3.Connection, table: str, row_ids: Sequence[str], user_id: str
) -> dict[str, list[Unsettled]]:
    """Return by row (txn_id, seq, state) of what is not settled on it or on its children."""
    bearing = _bearing(connection, table, row_ids)
    return {row_id: list(_unsettled(bearing[row_id], user_id)) for row_id in row_ids}


@dataclass(frozen=True, slots=True)
class _Touch:
    """One transaction that bears on an aggregate; its content's checksum tells a rebase."""

    position: int
    stage: int
    content_crc: int
    user_id: str
    transaction: Unsettled


def _bearing(
    connection: sqlite3.Connection, table: str, row_ids: Sequence[str]
) -> dict[str, list[_Touch]]:
    found: dict[str, list[_Touch]] = {row_id: [] for row_id in row_ids}
    asked = orjson.dumps(list(found)).decode()
    for row in connection.execute(_BEARING, (asked, table)):
        root, position, stage, content_crc, user_id, *transaction = row
        touch = _Touch(position, stage, content_crc, user_id, tuple(transaction))
        found[root].append(touch)
    return found


def _unsettled(bearing: Sequence[_Touch], user_id: str) -> tuple[Unsettled, ...]:
    if not bearing:
        return ()
    unsettled = [t for t in bearing if t.user_id == user_id and t.stage != SETTLED]
    return tuple(dict.fromkeys(touch.transaction for touch in unsettled))


def _stamps(
    connection: sqlite3.Connection,
    table: str,
    row_ids: Sequence[str],
    bearing: Mapping[str, Sequence[_Touch]],
) -> dict[str, Stamp]:
    """Return the stamps of what is seen in the open read transaction.

    Each change of a row takes the next number of the file's change counter, and none is used
    twice: as many rows as before, none of them with a later number, are the same rows.
    """
    log_id = read_log_id(connection)  # another file counts anew
    asked = orjson.dumps(list(row_ids)).decode()
    counted: dict[str, tuple[int, int]] = {}
    for root, count, last in connection.execute(_KNOWN, (asked, table)):
        before = counted.get(root, (0, 0))
        counted[root] = (before[0] + count, max(before[1], last))
    stamps: dict[str, Stamp] = {}
    for row_id in row_ids:
        rows, changed_at = counted.get(row_id, (0, 0))
        touches = bearing[row_id]
        touched = tuple((t.position, t.stage, t.content_crc) for t in touches) if touches else ()
        stamps[row_id] = (log_id, rows, changed_at, touched)
    return stamps


def _rows(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    row_ids: Sequence[str],
    user_id: str,
) -> dict[str, dict[str, list[Row]]]:
    links = {spec.name: spec.key}
    for child in tables.values():
        if child.parent is not None and child.parent[1] == spec.name:
            links[child.name] = child.parent[0]
    found: dict[str, dict[str, list[Row]]] = {
        row_id: {table: [] for table in links} for row_id in row_ids
    }
    for table, column in links.items() if row_ids else ():
        for row in select(connection, tables, Question(tables[table], user_id, {column: row_ids})):
            found[row[column]][table].append(row)
    return found
