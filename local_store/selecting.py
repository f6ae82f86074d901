"""Looking for rows: what equals this, in that order; and the server's answer to the same question.

Functions take the open connection. Clean rows are searched by SQLite, rows with changes on them are
made and looked at one by one.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from local_store.door import INT_MAX, INT_MIN, canonical_uuid, check_text, lookup_id
from local_store.errors import InvalidWrite
from local_store.ops import Row, TableSpec, user_uuid
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

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def select(
    connection: sqlite3.Connection,
    tables: Tables,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None,
    limit: int,
) -> list[Row]:
    """Return the author's rows that equal `where`, ordered, at most `limit` (-1: all).

    Clean rows are searched by SQLite, and only as many as are asked for are read; rows with
    changes on them are all looked at. `order_by` names a column, with a leading minus for
    descending; ties go by id.
    """
    found = _clean(connection, spec, user_id, where, order_by, limit)
    keys = _touched_keys(connection, spec, user_id, where)
    marked = pending_among(connection, keys)
    for key, seen in views(connection, tables, keys).items():
        if seen is not None and seen.body is not None and seen.user_id == user_id:
            row = shown(spec, key[1], seen, key in marked)
            if all(row.get(column) == value for column, value in _plain(spec, where).items()):
                found.append(row)
    _sort(spec, found, order_by)
    return found if limit < 0 else found[:limit]


def _clean(
    connection: sqlite3.Connection,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None,
    limit: int,
) -> list[Row]:
    # Left to choose, SQLite walks the whole table in the order of ids to spare itself the sorting.
    by_parent = spec.parent is not None and where.get(spec.parent[0]) is not None
    index = "rows_of_parent" if by_parent else "rows_of_user"
    clauses = ["r.user_id = ?", "r.tbl = ?", "r.body IS NOT NULL", f"NOT {IS_TOUCHED}"]
    values: list[Any] = [user_id, spec.name]
    for column, value in where.items():
        clause, bound = _equals(spec, column, value)
        clauses.append(clause)
        values.extend(bound)
    found = connection.execute(
        f"SELECT r.id, r.user_id, r.body, r.base, r.version, {row_intact('r.')}"
        f" FROM rows r INDEXED BY {index} WHERE {' AND '.join(clauses)}"
        f" ORDER BY {_order(spec, order_by)} LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [shown(spec, row[0], base_row(row[1:]), False) for row in found]


def _touched_keys(
    connection: sqlite3.Connection, spec: TableSpec, user_id: str, where: Mapping[str, Any]
) -> list[Key]:
    """Return the author's rows of a table that changes bear on, narrowed by parent where asked."""
    if spec.key in where:
        row_id = lookup_id(spec, where[spec.key])
        return (
            [] if row_id is None else _bearing(connection, "t.tbl = ? AND t.id = ?", spec, row_id)
        )
    parent = _plain(spec, where).get(spec.parent[0]) if spec.parent else None
    if parent is not None:
        return _bearing(connection, "t.tbl = ? AND t.parent_id = ?", spec, parent) + [
            (spec.name, row_id)
            for (row_id,) in connection.execute(
                "SELECT r.id FROM rows r WHERE r.parent_id = ? AND r.tbl = ? AND r.user_id = ?"
                f" AND {IS_TOUCHED}",
                (parent, spec.name, user_id),
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
    connection: sqlite3.Connection, condition: str, spec: TableSpec, value: str
) -> list[Key]:
    found = connection.execute(
        f"SELECT DISTINCT t.id FROM touches t WHERE {condition}", (spec.name, value)
    )
    return [(spec.name, row_id) for (row_id,) in found]


def _plain(spec: TableSpec, where: Mapping[str, Any]) -> Row:
    """Return `where` in the forms that a shown row has."""
    plain = dict(where)
    if spec.owner in plain and plain[spec.owner] is not None:
        plain[spec.owner] = user_uuid(str(plain[spec.owner]))
    for column, value in plain.items():
        if column == spec.key:
            plain[column] = lookup_id(spec, value)
        elif column in spec.columns and spec.columns[column].type == "uuid":
            plain[column] = canonical_uuid(value) or value
    return plain


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


# -- comparing ------------------------------------------------------------------------------------


def _equals(spec: TableSpec, column: str, value: Any) -> tuple[str, list[Any]]:
    if column == spec.key:
        return "r.id = ?", [lookup_id(spec, value)]
    _check_column(spec, column)
    _check_comparable(spec, column, value)
    if spec.columns[column].type == "uuid" and value is not None and column != spec.owner:
        value = canonical_uuid(value) or value
    if column == spec.owner:
        return "r.user_id = ?", [None if value is None else user_uuid(str(value))]
    if column == spec.version:
        return "r.base IS ?", [value]
    if spec.parent is not None and column == spec.parent[0]:
        return ("r.parent_id IS NULL", []) if value is None else ("r.parent_id = ?", [value])
    if value is None:
        return f"json_extract(r.body, '$.{column}') IS NULL", []
    return f"json_extract(r.body, '$.{column}') = ?", [value]


def _order(spec: TableSpec, order_by: str | None) -> str:
    column, direction = _ordering(spec, order_by)
    if column == spec.key:
        return f"r.id {direction}"
    if column == spec.version:
        return f"r.base {direction}, r.id {direction}"
    return f"json_extract(r.body, '$.{column}') {direction}, r.id {direction}"


def _ordering(spec: TableSpec, order_by: str | None) -> tuple[str, str]:
    column = (order_by or spec.key).removeprefix("-")
    if column != spec.key:
        _check_column(spec, column)
    return column, "DESC" if (order_by or "").startswith("-") else "ASC"


def _sort(spec: TableSpec, found: list[Row], order_by: str | None) -> None:
    """Sort as SQLite does: nothing, then numbers, then text; ties by id."""
    column, direction = _ordering(spec, order_by)

    def place(row: Row) -> tuple[int, Any, str]:
        value = row.get(column)
        if value is None:
            return 0, 0, row[spec.key]
        if isinstance(value, int | float):
            return 1, value, row[spec.key]
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
        return 2, text, row[spec.key]

    found.sort(key=place, reverse=direction == "DESC")


def _check_column(spec: TableSpec, column: str) -> None:
    """Refuse any name that isn't a registered column: names become part of the statement."""
    if column not in spec.columns or not _PLAIN_NAME.match(column):
        raise InvalidWrite(spec.name, column, "no such column in this table")


def _check_comparable(spec: TableSpec, column: str, value: Any) -> None:
    """Refuse what SQLite can't compare with a column: equality is for plain values only."""
    if isinstance(value, str):
        check_text(spec.name, column, value)
    elif isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
        raise InvalidWrite(spec.name, column, "is beyond 64 bits")
    elif value is not None and not isinstance(value, int | float):
        raise InvalidWrite(spec.name, column, "where compares text, numbers, booleans and null")
