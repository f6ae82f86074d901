"""Asking a policy callable about a conflict, and believing only what could be delivered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from local_store.ops import Resolution, Row, RowConflict, TableSpec
from syncer.core.json_merge import same


@dataclass(frozen=True, slots=True)
class Answer:
    """A checked answer: `values` of the columns in conflict, `own` of others of the same op.

    `edits` are the new values of other ops of the transaction, by index.
    """

    values: Row
    own: Row
    edits: Mapping[int, Row]
    derived: Row
    surfaced: bool


def ask(
    tables: Mapping[str, TableSpec],
    policy: Callable[..., Any],
    conflict: RowConflict,
    index: int,
) -> Answer:
    """Ask `policy` about op `index` of a transaction; it gets copies that it may change.

    Raises whatever the policy raises, and TypeError or ValueError when its answer is nothing that
    the op could carry. A column's type is left to the server, which refuses that op alone.
    """
    found = policy(copy.deepcopy(conflict))
    if isinstance(found, Mapping):
        found = Resolution(dict(found))
    if not isinstance(found, Resolution):
        raise TypeError("a policy returns a mapping of values or a Resolution")
    values = _checked(tables[conflict.table], found.values)
    edits: dict[int, Row] = {}
    own: Row = {}
    for at, changes in found.siblings.items():
        if at == index:
            own = _checked(tables[conflict.table], changes)
        else:
            edits[at] = _edited(tables, conflict, at, changes)
    return Answer(
        values={name: values[name] for name in values if name in conflict.columns},
        own={name: own[name] for name in own if name not in conflict.columns},
        edits=edits,
        derived=dict(orjson.loads(orjson.dumps(dict(found.derived)))),
        surfaced=found.surfaced,
    )


def _edited(
    tables: Mapping[str, TableSpec], conflict: RowConflict, at: int, changes: Mapping[str, Any]
) -> Row:
    if isinstance(at, bool) or not 0 <= at < len(conflict.siblings):
        raise ValueError("a policy named a sibling that isn't there")
    sibling = conflict.siblings[at]
    if sibling.kind == "delete" or (sibling.table, sibling.id) == (conflict.table, conflict.id):
        raise ValueError("a policy can't give values to that sibling")
    return {**sibling.values, **_checked(tables[sibling.table], changes)}


def _checked(spec: TableSpec, values: Mapping[str, Any]) -> Row:
    """Return a copy of the values; one that isn't JSON would stop the buffer, not only this op."""
    for column, value in values.items():
        if not spec.writable(column):
            raise ValueError("a policy named a column that can't be written")
        if value is None and not spec.columns[column].nullable:
            raise ValueError("a policy gave null to a column that must have a value")
    copied: Row = orjson.loads(orjson.dumps(dict(values)))
    if not same(copied, dict(values), exact=True):
        raise TypeError("a policy returned a value that JSON can't carry")
    return copied
