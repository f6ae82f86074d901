"""One transaction as one line of a segment's body, and back."""

from __future__ import annotations

from typing import Any

import orjson

from local_store.ops import PendingTransaction, WireOp

_PLAIN = ("seq", "txn_id", "user_id", "digest", "accepted_at", "position", "size_bytes")
_LISTS = ("ops", "bases", "chained", "after", "before", "children", "records")
_MAPS = ("met",)
_PER_OP = ("bases", "chained", "before", "children")
_NUMBERS = ("seq", "position", "size_bytes")


def encode_line(item: PendingTransaction) -> bytes:
    """Return the line, without its end: JSON escapes newlines, so none is inside."""
    line: dict[str, Any] = {name: getattr(item, name) for name in _PLAIN}
    line |= {name: getattr(item, name) for name in _LISTS}
    line |= {name: dict(getattr(item, name)) for name in _MAPS}
    line["ops"] = [op.to_json() for op in item.ops]
    line["children"] = [None if known is None else dict(known) for known in item.children]
    return orjson.dumps(line)


def decode_line(line: bytes, log_id: str) -> PendingTransaction:
    """Return the transaction, never tried and not parked. Raises ValueError for anything else.

    Strict although the line is authentic: a field that this code doesn't know would be lost.
    """
    found = orjson.loads(line)
    if not isinstance(found, dict) or set(found) != {*_PLAIN, *_LISTS, *_MAPS}:
        raise ValueError("not the fields of a transaction")
    _check_types(found)
    return PendingTransaction(
        **{name: found[name] for name in _PLAIN},
        ops=tuple(_op(op) for op in found["ops"]),
        bases=tuple(found["bases"]),
        chained=tuple(found["chained"]),
        after=tuple(found["after"]),
        before=tuple(found["before"]),
        children=tuple(found["children"]),
        records=tuple(found["records"]),
        met=found["met"],
        attempts=0,
        log_id=log_id,
    )


def _check_types(found: dict[str, Any]) -> None:
    for name in _PLAIN:
        if type(found[name]) is not (int if name in _NUMBERS else str):
            raise ValueError(f"{name} has another type")
    if not all(isinstance(found[name], list) for name in _LISTS):
        raise ValueError("not a list")
    if any(len(found[name]) != len(found["ops"]) for name in _PER_OP):
        raise ValueError("not one for each op")
    _all(found["bases"], str, None)
    _all(found["chained"], bool)
    _all(found["after"], str)
    _all(found["before"], dict, None)
    _all(found["children"], dict, None)
    _all(found["records"], dict)
    if not isinstance(found["met"], dict):
        raise ValueError("not a map")
    _all(list(found["met"].values()), str, None)


def _all(items: list[Any], kind: type, *others: None) -> None:
    if not all(isinstance(item, kind) or (others and item is None) for item in items):
        raise ValueError(f"not {kind.__name__}")


def _op(found: dict[str, Any]) -> WireOp:
    op = WireOp(**found)
    if op.kind not in ("insert", "update", "delete") or not isinstance(op.values, dict):
        raise ValueError("not an op")
    if not (isinstance(op.table, str) and isinstance(op.id, str)):
        raise ValueError("not an op")
    return op
