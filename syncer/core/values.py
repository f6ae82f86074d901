"""When two values of a column are the same, and how JSON objects merge by key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from local_store.ops import TableSpec

ABSENT: Any = object()
"""No such key, or no such row: differs from null."""


def same(spec: TableSpec, column: str, one: Any, other: Any) -> bool:
    """Compare two values as the column's type does: a timestamp in any spelling is one moment."""
    if one is ABSENT or other is ABSENT or one is None or other is None:
        return one is other
    kind = spec.columns[column].type if column in spec.columns else "json"
    if kind == "timestamp":
        return bool(_moment(one) == _moment(other))
    if kind == "uuid":
        return str(one).lower() == str(other).lower()
    return same_json(one, other)


def same_json(one: Any, other: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, true doesn't equal 1."""
    if one is ABSENT or other is ABSENT:
        return one is other
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


def clashing_keys(base: Any, mine: Any, theirs: Any) -> list[str]:
    """Return the keys that both sides changed, to different values."""
    clashing = []
    for key in sorted({*base, *mine}):
        was, value, there = (side.get(key, ABSENT) for side in (base, mine, theirs))
        changed = not same_json(was, value)
        if changed and not same_json(was, there) and not same_json(value, there):
            clashing.append(key)
    return clashing


def with_my_keys(base: Any, mine: Any, theirs: Any, dropped: set[str]) -> dict[str, Any]:
    """Return theirs with the keys that mine changed against base, but for the dropped ones."""
    merged = dict(theirs)
    for key in {**base, **mine}:
        was, value = base.get(key, ABSENT), mine.get(key, ABSENT)
        if key in dropped or same_json(was, value):
            continue
        if value is ABSENT:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _moment(text: Any) -> Any:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return text
