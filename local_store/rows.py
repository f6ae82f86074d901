"""The merged local copy of rows: read-your-writes for the API, clean rows for refreshes.

Functions take the open connection; the store owns locks and transactions. Every statement that
returns a row to a caller filters by `user_id`: somebody else's row looks absent.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from local_store.door import INT_MAX, INT_MIN, canonical_uuid, check_text, lookup_id
from local_store.errors import InvalidWrite, RowNotFound, VersionMismatch
from local_store.ops import HeldRow, Row, TableSpec, WireOp, user_uuid

_IS_PENDING = "EXISTS (SELECT 1 FROM touches t WHERE t.tbl = r.tbl AND t.id = r.id)"
_VERSION = f"CASE WHEN r.base IS NULL OR {_IS_PENDING} THEN r.touched_at ELSE r.base END"
_READ = f"""
    SELECT r.id, r.user_id, r.body, r.base, r.touched_at, r.version, {_IS_PENDING}
    FROM rows r
"""
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class Applied:
    """What one op did here: the values it replaced, the rows it touched, and for a delete the
    children that its author knew, with their versions.
    """

    before: Row | None
    touched: list[tuple[str, str]]
    children: dict[str, str | None] | None = None


def get(connection: sqlite3.Connection, spec: TableSpec, row_id: str, user_id: str) -> Row | None:
    """Return one row as its author sees it, or None."""
    found = connection.execute(
        f"{_READ} WHERE r.tbl = ? AND r.id = ? AND r.user_id = ? AND NOT r.deleted",
        (spec.name, row_id, user_id),
    ).fetchone()
    return None if found is None else _shown(spec, found)


def select(
    connection: sqlite3.Connection,
    spec: TableSpec,
    user_id: str,
    where: Mapping[str, Any],
    order_by: str | None,
    limit: int,
) -> list[Row]:
    """Return the author's rows that equal `where`, ordered, at most `limit`.

    `order_by` names a column, with a leading minus for descending; ties go by id.
    """
    clauses, values = ["r.user_id = ?", "r.tbl = ?", "NOT r.deleted"], [user_id, spec.name]
    for column, value in where.items():
        clause, bound = _equals(spec, column, value)
        clauses.append(clause)
        values.extend(bound)
    sql = f"{_READ} WHERE {' AND '.join(clauses)} ORDER BY {_order(spec, order_by)} LIMIT ?"
    return [_shown(spec, found) for found in connection.execute(sql, (*values, limit))]


def held(connection: sqlite3.Connection, table: str, row_id: str, user_id: str) -> bool:
    """Tell whether this author's row, or its deletion, is known here."""
    found = connection.execute(
        "SELECT 1 FROM rows WHERE tbl = ? AND id = ? AND user_id = ?", (table, row_id, user_id)
    ).fetchone()
    return found is not None


def apply_op(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    op: WireOp,
    author: str,
    expected_version: int | None,
    accepted_at: str,
    counter: int,
) -> Applied:
    """Put one op into the local copy.

    Raises InvalidWrite, RowNotFound or VersionMismatch; the caller rolls the transaction back.
    """
    spec = tables[op.table]
    stamp = (accepted_at, counter)
    if op.kind == "insert":
        _insert(connection, spec, op, author, stamp)
        return Applied(None, [(op.table, op.id)])
    found = connection.execute(
        "SELECT body, version FROM rows WHERE tbl = ? AND id = ? AND user_id = ? AND NOT deleted",
        (op.table, op.id, author),
    ).fetchone()
    if found is None:
        raise RowNotFound(op.table, op.id)
    if expected_version is not None and found[1] != expected_version:
        raise VersionMismatch(op.table, op.id, expected_version, found[1])
    body = orjson.loads(found[0])
    if op.kind == "delete":
        children: dict[str, str | None] = {}
        touched = _delete(connection, tables, spec.name, op.id, author, stamp, children)
        return Applied(body, touched, children)
    if spec.parent is not None and spec.parent[0] in op.values:
        _check_parent(connection, spec, spec.parent, op.values[spec.parent[0]], author)
    # A column that is missing here was left to the server's default: nobody here knows it yet.
    before = {column: body[column] for column in op.values if column in body}
    parent_id = {**body, **op.values}.get(spec.parent[0]) if spec.parent else None
    connection.execute(
        "UPDATE rows SET body = ?, parent_id = ?, touched_at = ?, changed_at = ?,"
        " version = version + 1 WHERE tbl = ? AND id = ?",
        (_dump({**body, **op.values}), parent_id, *stamp, op.table, op.id),
    )
    return Applied(before, [(op.table, op.id)])


def _insert(
    connection: sqlite3.Connection, spec: TableSpec, op: WireOp, author: str, stamp: tuple[str, int]
) -> None:
    parent_id = op.values.get(spec.parent[0]) if spec.parent else None
    if spec.parent is not None:
        _check_parent(connection, spec, spec.parent, parent_id, author)
    body = dict(op.values)
    if "created_at" in spec.server_owned:
        body["created_at"] = stamp[0]  # the moment of acceptance; the server stores the same
    written = connection.execute(
        "INSERT INTO rows (tbl, id, user_id, parent_id, body, touched_at, changed_at, version)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, 1)"
        " ON CONFLICT (tbl, id) DO UPDATE SET body = excluded.body, deleted = 0,"
        "   parent_id = excluded.parent_id, touched_at = excluded.touched_at,"
        "   changed_at = excluded.changed_at, version = version + 1"
        " WHERE deleted AND user_id = excluded.user_id",
        (spec.name, op.id, author, parent_id, _dump(body), *stamp),
    ).rowcount
    if written != 1:
        raise InvalidWrite(spec.name, spec.key, f"{op.id} is taken; use a fresh id")


def _delete(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    table: str,
    row_id: str,
    author: str,
    stamp: tuple[str, int],
    known: dict[str, str | None],
) -> list[tuple[str, str]]:
    """Mark a row and its author's children of it deleted, as the server's cascade will.

    `known` is told each child and its version, None while a change of it is under way. Somebody
    else's row that names this parent stays: the server decides about it.
    """
    connection.execute(
        "UPDATE rows SET deleted = 1, touched_at = ?, changed_at = ?, version = version + 1"
        " WHERE tbl = ? AND id = ?",
        (*stamp, table, row_id),
    )
    touched = [(table, row_id)]
    for child in tables.values():
        if child.parent is None or child.parent[1] != table:
            continue
        children = connection.execute(
            f"SELECT r.id, CASE WHEN {_IS_PENDING} THEN NULL ELSE r.base END FROM rows r"
            " WHERE r.parent_id = ? AND r.tbl = ? AND r.user_id = ? AND NOT r.deleted",
            (row_id, child.name, author),
        ).fetchall()
        for child_id, base in children:
            known[f"{child.name}/{child_id}"] = base
            touched += _delete(connection, tables, child.name, child_id, author, stamp, known)
    return touched


def _check_parent(
    connection: sqlite3.Connection,
    spec: TableSpec,
    parent: tuple[str, str],
    parent_id: str | None,
    author: str,
) -> None:
    """Refuse a parent that its author deleted; an unknown or foreign one is the server's affair."""
    column, table = parent
    found = connection.execute(
        "SELECT 1 FROM rows WHERE tbl = ? AND id = ? AND user_id = ? AND deleted",
        (table, parent_id, author),
    ).fetchone()
    if found is not None:
        raise InvalidWrite(spec.name, column, f"the parent {parent_id} was deleted here")


def settle_versions(
    connection: sqlite3.Connection, versions: Mapping[str, str | None], counter: int
) -> None:
    """Remember the server versions that a confirmed transaction produced."""
    connection.executemany(
        "UPDATE rows SET base = ?, changed_at = ? WHERE tbl = ? AND id = ?",
        [(version, counter, *key.split("/", 1)) for key, version in versions.items()],
    )


def refresh(
    connection: sqlite3.Connection,
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
    for row in select(connection, spec, user_id, where, None, -1):
        if row[spec.key] in seen or row["_pending"]:
            continue
        changed += connection.execute(
            "DELETE FROM rows WHERE tbl = ? AND id = ? AND changed_at <= ?",
            (spec.name, row[spec.key], as_of),
        ).rowcount
    return changed


def _refresh_row(
    connection: sqlite3.Connection,
    spec: TableSpec,
    server_row: Row,
    user_id: str,
    as_of: int,
    counter: int,
) -> int:
    row_id, base = str(server_row[spec.key]), str(server_row[spec.version])
    body = {
        column: value
        for column, value in server_row.items()
        if column not in (spec.key, spec.owner, spec.version)
    }
    parent_id = body.get(spec.parent[0]) if spec.parent else None
    return connection.execute(
        "INSERT INTO rows"
        " (tbl, id, user_id, parent_id, body, base, touched_at, changed_at, version)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1)"
        " ON CONFLICT (tbl, id) DO UPDATE SET body = excluded.body, base = excluded.base,"
        "   parent_id = excluded.parent_id, changed_at = excluded.changed_at, deleted = 0,"
        "   version = version + (base IS NOT excluded.base)"
        f" WHERE changed_at <= ? AND user_id = excluded.user_id AND NOT {_PENDING_TARGET}",
        (spec.name, row_id, user_id, parent_id, _dump(body), base, base, counter, as_of),
    ).rowcount


_PENDING_TARGET = (
    "EXISTS (SELECT 1 FROM touches t WHERE t.tbl = rows.tbl AND t.id = rows.id)"  # upsert target
)


def clean_rows(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], after: int, limit: int
) -> list[tuple[int, HeldRow]]:
    """Return rows without pending changes in storage order, for an audit of their content."""
    found = connection.execute(
        "SELECT r.rowid, r.tbl, r.id, r.user_id, r.body, r.base, r.deleted FROM rows r"
        f" WHERE r.rowid > ? AND NOT {_IS_PENDING} ORDER BY r.rowid LIMIT ?",
        (after, limit),
    )
    return [
        (rowid, HeldRow(table, row_id, user_id, orjson.loads(body), base, bool(deleted)))
        for rowid, table, row_id, user_id, body, base, deleted in found
        if table in tables
    ]


def _shown(spec: TableSpec, found: tuple[Any, ...]) -> Row:
    row_id, user_id, body, base, touched_at, version, pending = found
    row = dict.fromkeys(spec.columns)
    row.update(orjson.loads(body))
    row[spec.key], row[spec.owner] = row_id, user_id
    row[spec.version] = touched_at if pending or base is None else base
    row["_version"], row["_pending"] = version, bool(pending)
    return row


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
        return f"{_VERSION} IS ?", [value]
    if spec.parent is not None and column == spec.parent[0]:
        return ("r.parent_id IS NULL", []) if value is None else ("r.parent_id = ?", [value])
    if value is None:
        return f"json_extract(r.body, '$.{column}') IS NULL", []
    return f"json_extract(r.body, '$.{column}') = ?", [value]


def _order(spec: TableSpec, order_by: str | None) -> str:
    if order_by is None:
        return "r.rowid"
    column, direction = order_by.removeprefix("-"), "DESC" if order_by.startswith("-") else "ASC"
    if column == spec.key:
        return f"r.id {direction}"
    _check_column(spec, column)
    if column == spec.version:
        return f"{_VERSION} {direction}, r.id {direction}"
    return f"json_extract(r.body, '$.{column}') {direction}, r.id {direction}"


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


def _dump(body: Row) -> str:
    return orjson.dumps(body).decode()
