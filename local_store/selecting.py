"""Looking for rows: what equals this, in that order; and the server's answer to the same question.

Functions take the open connection. Clean rows are searched by SQLite, rows with changes on them are
made and looked at one by one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from local_store.comparing import (
    ANY_OF,
    check_column,
    clause_of,
    order_of,
    plain,
    sort,
)
from local_store.decoding import RecordDamaged
from local_store.ops import Row, TableSpec
from local_store.rows import (
    IS_TOUCHED,
    Tables,
    base_row,
    own_columns,
    pending_among,
    shown,
    views,
)
from local_store.schema import row_intact
from local_store.views import Key


def select(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None = None,
    limit: int = -1,
    columns: Sequence[str] | None = None,
) -> list[Row]:
    """Return the author's rows that equal `where`, ordered, at most `limit` (-1: all).

    Clean rows are searched by SQLite, and only as many as are asked for are read; rows with
    changes on them are all looked at. `order_by` names a column, with a leading minus for
    descending; ties go by id. With `columns`, a row has these, its key and its marks.
    """
    find = _clean if columns is None else partial(_projected, columns=columns)
    found = find(connection, spec, user_id, where, order_by, limit)
    keys = _touched_keys(connection, spec, user_id, where)
    if keys:
        for row in _touched(connection, tables, spec, user_id, keys, where):
            found.append(row if columns is None else _only(spec, row, columns))
        sort(spec, found, order_by)
    return found if limit < 0 else found[:limit]


def _clean(
    connection: sqlite3.Connection,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None,
    limit: int,
) -> list[Row]:
    sql, values = _search(spec, user_id, where, order_by)
    found = connection.execute(
        f"SELECT r.id, r.user_id, r.body, r.base, r.version, {row_intact('r.')} {sql}",
        (*values, limit),
    ).fetchall()
    return [shown(spec, row[0], base_row(row[1:]), False) for row in found]


def _projected(
    connection: sqlite3.Connection,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None,
    limit: int,
    columns: Sequence[str],
) -> list[Row]:
    """Return some columns of the rows: SQLite takes them out, which spares making the rest."""
    for column in columns:
        check_column(spec, column)
    sql, values = _search(spec, user_id, where, order_by)
    taken = "".join(f", r.body -> '$.{column}'" for column in columns)
    found = connection.execute(
        f"SELECT r.id, r.base, r.version, {row_intact('r.')}{taken} {sql}", (*values, limit)
    )
    rows = []
    for row_id, base, version, is_intact, *texts in found:
        if not is_intact:
            raise RecordDamaged
        row: Row = {spec.key: row_id, spec.version: base, "_version": version, "_pending": False}
        for column, text in zip(columns, texts, strict=True):
            row[column] = None if text is None else orjson.loads(text)
        rows.append(row)
    return rows


def _search(
    spec: TableSpec, user_id: str, where: Mapping[str, Any], order_by: str | None
) -> tuple[str, list[Any]]:
    # Left to choose, SQLite walks the whole table in the order of ids to spare itself the sorting.
    by_parent = spec.parent is not None and where.get(spec.parent[0]) is not None
    index = "rows_of_parent" if by_parent else "rows_of_user"
    clauses = ["r.user_id = ?", "r.tbl = ?", "r.body IS NOT NULL", f"NOT {IS_TOUCHED}"]
    values: list[Any] = [user_id, spec.name]
    for column, value in where.items():
        clause, bound = clause_of(spec, column, value)
        clauses.append(clause)
        values.extend(bound)
    sql = (
        f"FROM rows r INDEXED BY {index} WHERE {' AND '.join(clauses)}"
        f" ORDER BY {order_of(spec, order_by)} LIMIT ?"
    )
    return sql, values


def _touched(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    user_id: str,
    keys: Sequence[Key],
    where: Mapping[str, Any],
) -> list[Row]:
    asked = plain(spec, where)
    marked = pending_among(connection, keys)
    rows = [
        shown(spec, key[1], seen, key in marked)
        for key, seen in views(connection, tables, keys).items()
        if seen is not None and seen.body is not None and seen.user_id == user_id
    ]
    return [
        row for row in rows if all(row.get(column) in values for column, values in asked.items())
    ]


def _only(spec: TableSpec, row: Row, columns: Sequence[str]) -> Row:
    return {name: row[name] for name in (spec.key, spec.version, "_version", "_pending", *columns)}


def _touched_keys(
    connection: sqlite3.Connection, spec: TableSpec, user_id: str, where: Mapping[str, Any]
) -> list[Key]:
    """Return the author's rows of a table that changes bear on, narrowed by parent where asked."""
    asked = plain(spec, {name: value for name, value in where.items() if value is not None})
    if spec.key in asked:
        return _bearing(connection, f"t.tbl = ? AND t.id {ANY_OF}", spec, asked[spec.key])
    if spec.parent is not None and spec.parent[0] in asked:
        parents = asked[spec.parent[0]]
        return _bearing(connection, f"t.tbl = ? AND t.parent_id {ANY_OF}", spec, parents) + [
            (spec.name, row_id)
            for (row_id,) in connection.execute(
                f"SELECT r.id FROM rows r WHERE r.parent_id {ANY_OF} AND r.tbl = ?"
                f" AND r.user_id = ? AND {IS_TOUCHED}",
                (orjson.dumps(parents).decode(), spec.name, user_id),
            )
        ]
    found = connection.execute(
        "SELECT DISTINCT t.id FROM ("
        " SELECT position FROM turns WHERE log IN (SELECT ordinal FROM logs) AND user_id = ?1"
        " UNION ALL SELECT position FROM op_log WHERE parked = 1 AND user_id = ?1"
        " UNION ALL SELECT position FROM touches WHERE stage = 2"
        ") p CROSS JOIN touches t ON t.position = p.position WHERE t.tbl = ?2",
        (user_id, spec.name),
    )
    return [(spec.name, row_id) for (row_id,) in found]


def _bearing(
    connection: sqlite3.Connection, condition: str, spec: TableSpec, values: Sequence[Any]
) -> list[Key]:
    found = connection.execute(
        f"SELECT DISTINCT t.id FROM touches t WHERE {condition}",
        (spec.name, orjson.dumps(values).decode()),
    )
    return [(spec.name, row_id) for (row_id,) in found]


def refresh(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    server_rows: Sequence[Row],
    user_id: str,
    as_of: int,
    where: Mapping[str, Any],
    counter: int,
) -> int:
    """Put the server's rows into the local copy, touching clean and unchanged rows only.

    A row that changed here after `as_of` is newer than the reply, which may have been on its way
    for long; a row with a pending change belongs to the merge, not to a refresh.
    """
    changed = 0
    for server_row in server_rows:
        changed += _refresh_row(connection, spec, server_row, user_id, as_of, counter)
    seen = {str(row[spec.key]) for row in server_rows}
    gone = [
        (spec.name, row[spec.key], as_of)
        for row in _clean(connection, spec, user_id, where, None, -1)
        if row[spec.key] not in seen
    ]
    return changed + sum(_forget(connection, *item) for item in gone)


def _forget(connection: sqlite3.Connection, table: str, row_id: str, as_of: int) -> int:
    """Drop a clean row; its version never comes back, or a stale caller could match it."""
    connection.execute(
        "UPDATE totals SET version_floor = max(version_floor, coalesce((SELECT version FROM rows"
        " WHERE tbl = ? AND id = ?), 0))",
        (table, row_id),
    )
    return connection.execute(
        "DELETE FROM rows WHERE tbl = ? AND id = ? AND changed_at <= ?", (table, row_id, as_of)
    ).rowcount


def _refresh_row(
    connection: sqlite3.Connection,
    spec: TableSpec,
    server_row: Row,
    user_id: str,
    as_of: int,
    counter: int,
) -> int:
    row_id, base = str(server_row[spec.key]), str(server_row[spec.version])
    body = own_columns(spec, server_row)
    parent_id = body.get(spec.parent[0]) if spec.parent else None
    return connection.execute(
        "INSERT INTO rows (tbl, id, user_id, parent_id, body, base, changed_at, version)"
        " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, 1 + (SELECT version_floor FROM totals)"
        " WHERE NOT EXISTS (SELECT 1 FROM touches t WHERE t.tbl = ?1 AND t.id = ?2)"
        " ON CONFLICT (tbl, id) DO UPDATE SET body = excluded.body, base = excluded.base,"
        "   parent_id = excluded.parent_id, changed_at = excluded.changed_at,"
        "   version = version + (base IS NOT excluded.base)"
        " WHERE changed_at <= ?8 AND user_id = excluded.user_id",
        (spec.name, row_id, user_id, parent_id, orjson.dumps(body).decode(), base, counter, as_of),
    ).rowcount
