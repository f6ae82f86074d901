"""What of an effect can be seen in the rows: which writes explain a value, which don't show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from local_store import TableSpec
from syncer.testkit.history_facts import (
    Effect,
    Facts,
    Happened,
    Transaction,
    foreign,
    value_differs,
)
from syncer.testkit.history_observation import Key

UNSET = object()
"""The value that an insert leaves in a column it doesn't name: the server's default, unknown."""


def writes_of(facts: Facts, key: Key, column: str, *happened: Happened) -> list[Effect]:
    """Return the inserts of a row and the updates of one of its columns."""
    return [
        effect
        for effect in facts.on(key, *happened)
        if effect.kind == "insert" or (effect.kind == "update" and column in effect.values)
    ]


def may_be_last(facts: Facts, key: Key, column: str) -> list[Effect]:
    """Return the writes that no certain write certainly followed; [] when anything may stand."""
    writes = writes_of(facts, key, column, "yes", "maybe")
    sure = [write for write in writes if write.happened == "yes"]
    newest = _newest_of_each_log(writes)
    last = [w for w in newest if not any(facts.before(w, o) for o in sure if o is not w)]
    born_here = any(write.kind == "insert" for write in writes)
    unset = any(write.kind == "insert" and column not in write.values for write in last)
    return [] if unset or not (born_here or sure) else last


def _newest_of_each_log(writes: Sequence[Effect]) -> list[Effect]:
    """Drop writes that one of their own log followed: a quick way past long histories."""
    newest: dict[str, tuple[int, int]] = {}
    for write in writes:
        if write.txn is not None and write.happened == "yes":
            for log_id, seq in write.txn.positions.items():
                newest[log_id] = max(newest.get(log_id, (0, 0)), (seq, write.index))
    return [
        write
        for write in writes
        if write.txn is None
        or all(
            (seq, write.index) >= newest.get(log_id, (0, 0))
            for log_id, seq in write.txn.positions.items()
        )
    ]


def equals(spec: TableSpec, column: str, effect: Effect, found: Any) -> bool:
    """Tell whether `effect` left the value that was found."""
    written = effect.values.get(column, UNSET)
    return written is not UNSET and not value_differs(spec, column, written, found)


def shared(writes: Sequence[Effect]) -> bool:
    """True when no one log knows all the writers of something."""
    if len(writes) < 2:
        return False
    logs = [set(write.txn.positions) if write.txn is not None else set() for write in writes]
    return not set.intersection(*logs)


def recorded(facts: Facts, winner: Effect, loser: Effect, column: str | None = None) -> bool:
    """True when a record about either side of an encounter covers the row and the column."""
    keys = {winner.key, loser.key, winner.via, loser.via} - {None}
    for record in [r for key in keys if key for r in facts.records.get(key, ())]:
        txn = facts.transactions.get(record.txn_id)
        told = txn is None or any(not foreign(side, txn) for side in (winner, loser))
        if told and (column is None or record.columns is None or column in record.columns):
            return True
    return False


def effects_of(facts: Facts, txn: Transaction) -> Iterator[Effect]:
    """Yield what a transaction itself did to rows, without what went along with them."""
    for key in txn.rows:
        for effect in facts.effects.get(key, ()):
            if effect.txn is txn and effect.via is None:
                yield effect


def shows(facts: Facts, txn: Transaction, beside: Key | None = None) -> bool:
    """True when some effect of `txn` is there that nothing else explains."""
    for effect in effects_of(facts, txn):
        row = facts.observation.rows.get(effect.key)
        if effect.key == beside or row is None or effect.kind == "delete":
            continue
        others = [e for e in facts.on(effect.key, "yes", "maybe") if e is not effect]
        if effect.kind == "insert":
            if not any(other.kind == "insert" for other in others):
                return True
            continue
        spec = facts.specs[effect.key[0]]
        for column in effect.values:
            found = row.values.get(column)
            if equals(spec, column, effect, found) and not any(
                equals(spec, column, other, found)
                for other in others
                if other.kind != "delete" and (column in other.values or other.kind == "insert")
            ):
                return True
    return False


def misses(facts: Facts, effect: Effect) -> bool:
    """True when an effect isn't there and nothing later explains why."""
    row = facts.observation.rows.get(effect.key)
    others = [e for e in facts.on(effect.key, "yes", "maybe") if e is not effect]
    if effect.kind == "delete":
        return row is not None and all(
            facts.before(e, effect) for e in others if e.kind == "insert"
        )
    if row is None:
        return not any(other.kind == "delete" for other in others)
    if effect.kind == "insert":
        return False
    spec = facts.specs[effect.key[0]]
    return any(
        not equals(spec, column, effect, row.values.get(column))
        and all(
            facts.before(other, effect)
            for other in others
            if other.kind != "delete" and (column in other.values or other.kind == "insert")
        )
        for column in effect.values
    )
