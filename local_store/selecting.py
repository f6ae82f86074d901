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
    Question,
    behind,
    check_column,
    clause_of,
    is_behind,
    order_of,
    place_of,
    plain,
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

_BEARING_ON_IDS = (
    "SELECT DISTINCT t.id FROM json_each(?2) k CROSS JOIN touches t"
    " ON t.tbl = ?1 AND t.id = k.value"
)
_BEARING_ON_CHILDREN = (  # where a change doesn't name the parent, the row does
    "SELECT t.id FROM json_each(?2) k CROSS JOIN touches t ON t.parent_id = k.value AND t.tbl = ?1"
    " UNION SELECT r.id FROM json_each(?2) k CROSS JOIN rows r"
    f" ON r.parent_id = k.value AND r.tbl = ?1 AND r.user_id = ?3 AND {IS_TOUCHED}"
)
_BEARING_ON_USER = (
    "SELECT DISTINCT t.id FROM ("
    " SELECT position FROM turns WHERE log IN (SELECT ordinal FROM logs) AND user_id = ?2"
    " UNION ALL SELECT position FROM op_log WHERE parked = 1 AND user_id = ?2"
    " UNION ALL SELECT position FROM touches WHERE stage = 2"
    ") p CROSS JOIN touches t ON t.position = p.position WHERE t.tbl = ?1"
)


def select(connection: sqlite3.Connection, tables: Tables, question: Question) -> list[Row]:
    """Return the author's rows that the question asks for.

    Clean rows are searched by SQLite, and only as many as are asked for are read; rows with
    changes on them are all looked at. With `columns`, a row has these, the one that orders, its
    key, its version and its marks.
    """
    find = _clean if question.columns is None else _projected
    found = find(connection, question)
    keys = _touched_keys(connection, question.spec, question.user_id, question.where)
    if keys:
        for row in _touched(connection, tables, question, keys):
            found.append(row if question.columns is None else _only(question, row))
        found.sort(key=partial(place_of, question), reverse=question.is_descending)
    return found if question.limit < 0 else found[: question.limit]


def candidates(connection: sqlite3.Connection, question: Question) -> tuple[list[str], list[str]]:
    """Return the keys among which the answer is: of clean rows that are it, of all changed ones."""
    sql, values = _search(question)
    found = connection.execute(f"SELECT r.id {sql}", values).fetchall()
    touched = _touched_keys(connection, question.spec, question.user_id, question.where)
    return [row_id for (row_id,) in found], [row_id for _table, row_id in touched]


def _clean(connection: sqlite3.Connection, question: Question) -> list[Row]:
    sql, values = _search(question)
    found = connection.execute(
        f"SELECT r.id, r.user_id, r.body, r.base, r.version, {row_intact('r.')} {sql}", values
    ).fetchall()
    return [shown(question.spec, row[0], base_row(row[1:]), False) for row in found]


def _projected(connection: sqlite3.Connection, question: Question) -> list[Row]:
    """Return some columns of the rows: SQLite takes them out, which spares making the rest."""
    spec, columns = question.spec, _columns(question)
    for column in columns:
        check_column(spec, column)
    sql, values = _search(question)
    taken = "".join(f", r.body -> '$.{column}'" for column in columns)
    found = connection.execute(
        f"SELECT r.id, r.base, r.version, {row_intact('r.')}{taken} {sql}", values
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


def _columns(question: Question) -> list[str]:
    """Return the columns to take out of the rows."""
    apart = (question.spec.key, question.spec.version)
    named = dict.fromkeys([*(question.columns or ()), question.order_column])
    return [column for column in named if column not in apart]


def _only(question: Question, row: Row) -> Row:
    spec = question.spec
    names = (spec.key, spec.version, "_version", "_pending", *_columns(question))
    return {name: row[name] for name in names}


def _search(question: Question) -> tuple[str, list[Any]]:
    """Return the rest of a SELECT of clean rows, and what to bind."""
    spec, where = question.spec, question.where
    by_parent = spec.parent is not None and where.get(spec.parent[0]) is not None
    by_age = question.by_age and spec.key not in where
    # Left to choose, SQLite walks the whole table in the order of ids to spare itself the sorting.
    index = "rows_of_parent" if by_parent else "rows_by_creation" if by_age else "rows_of_user"
    clauses = ["r.user_id = ?", "r.tbl = ?", "r.body IS NOT NULL", f"NOT {IS_TOUCHED}"]
    values: list[Any] = [question.user_id, spec.name]
    if by_age:
        clauses.append("r.parent_id IS NULL")  # what the index is limited to, and true of all
    bounds = [clause_of(spec, column, value) for column, value in where.items()]
    for clause, bound in [*bounds, behind(question)]:
        clauses.append(clause)
        values.extend(bound)
    place, direction = order_of(question)
    sql = (
        f"FROM rows r INDEXED BY {index} WHERE {' AND '.join(clauses)}"
        f" ORDER BY {place} {direction}, r.id {direction} LIMIT ?"
    )
    return sql, [*values, question.limit]


def _touched(
    connection: sqlite3.Connection, tables: Tables, question: Question, keys: Sequence[Key]
) -> list[Row]:
    spec, asked = question.spec, plain(question.spec, question.where)
    marked = pending_among(connection, keys)
    rows = [
        shown(spec, key[1], seen, key in marked)
        for key, seen in views(connection, tables, keys).items()
        if seen is not None and seen.body is not None and seen.user_id == question.user_id
    ]
    return [
        row
        for row in rows
        if all(row.get(column) in values for column, values in asked.items())
        and is_behind(question, row)
    ]


def _touched_keys(
    connection: sqlite3.Connection, spec: TableSpec, user_id: str, where: Mapping[str, Any]
) -> list[Key]:
    """Return the author's rows of a table that changes bear on, narrowed by parent where asked."""
    asked = plain(spec, {name: value for name, value in where.items() if value is not None})
    parent = spec.parent[0] if spec.parent is not None else None
    if spec.key in asked:
        values = orjson.dumps(asked[spec.key]).decode()
        found = connection.execute(_BEARING_ON_IDS, (spec.name, values))
    elif parent in asked:
        values = orjson.dumps(asked[parent]).decode()
        found = connection.execute(_BEARING_ON_CHILDREN, (spec.name, values, user_id))
    else:
        found = connection.execute(_BEARING_ON_USER, (spec.name, user_id))
    keys = [(spec.name, row_id) for (row_id,) in found]
    if not all(isinstance(row_id, str) for _, row_id in keys):
        raise RecordDamaged
    return keys


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
        for row in _clean(connection, Question(spec, user_id, where))
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
