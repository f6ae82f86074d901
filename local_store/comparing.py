"""What a question about rows compares and how it orders them, in SQL and in Python alike.

A value stands for itself, a list or tuple for any of its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from local_store.door import INT_MAX, INT_MIN, canonical_uuid, check_text, lookup_id
from local_store.errors import InvalidWrite
from local_store.ops import Row, TableSpec, user_uuid
from local_store.schema import AGE, age_of

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ANY_OF = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a user's rows of one table.

    `order_by` is a column, with a leading minus descending; ties go by id. The answer begins
    behind `after`, the order column's value and the id of a row. `limit` -1 means all, `columns`
    None the whole rows.
    """

    spec: TableSpec
    user_id: str
    where: Mapping[str, Any]
    order_by: str | None = None
    limit: int = -1
    columns: Sequence[str] | None = None
    after: tuple[Any, str] | None = None

    @property
    def order_column(self) -> str:
        """The column that orders the answer."""
        return (self.order_by or self.spec.key).removeprefix("-")

    @property
    def is_descending(self) -> bool:
        """Tell whether the last comes first."""
        return (self.order_by or "").startswith("-")

    @property
    def by_age(self) -> bool:
        """Tell whether the index of ages answers it in order."""
        return self.order_column == AGE and self.spec.parent is None


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
        return f"{place} {_ANY_OF}", [orjson.dumps(values).decode()]
    return (f"{place} IS NULL", []) if value is None else (f"{place} = ?", values)


def plain(spec: TableSpec, where: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return by column the values of which a row may have any, in the forms of a shown row."""
    return {
        column: [_stored(spec, column, one) for one in any_of(value)]
        for column, value in where.items()
    }


def order_of(question: Question) -> tuple[str, str]:
    """Return the expression that orders `rows r`, and its direction; ties go by id."""
    column = question.order_column
    if column != question.spec.key:
        check_column(question.spec, column)
    place = age_of("r.") if question.by_age else _place(question.spec, column)
    return place, "DESC" if question.is_descending else "ASC"


def behind(question: Question) -> tuple[str, list[Any]]:
    """Return the condition that a row comes after the one that the question names."""
    if question.after is None:
        return "1", []
    place, _ = order_of(question)
    sign = "<" if question.is_descending else ">"
    value, row_id = question.after
    # The first half is implied; an index can use it.
    return f"{place} {sign}= ? AND ({place}, r.id) {sign} (?, ?)", [value, value, row_id]


def place_of(question: Question, row: Row) -> tuple[int, Any, str]:
    """Return where a row stands, as SQLite orders: nothing, then numbers, then text; then ids."""
    return _placed(row.get(question.order_column), row[question.spec.key])


def is_behind(question: Question, row: Row) -> bool:
    """Tell whether a row comes after the one that the question names.

    As in SQL, what has no value is neither before nor behind one.
    """
    if question.after is None:
        return True
    if question.after[0] is None or row.get(question.order_column) is None:
        return False
    place, end = place_of(question, row), _placed(*question.after)
    return place < end if question.is_descending else place > end


def _placed(value: Any, row_id: str) -> tuple[int, Any, str]:
    if value is None:
        return 0, 0, row_id
    if isinstance(value, int | float):
        return 1, value, row_id
    return 2, value if isinstance(value, str) else orjson.dumps(value).decode(), row_id


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
