"""When two values are the same, and what of a JSON object's keys each side changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from local_store.ops import Row, TableSpec

ABSENT: Final[Any] = object()
"""Stands for a key or a value that isn't there: to a merge, null is a value like any other."""

_BELOW_MICROSECONDS = re.compile(r"(\.[0-9]{6})([0-9]+)")


def same(one: Any, other: Any, *, exact: bool = False) -> bool:
    """Tell whether two JSON values are the same: 1 is 1.0, but True isn't 1.

    `exact` tells 1 from 1.0 too, as the server's stored bytes do. Either may be ABSENT.
    """
    # A stack instead of recursion: how deep a client's document goes must not matter here.
    stack = [(one, other)]
    while stack:
        left, right = stack.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            if left.keys() != right.keys():
                return False
            stack.extend((value, right[key]) for key, value in left.items())
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return False
            stack.extend(zip(left, right, strict=True))
        elif isinstance(left, bool) or isinstance(right, bool) or exact:
            if type(left) is not type(right) or left != right:
                return False
        elif left != right:
            return False
    return True


def equal(spec: TableSpec, column: str, one: Any, other: Any) -> bool:
    """Compare as the column's values: the server writes timestamps and uuids in its own form."""
    rule = spec.columns.get(column)
    if rule is not None and isinstance(one, str) and isinstance(other, str):
        if rule.type == "uuid":
            return one.lower() == other.lower()
        if rule.type == "timestamp":
            moment, there = _moment(one), _moment(other)
            if moment is not None and there is not None:
                return moment == there
    return same(one, other)


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Return the keys that were added, removed or given another value."""
    return {
        key
        for key in {*before, *after}
        if not same(before.get(key, ABSENT), after.get(key, ABSENT))
    }


def with_changes(
    theirs: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    keys: Collection[str] | None = None,
) -> Row:
    """Return `theirs` with what became different from `before` to `after`, in `keys` only."""
    merged = dict(theirs)
    for key in changed_keys(before, after):
        if keys is not None and key not in keys:
            continue
        if key in after:
            merged[key] = after[key]
        else:
            merged.pop(key, None)
    return merged


def _moment(text: str) -> datetime | None:
    # Postgres keeps microseconds and rounds what is below; Python would cut it off.
    rounding = timedelta(0)
    below = _BELOW_MICROSECONDS.search(text)
    if below is not None:
        text = text.replace(below[0], below[1])
        rounding = timedelta(microseconds=int(below[2][0] >= "5"))
    try:
        return datetime.fromisoformat(text.upper()) + rounding
    except (ValueError, OverflowError):
        return None  # such as `infinity`: compared as text
