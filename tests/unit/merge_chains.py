"""Pending chains as a buffer would make them, and a server that takes what a merge made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from local_store import Column, Delete, Insert, Op, Row, TableSpec, Update
from local_store.ops import StoredTransaction, WireOp
from syncer.core.merge import Merged

NOTE, NOTE_KEY = "n1", "notes/n1"
COLUMNS = {
    "id": Column("text"),
    "user_id": Column("uuid"),
    "updated_at": Column("timestamp"),
    "title": Column("text"),
    "body": Column("text"),
    "stars": Column("int"),
    "due": Column("timestamp"),
    "ref": Column("uuid"),
    "status": Column("text", nullable=False),
    "meta": Column("json"),
    "counter": Column("int"),
}


def notes(policy: Any = "merge", **changes: Any) -> dict[str, TableSpec]:
    """Return one table with a column of each kind, and its children and grandchildren."""
    spec = TableSpec(
        "notes",
        COLUMNS,
        server_owned=frozenset({"counter"}),
        json_merge=frozenset({"meta"}),
        policy=policy,
    )
    child = replace(spec, name="comments", columns={**COLUMNS, "note_id": Column("text")})
    child = replace(child, parent=("note_id", "notes"))
    grandchild = replace(spec, name="replies", columns={**COLUMNS, "comment_id": Column("text")})
    grandchild = replace(grandchild, parent=("comment_id", "comments"))
    return {
        "notes": replace(spec, **changes),
        "comments": replace(child, **changes),
        "replies": replace(grandchild, **changes),
    }


def server_row(**values: Any) -> Row:
    """Return a note as the server shows it to its author."""
    row = dict.fromkeys(COLUMNS)
    row |= {"id": NOTE, "user_id": "u", "updated_at": "v1", "counter": 7, "status": "open"}
    return {**row, "title": "A", "body": "B", "stars": 1, "meta": {"a": 1, "b": 1}, **values}


def changed(**values: Any) -> Update:
    """Return an update of the note."""
    return Update("notes", NOTE, values)


def deleted() -> Delete:
    """Return a delete of the note."""
    return Delete("notes", NOTE)


def inserted(**values: Any) -> Insert:
    """Return an insert of the note."""
    return Insert("notes", {"id": NOTE, **values})


class Author:
    """One author's buffer: what they write becomes transactions with their before images."""

    def __init__(self, **rows: Row) -> None:
        self._rows: dict[str, Row] = {}
        for row in rows.values():
            unsaid = ("id", "user_id", "updated_at")
            body = {name: value for name, value in row.items() if name not in unsaid}
            self._rows[f"notes/{row['id']}"] = copy.deepcopy(body)
        self.pending: list[StoredTransaction] = []

    def write(self, *ops: Op, **changes: Any) -> StoredTransaction:
        """Accept one transaction."""
        wire, before = zip(*[self._apply(op) for op in ops], strict=True)
        position = len(self.pending) + 1
        made = StoredTransaction(f"t{position}", position, "u", wire, before)
        self.pending.append(replace(made, **changes))
        return self.pending[-1]

    def _apply(self, op: Op) -> tuple[WireOp, Row | None]:
        if isinstance(op, Insert):
            values = {name: value for name, value in op.values.items() if name != "id"}
            key = f"{op.table}/{op.values['id']}"
            assert key not in self._rows
            self._rows[key] = dict(values)
            return WireOp(op.table, "insert", str(op.values["id"]), values), None
        row = self._rows[f"{op.table}/{op.id}"]
        if isinstance(op, Delete):
            del self._rows[f"{op.table}/{op.id}"]
            return WireOp(op.table, "delete", op.id, {}), dict(row)
        before = {name: row[name] for name in op.changes if name in row}
        row |= op.changes
        return WireOp(op.table, "update", op.id, dict(op.changes)), before


def written_back(
    transactions: Sequence[StoredTransaction], merged: Merged
) -> list[StoredTransaction]:
    """Return the transactions as the buffer keeps them after a merge."""
    rewritten = {item.txn_id: item for item in merged.rewritten}
    result = []
    for item in transactions:
        new = rewritten.get(item.txn_id)
        if new is not None:
            item = replace(item, ops=new.ops, before=new.before, records=new.records)
        records = (*item.records, *merged.manual.get(item.txn_id, ()))
        result.append(replace(item, records=records))
    return result


def taken(
    theirs: Mapping[str, Row | None], transactions: Sequence[StoredTransaction]
) -> dict[str, Row | None]:
    """Apply what can be sent, as the server would; every op must find what it says it replaces.

    On a row, a transaction that is left to a person ends it.
    """
    rows: dict[str, Row | None] = {key: row and dict(row) for key, row in theirs.items()}
    closed: set[str] = set()
    for item in transactions:
        waits = item.parked or any(record["outcome"] == "manual" for record in item.records)
        closed |= {f"{op.table}/{op.id}" for op in item.ops if waits}
        for op, before in zip(item.ops, item.before, strict=True):
            key = f"{op.table}/{op.id}"
            if key not in closed:
                rows[key] = _taken(rows.get(key), op, before)
    return rows


def _taken(row: Row | None, op: WireOp, before: Row | None) -> Row | None:
    if op.kind == "insert":
        assert row is None, "an insert met a row"
        assert before is None
        return dict(op.values)
    assert row is not None, f"an {op.kind} found no row"
    assert before is not None
    told = {name: row.get(name) for name in before}
    assert before == told, "an op says it replaces something else"
    return None if op.kind == "delete" else {**row, **op.values}


def record_keys(merged: Merged) -> list[tuple[str, tuple[str, ...], str]]:
    """Return txn_id, columns and outcome of every record of a merge."""
    found = [
        (item.txn_id, tuple(record["columns"]), record["outcome"])
        for item in merged.rewritten
        for record in item.records
    ]
    return found + [
        (txn_id, tuple(record["columns"]), record["outcome"])
        for txn_id, records in merged.manual.items()
        for record in records
    ]
