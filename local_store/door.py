"""Validation at the door, in the caller's time: what is accepted here can be delivered.

A value that the server's JSON parser or its column would refuse would turn into a dead letter
hours later, when nobody waits for it. It is refused now, with the field's name.
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from local_store.clock import new_id
from local_store.errors import InvalidWrite
from local_store.ops import Column, Delete, Insert, Op, Row, TableSpec, Update, WireOp, user_uuid

_UNKNOWN = "no such column in this table"
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
# What Python and Postgres read alike: Python takes week dates, any separator and offsets up to a
# day as well, which Postgres refuses (its offsets end before 16 hours).
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?"
    r"([Zz]|[+-](0[0-9]|1[0-5])(:?[0-5][0-9])?)"
)
_CANONICAL_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Accepted(NamedTuple):
    """A transaction that passed the door: its ops, their encoding and its digest.

    `fresh` tells per op whether its id was made here, so that no row can have it yet.
    """

    ops: tuple[WireOp, ...]
    expected: tuple[int | None, ...]
    fresh: tuple[bool, ...]
    encoded: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Bounds on one transaction."""

    op_bytes_max: int = 4 * 1024 * 1024  # 1 MB of metadata must pass; a batch carries at least one
    ops_max: int = 500  # the knee of the batch RPC: a transaction is never split
    depth_max: int = 100  # far above real documents, far below every JSON parser's limit


def accept(
    ops: Sequence[Op], tables: Mapping[str, TableSpec], author: str, limits: DoorLimits
) -> Accepted:
    """Check and encode one transaction. Raises InvalidWrite naming table, column and reason."""
    if not ops:
        raise InvalidWrite("", "ops", "a transaction needs at least one op")
    if len(ops) > limits.ops_max:
        raise InvalidWrite("", "ops", f"{len(ops)} ops; at most {limits.ops_max} per transaction")
    wire: list[WireOp] = []
    expected: list[int | None] = []
    fresh: list[bool] = []
    for op in ops:
        spec = _spec(op, tables)
        wire.append(_wire_op(op, spec, author, limits))
        if isinstance(op, Insert):
            expected.append(None)
            fresh.append(op.values.get(spec.key) is None)
        else:
            expected.append(op.expected_version)
            fresh.append(False)
    as_json = [op.to_json() for op in wire]
    encoded = orjson.dumps(as_json)  # keys as they were given: a reader finds them in that order
    if len(encoded) > limits.op_bytes_max:
        _check_sizes(wire, limits)
    return Accepted(tuple(wire), tuple(expected), tuple(fresh), encoded, _digest(as_json))


def digest_of(ops: Sequence[WireOp]) -> str:
    """Return the SHA-256 of the ops as accepted, without base and before; keys in one order."""
    return _digest([op.to_json() for op in ops])


def _digest(ops: Sequence[Row]) -> str:
    return hashlib.sha256(orjson.dumps(ops, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _check_sizes(ops: Sequence[WireOp], limits: DoorLimits) -> None:
    for op in ops:
        size_bytes = len(orjson.dumps(op.values))
        if size_bytes > limits.op_bytes_max:
            reason = f"{size_bytes} bytes; at most {limits.op_bytes_max} bytes per op"
            raise InvalidWrite(op.table, "values", reason)


def canonical_uuid(value: object) -> str | None:
    """Return the lower-case form of a UUID string, or None when it isn't one."""
    if not isinstance(value, str):
        return None
    if _CANONICAL_UUID.fullmatch(value):  # what nearly all are; parsing costs ten times as much
        return value
    try:
        return str(uuid.UUID(value))
    except ValueError:
        return None


def lookup_id(spec: TableSpec, value: object) -> str | None:
    """Return a row's id in the form it is stored in; None when no row can have it."""
    try:
        return _row_id(spec, value)
    except InvalidWrite:
        return None


def _spec(op: Op, tables: Mapping[str, TableSpec]) -> TableSpec:
    spec = tables.get(op.table)
    if spec is None:
        known = ", ".join(sorted(tables))
        raise InvalidWrite(str(op.table), "table", f"not a registered table; known: {known}")
    return spec


def _wire_op(op: Op, spec: TableSpec, author: str, limits: DoorLimits) -> WireOp:
    if isinstance(op, Delete):
        return WireOp(spec.name, "delete", _row_id(spec, op.id), {})
    if isinstance(op, Update):
        row_id, given = _row_id(spec, op.id), dict(op.changes)
        if not given:
            raise InvalidWrite(spec.name, "changes", "an update needs at least one column")
    else:
        given = dict(op.values)
        key = given.pop(spec.key, None)
        row_id = new_id() if key is None else _row_id(spec, key)
        _check_owner(spec, given, author)
    values = {
        column: _checked(spec, column, value, limits.depth_max) for column, value in given.items()
    }
    if isinstance(op, Insert):
        _check_required(spec, values)
    return WireOp(spec.name, "update" if isinstance(op, Update) else "insert", row_id, values)


def _row_id(spec: TableSpec, value: object) -> str:
    key = spec.columns.get(spec.key, Column("uuid"))
    if key.type == "uuid":
        found = canonical_uuid(value)
        if found is None:
            raise InvalidWrite(spec.name, spec.key, "must be a UUID string")
        return found
    if not isinstance(value, str) or not value:
        raise InvalidWrite(spec.name, spec.key, "must be a non-empty string")
    check_text(spec.name, spec.key, value)
    return value


def _check_owner(spec: TableSpec, given: Row, author: str) -> None:
    owner = given.pop(spec.owner, None)
    if owner is None:
        return
    if not isinstance(owner, str) or user_uuid(owner) != author:
        raise InvalidWrite(spec.name, spec.owner, "is always the author of the transaction")


def _check_required(spec: TableSpec, values: Row) -> None:
    if spec.parent is not None and values.get(spec.parent[0]) is None:
        raise InvalidWrite(spec.name, spec.parent[0], "a child row must name its parent")


def _checked(spec: TableSpec, column: str, value: Any, depth_max: int) -> Any:
    rule = spec.rules.get(column)
    if rule is None:
        known = column in spec.columns
        reason = "is owned by the server and can't be written" if known else _UNKNOWN
        raise InvalidWrite(spec.name, column, reason)
    if value is None:
        if not rule.nullable:
            raise InvalidWrite(spec.name, column, "must not be null")
        return None
    checked = _CHECKS[rule.type](spec.name, column, value, depth_max)
    if rule.enum is not None and checked not in rule.enum:
        raise InvalidWrite(spec.name, column, f"must be one of {', '.join(rule.enum)}")
    if rule.max_bytes is not None and len(orjson.dumps(checked)) > rule.max_bytes:
        raise InvalidWrite(spec.name, column, f"is over {rule.max_bytes} bytes of JSON")
    return checked


def check_text(table: str, column: str, value: Any, _depth_max: int = 0) -> str:
    """Return the text; raises InvalidWrite for what Postgres can't store as text."""
    if not isinstance(value, str):
        raise InvalidWrite(table, column, f"must be text, not {type(value).__name__}")
    if "\x00" in value:
        raise InvalidWrite(table, column, "contains the NUL character, which Postgres can't store")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        reason = "contains a lone surrogate, which isn't valid UTF-8"
        raise InvalidWrite(table, column, reason) from None
    return value


def _check_int(table: str, column: str, value: Any, _depth_max: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidWrite(table, column, f"must be an integer, not {type(value).__name__}")
    if not INT_MIN <= value <= INT_MAX:
        raise InvalidWrite(table, column, "is beyond 64 bits")
    return value


def _check_float(table: str, column: str, value: Any, _depth_max: int) -> float | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return _check_int(table, column, value, 0)
    if not isinstance(value, float):
        raise InvalidWrite(table, column, f"must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise InvalidWrite(table, column, "is NaN or Infinity, which JSON can't carry")
    return value


def _check_bool(table: str, column: str, value: Any, _depth_max: int) -> bool:
    if not isinstance(value, bool):
        raise InvalidWrite(table, column, f"must be true or false, not {type(value).__name__}")
    return value


def _check_timestamp(table: str, column: str, value: Any, _depth_max: int) -> str:
    text = check_text(table, column, value)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidWrite(table, column, "must be an ISO 8601 timestamp") from None
    if moment.tzinfo is None:
        raise InvalidWrite(table, column, "must carry a UTC offset, such as +00:00")
    if _TIMESTAMP.fullmatch(text) is None:
        raise InvalidWrite(table, column, "must look like 2026-01-31T23:59:59.999999+00:00")
    return text


def _check_uuid(table: str, column: str, value: Any, _depth_max: int) -> str:
    found = canonical_uuid(value)
    if found is None:
        raise InvalidWrite(table, column, "must be a UUID string")
    return found


def _check_text_array(table: str, column: str, value: Any, _depth_max: int) -> list[str]:
    if not isinstance(value, list):
        raise InvalidWrite(table, column, f"must be a list of texts, not {type(value).__name__}")
    return [check_text(table, f"{column}[{i}]", item) for i, item in enumerate(value)]


def _check_json(table: str, column: str, value: Any, depth_max: int) -> Any:
    # Encode, decode, compare: NaN comes back as null, a tuple as a list, a datetime as text, so
    # equality finds them all at once; the slow walk runs only to name the place.
    try:
        encoded = orjson.dumps(value)
        carried = orjson.loads(encoded)
        shallow = max(encoded.count(b"["), encoded.count(b"{")) < depth_max
        if carried == value and rb"\u0000" not in encoded and shallow:
            return carried  # a copy: the caller may go on changing theirs
    except (TypeError, ValueError, RecursionError):
        pass
    _walk_json(table, column, value, depth_max)
    return orjson.loads(orjson.dumps(value))


def _walk_json(table: str, path: str, value: Any, depth_left: int) -> None:
    if depth_left < 0:
        raise InvalidWrite(table, path.split(".")[0].split("[")[0], "is nested too deeply")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        check_text(table, path, value)
    elif isinstance(value, int):
        _check_int(table, path, value, 0)
    elif isinstance(value, float):
        _check_float(table, path, value, 0)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _walk_json(table, f"{path}[{index}]", item, depth_left - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(table, f"{path} key", key)
            _walk_json(table, f"{path}.{key}", item, depth_left - 1)
    else:
        raise InvalidWrite(table, path, f"{type(value).__name__} isn't a JSON value")


_CHECKS: dict[str, Callable[[str, str, Any, int], Any]] = {
    "text": check_text,
    "int": _check_int,
    "float": _check_float,
    "bool": _check_bool,
    "timestamp": _check_timestamp,
    "uuid": _check_uuid,
    "text[]": _check_text_array,
    "json": _check_json,
}
