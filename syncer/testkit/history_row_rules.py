"""The rules about rows: may they be there, can their values be explained, was anybody overwritten.

A row's column is explained by the writes that may have come last: those that no write which
certainly happened certainly followed. A value that none of them wrote is a finding, and what it
equals instead says of which kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from local_store import TableSpec
from syncer.testkit.history_facts import Effect, Facts, compare_versions, foreign, key_name
from syncer.testkit.history_observation import Key, SeenRow
from syncer.testkit.history_rules import Finding, FindingKind, Rule
from syncer.testkit.history_traces import (
    effects_of,
    equals,
    may_be_last,
    misses,
    recorded,
    shared,
    shows,
    writes_of,
)


def fates(facts: Facts) -> Iterator[Finding]:
    """Rows that must be there and aren't, and rows that must not be there and are."""
    for key in facts.effects:
        if key[0] in facts.specs and key not in facts.strange_rows:
            if key in facts.observation.rows:
                yield from _must_be_gone(facts, key)
            else:
                yield from _must_be_there(facts, key)
    for key, row in facts.observation.rows.items():
        if key not in facts.effects and key not in facts.strange_rows:
            yield _unknown_row(facts, key, row)


def _must_be_gone(facts: Facts, key: Key) -> Iterator[Finding]:
    changes = facts.on(key, "yes", "maybe")
    births = [effect for effect in changes if effect.kind == "insert"]
    ghosts = [e for e in facts.on(key, "no") if e.kind == "insert" and e.txn is not None]
    if not births and ghosts:
        ghost = ghosts[0]
        text = f"the row is there, and only {ghost.name} inserts it, which {_what_of(ghost)}"
        yield Finding(_kind_of_ghost(facts, ghost), key_name(key), text, _evidence(ghost))
        return
    for end in facts.on(key, "yes"):
        if end.kind != "delete" or recorded(facts, end, end):
            continue
        if all(facts.before(birth, end) for birth in births):
            text = f"the row is there, though {end.name} deleted it after everything else"
            yield Finding("resurrected", key_name(key), text, _evidence(end))
            return


def _must_be_there(facts: Facts, key: Key) -> Iterator[Finding]:
    changes = facts.on(key, "yes", "maybe")
    ends = [effect for effect in changes if effect.kind == "delete"]
    if facts.settled_by_record(key):
        return
    for effect in facts.on(key, "yes"):
        if effect.kind == "delete" or (effect.kind == "update" and ends):
            continue
        if all(facts.before(end, effect) for end in ends):
            kind, text = _missing(facts, effect)
            yield Finding(kind, key_name(key), f"the row isn't there; {text}", _evidence(effect))
            return


def _unknown_row(facts: Facts, key: Key, row: SeenRow) -> Finding:
    for other, twin in facts.observation.rows.items():
        same = other[0] == key[0] and other != key and other in facts.effects
        if same and (twin.user_id, twin.values) == (row.user_id, row.values):
            text = "nobody inserted this row, and it equals one that somebody did"
            return Finding("duplicated", key_name(key), text, {"twin": key_name(other)})
    return Finding("content", key_name(key), "nobody inserted this row", {"owner": row.user_id})


def values(facts: Facts) -> Iterator[Finding]:
    """Columns whose value is none that may have been written last."""
    for key, row in facts.observation.rows.items():
        spec = facts.specs.get(key[0])
        if spec is None or key in facts.strange_rows or key not in facts.effects:
            continue
        stale = _stale(facts, key, row)
        if stale is not None:
            kind, text = _missing(facts, stale)
            told = {**_evidence(stale), "row": row.version, "ledger": stale.version}
            yield Finding(kind, key_name(key), f"the row is older than the ledger; {text}", told)
            continue
        for column in _columns(facts, key, spec):
            yield from _unexplained(facts, key, spec, column, row)


def _stale(facts: Facts, key: Key, row: SeenRow) -> Effect | None:
    """Return a change whose version the row should have reached and hasn't."""
    for effect in facts.on(key, "yes") if facts.one_life(key) else ():
        order = compare_versions(row.version, effect.version)
        if order is not None and order < 0:
            return effect
    return None


def _unexplained(
    facts: Facts, key: Key, spec: TableSpec, column: str, row: SeenRow
) -> Iterator[Finding]:
    found = row.values.get(column)
    last = may_be_last(facts, key, column)
    if facts.settled_by_record(key, column) or not last:
        return
    if any(equals(spec, column, effect, found) for effect in last):
        return
    if _merged(facts, key, spec, column, found):
        return
    kind, text = _why_unexplained(facts, key, spec, column, found, last)
    evidence = {
        "column": column,
        "found": found,
        "expected": [effect.values.get(column) for effect in last],
        "written_by": [effect.name for effect in last],
    }
    yield Finding(kind, key_name(key), f"{column}: {text}", evidence)


def _why_unexplained(
    facts: Facts, key: Key, spec: TableSpec, column: str, found: Any, last: Sequence[Effect]
) -> tuple[FindingKind, str]:
    older = [e for e in writes_of(facts, key, column, "yes") if equals(spec, column, e, found)]
    due = last[0]
    if older:
        stands = older[0]
        if due.txn is None or foreign(stands, due.txn):
            text = f"{due.name} came last, the value is of {stands.name}; no record tells of it"
            return "unsurfaced_conflict", text
        return "order", f"{due.name} came last, the value is of {stands.name} before it"
    for ghost in writes_of(facts, key, column, "no"):
        if equals(spec, column, ghost, found):
            text = f"the value is of {ghost.name}, which {_what_of(ghost)}"
            return _kind_of_ghost(facts, ghost), text
    return "content", "no write explains the value"


def _merged(facts: Facts, key: Key, spec: TableSpec, column: str, found: Any) -> bool:
    """True when a document that several writers changed is made of their keys."""
    writes = writes_of(facts, key, column, "yes", "maybe")
    documents = [write.values.get(column) for write in writes if column in write.values]
    if column not in spec.json_merge or not isinstance(found, dict) or not shared(writes):
        return False
    return all(
        any(isinstance(doc, dict) and name in doc and doc[name] == value for doc in documents)
        for name, value in found.items()
    )


def torn(facts: Facts) -> Iterator[Finding]:
    """Some ops of a transaction certainly show and some certainly don't."""
    for txn in facts.transactions.values():
        if txn.happened == "maybe" and len(txn.rows) > 1 and shows(facts, txn):
            missed = [effect for effect in effects_of(facts, txn) if misses(facts, effect)]
            if missed:
                text = "only a part of it is there"
                evidence = {"missing": [key_name(effect.key) for effect in missed]}
                yield Finding("torn", txn.txn_id, text, evidence)


def _missing(facts: Facts, effect: Effect) -> tuple[FindingKind, str]:
    """Name what it is when an effect that happened doesn't show: half of it lost, or all."""
    if effect.txn is not None and shows(facts, effect.txn, beside=effect.key):
        return "torn", f"{effect.name} shows elsewhere and not here"
    return "lost", f"{effect.name} doesn't show"


def _kind_of_ghost(facts: Facts, ghost: Effect) -> FindingKind:
    """Name what it is when the effect of a transaction shows that didn't happen."""
    txn = ghost.txn
    assert txn is not None  # a change from outside always happened
    waits = txn.state in ("pending", "held")
    if not waits and not (txn.told == "unknown" and txn.state == "absent"):
        return "resurrected"
    if any(misses(facts, effect) for effect in effects_of(facts, txn)):
        return "torn"
    return "duplicated" if waits else "content"  # what waits would happen again when delivered


def _what_of(ghost: Effect) -> str:
    txn = ghost.txn
    if txn is None or txn.state == "absent":
        return "was refused" if txn is not None and txn.told == "refused" else "never arrived"
    return f"is {txn.state}"


def _columns(facts: Facts, key: Key, spec: TableSpec) -> list[str]:
    """Return the columns that somebody meant to write, in a fixed order."""
    named = {column for effect in facts.effects[key] for column in effect.values}
    return sorted(column for column in named if spec.writable(column))


def _evidence(effect: Effect) -> dict[str, Any]:
    positions = {} if effect.txn is None else dict(effect.txn.positions)
    return {"by": effect.name, "kind": effect.kind, "positions": positions}


ROW_RULES: tuple[Rule, ...] = (fates, values, torn)
