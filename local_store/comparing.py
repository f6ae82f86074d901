"""What a question about rows compares and how it orders them, in SQL and in Python alike.

A value stands for itself, a list or tuple for any of its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from local_store.door import INT_MAX, INT_MIN, canonical_uuid, check_text, lookup_id
from local_store.errors import InvalidWrite
from local_store.ops import Row, TableSpec, user_uuid

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
ANY_OF = "IN (SELECT value FROM json_each(?))"


def any_of(value: Any) -> list[Any]:
    """Return the values of which a row may have any."""
    return list(value) if isinstance(value, list | tuple) else [value]


def clause_of(spec: TableSpec, column: str, value: Any) -> tuple[str, list[Any]]:
    """Return the condition on `rows r` that a column equals a value, and what to bind.

    Raises InvalidWrite for a column that isn't there and a value that can't be compared.
    """
    if column != spec.key:
        check_column(spec, column)
    is_many = isinstance(value, list | tuple)
    for one in any_of(value):
        _check_comparable(spec, column, one, is_many)
    values = [_stored(spec, column, one) for one in any_of(value)]
    place = _place(spec, column)
    if is_many:
        return f"{place} {ANY_OF}", [orjson.dumps(values).decode()]
    return (f"{place} IS NULL", []) if value is None else (f"{place} = ?", values)


def plain(spec: TableSpec, where: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return by column the values of which a row may have any, in the forms of a shown row."""
    return {
        column: [_stored(spec, column, one) for one in any_of(value)]
        for column, value in where.items()
    }


def order_of(spec: TableSpec, order_by: str | None) -> str:
    """Return the ORDER BY of `rows r`; ties go by id."""
    column, direction = _ordering(spec, order_by)
    if column == spec.key:
        return f"r.id {direction}"
    return f"{_place(spec, column)} {direction}, r.id {direction}"


def sort(spec: TableSpec, found: list[Row], order_by: str | None) -> None:
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


def check_column(spec: TableSpec, column: str) -> None:
    """Refuse any name that isn't a registered column: names become part of the statement."""
    if column not in spec.columns or not _PLAIN_NAME.match(column):
        raise InvalidWrite(spec.name, column, "no such column in this table")


def _place(spec: TableSpec, column: str) -> str:
    if spec.parent is not None and column == spec.parent[0]:
        return "r.parent_id"
    named = {spec.key: "r.id", spec.owner: "r.user_id", spec.version: "r.base"}
    return named.get(column) or f"json_extract(r.body, '$.{column}')"


def _stored(spec: TableSpec, column: str, value: Any) -> Any:
    """Return a value in the form that rows have it in."""
    if value is None:
        return None
    if column == spec.key:
        return lookup_id(spec, value)
    if column == spec.owner:
        return user_uuid(str(value))
    if column in spec.columns and spec.columns[column].type == "uuid":
        return canonical_uuid(value) or value
    return value


def _ordering(spec: TableSpec, order_by: str | None) -> tuple[str, str]:
    column = (order_by or spec.key).removeprefix("-")
    if column != spec.key:
        check_column(spec, column)
    return column, "DESC" if (order_by or "").startswith("-") else "ASC"


def _check_comparable(spec: TableSpec, column: str, value: Any, is_many: bool) -> None:
    """Refuse what SQLite can't compare with a column: equality is for plain values only."""
    if isinstance(value, str):
        check_text(spec.name, column, value)
    elif isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
        raise InvalidWrite(spec.name, column, "is beyond 64 bits")
    elif value is None and is_many:
        raise InvalidWrite(spec.name, column, "any of several values can't be null; ask apart")
    elif value is not None and not isinstance(value, int | float):
        raise InvalidWrite(spec.name, column, "where compares text, numbers, booleans and null")
