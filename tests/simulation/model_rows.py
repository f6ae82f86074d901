"""The rows of the modelled server: effects, constraints, cascades, tombstones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from local_store.ops import Row, TableSpec
from syncer.remote import TableRead

START = datetime(2026, 1, 1, tzinfo=UTC)
Key = tuple[str, str]


@dataclass(slots=True)
class ServerRow:
    """One row as the server holds it: replaced, never changed, so that copied dicts undo."""

    user_id: str
    values: Row
    version: str


class Refusal(Exception):
    """One op can't take effect; carries the verdict that follows."""

    def __init__(
        self, verdict: str, op: int | None = None, sqlstate: str | None = None, **more: Any
    ) -> None:
        super().__init__(verdict)
        self.item = {"verdict": verdict, "op": op, "sqlstate": sqlstate, **more}


def answered_all(
    rows_of: Callable[[str], Iterable[Row]], reads: Sequence[TableRead]
) -> list[list[Row]]:
    """Answer the reads of one call, in which later ones may refer to earlier ones."""
    answers: list[list[Row]] = []
    keys: list[list[Any]] = []
    for read in reads:
        where = {
            column: keys[value["read"]] if isinstance(value, dict) else value
            for column, value in read.where.items()
        }
        meant = replace(read, where=where, digest=False, columns=None)
        keys.append([row["id"] for row in answered(rows_of(read.table), meant)])
        answers.append(answered(rows_of(read.table), replace(read, where=where)))
    return answers


def answered(rows: Iterable[Row], read: TableRead, key: str = "id") -> list[Row]:
    """Answer a read from all the rows of its user, as `sync_read_v1` does."""
    order = read.order_by or key

    def place(row: Row) -> tuple[Any, str]:
        value = row.get(order, START.isoformat() if order.endswith("_at") else None)
        return (datetime.fromisoformat(value) if order.endswith("_at") else value), row[key]

    found = [
        row
        for row in rows
        if row[key] not in read.but
        and all(
            row.get(column) in value if isinstance(value, list) else row.get(column) == value
            for column, value in read.where.items()
        )
    ]
    found.sort(key=place, reverse=read.descending)
    if read.after is not None:
        end = place(read.after)
        found = [
            row for row in found if (place(row) < end if read.descending else place(row) > end)
        ]
    found = found[: read.limit]
    if read.digest:
        lines = sorted(f"{row[key]} {row['updated_at']}" for row in found)
        return [{"digest": hashlib.sha256("\n".join(lines).encode()).hexdigest()}]
    if read.columns is not None:
        found = [{column: row.get(column) for column in read.columns} for row in found]
    return found


@dataclass(slots=True)
class ModelRows:
    """Rows by key; what isn't allowed raises Refusal, and the caller undoes the rest."""

    tables: Mapping[str, TableSpec]
    rows: dict[Key, ServerRow] = field(default_factory=dict)
    tombstones: dict[Key, str] = field(default_factory=dict)
    poison: str | None = "poison"
    _ticks: int = 0
    _deleted: set[Key] = field(default_factory=set)

    def insert_row(self, index: int, op: Row, user_id: str) -> None:
        spec = self.tables[op["table"]]
        self._check(index, op)
        if (op["table"], op["id"]) in self.rows:
            raise Refusal("rejected", index, "23505", message="the id is taken")
        if spec.parent is not None:
            self._check_parent(index, op, user_id, *spec.parent)
        self.tombstones.pop((op["table"], op["id"]), None)
        self.rows[op["table"], op["id"]] = ServerRow(user_id, dict(op["values"]), self._tick())

    def _check_parent(self, index: int, op: Row, user_id: str, column: str, table: str) -> None:
        parent_id = op["values"].get(column)
        if parent_id is None and self.tables[op["table"]].columns[column].nullable:
            return
        if parent_id is None:
            raise Refusal("rejected", index, "23502", message="null in a required column")
        parent = self.rows.get((table, parent_id))
        if parent is None or parent.user_id != user_id:
            raise Refusal("held", index, "23503", message="no such parent")

    def update_row(self, op: Row, row: ServerRow) -> None:
        if not op["values"].items() <= row.values.items():
            changed = ServerRow(row.user_id, {**row.values, **op["values"]}, self._tick())
            self.rows[op["table"], op["id"]] = changed

    def delete_row(self, key: Key) -> None:
        self.tombstones[key] = self.rows.pop(key).user_id
        self._deleted.add(key)
        for name, spec in self.tables.items():
            if spec.parent is None or spec.parent[1] != key[0]:
                continue
            column = spec.parent[0]
            children = [
                child
                for child, row in self.rows.items()
                if child[0] == name and row.values.get(column) == key[1]
            ]
            for child in children:
                self.delete_row(child)

    def _check(self, index: int, op: Row) -> None:
        """Stand for the table's constraints; a value that says it is poison is refused too."""
        spec = self.tables[op["table"]]
        for column, value in op["values"].items():
            rule = spec.columns[column]
            if value is None and not rule.nullable:
                raise Refusal("rejected", index, "23502", message="null in a required column")
        for column, value in op["values"].items():
            enum = spec.columns[column].enum
            is_poison = self.poison and isinstance(value, str) and value.startswith(self.poison)
            if is_poison or (enum is not None and value not in enum):
                raise Refusal("rejected", index, "23514", message="violates a check constraint")

    def _deleted_parents(self, item: Row) -> dict[str, None]:
        gone: dict[str, None] = {}
        for op in item["ops"]:
            parent = self.tables[op["table"]].parent
            if parent is None or op["values"].get(parent[0]) is None:
                continue
            key = (parent[1], op["values"][parent[0]])
            if key not in self.rows and self.tombstones.get(key) == item["user_id"]:
                gone["/".join(key)] = None
        return gone

    # -- for tests --

    def edit(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row, if it is there, as somebody with SQL would: the version moves."""
        row = self.rows.get((table, row_id))
        if row is None:
            return
        changed = ServerRow(row.user_id, {**row.values, **values}, self._tick())
        self.rows[table, row_id] = changed

    def version(self, table: str, row_id: str) -> str | None:
        """Return a row's version, None when there is none."""
        row = self.rows.get((table, row_id))
        return None if row is None else row.version

    def row(self, table: str, row_id: str) -> Row | None:
        """Return a row, None when there is none."""
        row = self.rows.get((table, row_id))
        return None if row is None else self._shown((table, row_id), row)

    def _tick(self) -> str:
        self._ticks += 1
        return (START + timedelta(microseconds=self._ticks)).isoformat(timespec="microseconds")

    def _shown(self, key: Key, row: ServerRow) -> Row:
        spec = self.tables[key[0]]
        return {
            **self.defaults(key[0], row.values),
            **row.values,
            spec.key: key[1],
            spec.owner: row.user_id,
            spec.version: row.version,
        }

    def defaults(self, table: str, given: Row) -> Row:
        """Return what a row has in the columns that nobody gave: nothing, where that may be."""
        spec = self.tables[table]
        apart = (spec.key, spec.owner, spec.version, *given, *spec.server_owned)
        return dict.fromkeys(
            column for column, rule in spec.columns.items() if rule.nullable and column not in apart
        )

    def _seen(self, name: str, user_id: str) -> Row | None:
        table, row_id = name.split("/", 1)
        row = self.rows.get((table, row_id))
        return None if row is None or row.user_id != user_id else self._shown((table, row_id), row)
