"""What a merge or a decision makes of a parked transaction, in the modelled server: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from local_store.ops import Row
from syncer.core.json_merge import ABSENT

Choice = Literal["mine", "theirs", "edited"]
Overlap = tuple[str, ...]


def overlap(op: Row, before: Row, row: Row | None) -> Overlap | None:
    """Return the columns that both sides changed to different values; None for none."""
    if row is None or op["kind"] == "delete":
        return tuple(sorted(op["values"]))
    found = [
        column
        for column, mine in sorted(op["values"].items())
        if (op["kind"] == "insert" or before.get(column) != row.get(column))
        and mine != row.get(column)
    ]
    return tuple(found) or None


def rebased(item: Row, met: Mapping[str, str]) -> Row:
    """Return the item on the versions that it met."""
    ops = []
    for op in item["ops"]:
        name = f"{op['table']}/{op['id']}"
        moved = name in met and op["kind"] != "insert"
        ops.append({**op, "base": met[name]} if moved else op)
    return {**item, "met": {**(item.get("met") or {}), **met}, "ops": ops}


def decided(item: Row, record: Mapping[str, Any], choice: Choice) -> Row:
    """Return the item as it goes on after one record of it was decided."""
    version, met = record.get("theirs_version"), dict(item.get("met") or {})
    kept = []
    for op, before in zip(item["ops"], item["before"], strict=True):
        if (op["table"], op["id"]) != (record["table"], record["id"]):
            kept.append((op, before))
        elif choice == "mine":  # over an insert's row, too: there is one
            met[f"{op['table']}/{op['id']}"] = version
            kind = "update" if op["kind"] == "insert" else op["kind"]
            kept.append(({**op, "kind": kind, "base": version}, before))
        elif version is not None:
            kept.append((without(op, record, version), before))
        # else their row is gone, and so is this op
    ops, befores = [op for op, _ in kept], [before for _, before in kept]
    return {**item, "ops": ops, "before": befores, "met": met}


def without(op: Row, record: Mapping[str, Any], version: str | None) -> Row:
    """Return what a person's `theirs` leaves of an op: the columns that weren't in conflict.

    Of a column that was merged by key, only the disputed keys become theirs.
    """
    values = dict(op["values"]) if op["kind"] == "update" else {}
    theirs = record.get("theirs") or {}
    for name in record["columns"]:
        column, _, key = name.partition(".")
        if not key or not isinstance(values.get(column), dict):
            values.pop(column, None)
        else:
            rest = {k: v for k, v in values[column].items() if k != key}
            values[column] = {**rest, key: theirs[name]} if name in theirs else rest
    return {**op, "kind": "update", "base": version, "values": values}


def covered(op: Row, record: Mapping[str, Any]) -> bool:
    """Tell whether an op changes a column that a record is about."""
    columns = {name.partition(".")[0] for name in record["columns"]}
    is_there = (op["table"], op["id"]) == (record["table"], record["id"])
    return is_there and op["kind"] == "update" and not columns.isdisjoint(op["values"])


def given_up(op: Row, record: Mapping[str, Any]) -> bool:
    """Tell whether an op deletes the row of a record, which stays when it isn't mine."""
    return (op["table"], op["id"], op["kind"]) == (record["table"], record["id"], "delete")


def carried_over(
    record: Row, older: Mapping[str, Any], ops: Sequence[Row], row: Row | None, *, more: bool
) -> Row:
    """Return a newer record in an undecided one's place, which also covers what waits behind.

    `ops` are those of the covered changes, `more` of them may be on their way. What only the older
    one disputes is told of while a change still sets it otherwise than the row has it, or deletes
    the row.
    """
    columns = set(record["columns"])
    mine, theirs = dict(record["mine"]), dict(record["theirs"])
    ops = [op for op in ops if (op["table"], op["id"]) == (record["table"], record["id"])]
    is_deleted = any(op["kind"] == "delete" for op in ops)
    for name in sorted({*columns, *older["columns"]}):
        column, _, key = name.partition(".")
        values = [_at(op["values"], column, key) for op in ops]
        made = [value for value in values if value is not ABSENT]
        if name not in record["columns"]:
            there = _at(row or {}, column, key)
            is_over = made[-1] == there if made else not is_deleted
            if column in record["columns"] or (is_over and not more):
                continue
            columns.add(name)
            if there is not ABSENT:
                theirs[name] = there
        if more and name in older["mine"]:
            mine[name] = older["mine"][name]
        elif made:
            mine[name] = made[-1]
    sides = {"columns": sorted(columns), "mine": mine, "theirs": theirs}
    return {**record, **sides, "through": older.get("through")}


def _at(values: Mapping[str, Any], column: str, key: str) -> Any:
    found = values.get(column, ABSENT)
    if not key:
        return found
    return found.get(key, ABSENT) if isinstance(found, dict) else ABSENT
