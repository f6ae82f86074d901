"""Conflict records: one per row, chain and outcome, however often the row is merged again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from local_store.ops import Row
from syncer.core.json_merge import ABSENT
from syncer.core.net_effect import Sides, Step


@dataclass(frozen=True, slots=True)
class Part:
    """What a record will say; `steps` are the ops it covers, in order. `gone`: there is no row."""

    outcome: str
    policy: str
    columns: Mapping[str, Sides]
    steps: Sequence[Step]
    gone: bool = False
    note: str | None = None

    @property
    def txn(self) -> int:
        """The first transaction concerned, which the record rides on."""
        return min(step.txn for step in self.steps)

    @property
    def through(self) -> int:
        """The last transaction that the record covers."""
        return max(step.txn for step in self.steps)


def joined(part: Part, other: Part) -> Part:
    """Return what two parts of one chain and outcome say together; the first one outranks."""
    return Part(
        part.outcome,
        part.policy,
        {**other.columns, **part.columns},
        [*part.steps, *other.steps],
        part.gone,
        part.note or other.note,
    )


def record_of(table: str, row_id: str, part: Part, txn_ids: Sequence[str]) -> Row:
    """Return the record as it goes to the server; a value that isn't there is left out."""
    sides: dict[str, Row] = {
        side: {
            name: getattr(values, side)
            for name, values in part.columns.items()
            if getattr(values, side) is not ABSENT
        }
        for side in Sides._fields
    }
    record: Row = {
        "table": table,
        "id": row_id,
        "columns": sorted(part.columns),
        **sides,
        "policy": part.policy,
        "outcome": part.outcome,
        "through": txn_ids[part.through],
    }
    if part.gone:
        record["theirs"] = None
    if part.note is not None:
        record["note"] = part.note
    return record


def take_over(
    held: Sequence[list[Row] | None], record: Row, at: int, txn_ids: Sequence[str]
) -> int:
    """Let `record` take the place of older ones about its row; returns where it belongs.

    `held` are the records of each transaction of the chain, None for those left alone. A column is
    told of once: the newer record knows its outcome, the older one its base, from before anybody
    met. Records of one outcome become one, because the server keeps one per transaction.
    """
    for index, records in enumerate(held):
        for old in list(records or ()):
            if (old["table"], old["id"]) != (record["table"], record["id"]):
                continue
            same_outcome = old["outcome"] == record["outcome"]
            shared = set(old["columns"]) & set(record["columns"])
            if not shared and not same_outcome:
                continue
            assert records is not None
            records.remove(old)
            _inherit(record, old, shared, "base")
            rest = set(old["columns"]) - shared
            if same_outcome:
                for side in Sides._fields:
                    _inherit(record, old, rest, side)
                record["columns"] = sorted({*record["columns"], *rest})
                later = txn_ids[txn_ids.index(record["through"]) :]
                record["through"] = old["through"] if old["through"] in later else later[0]
                at = min(at, index)
            elif rest:
                records.append(_only(old, rest))
    return at


def _inherit(record: Row, old: Row, names: set[str], side: str) -> None:
    if record[side] is None:
        return
    known = old[side] or {}
    kept = {name: value for name, value in record[side].items() if name not in names}
    record[side] = {**kept, **{name: known[name] for name in names if name in known}}


def _only(old: Row, names: set[str]) -> Row:
    sides = {
        side: None if old[side] is None else {n: v for n, v in old[side].items() if n in names}
        for side in Sides._fields
    }
    return {**old, **sides, "columns": sorted(names)}
