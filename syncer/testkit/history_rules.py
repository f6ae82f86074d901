"""The rules about transactions, one small function per kind; `history.py` explains the kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from syncer.testkit.history_facts import (
    UNTOLD,
    Effect,
    Facts,
    Transaction,
    compare_versions,
    key_name,
)
from syncer.testkit.history_observation import Key

FindingKind = Literal[
    "lost",
    "resurrected",
    "duplicated",
    "torn",
    "order",
    "cross_user",
    "false_conflict",
    "unsurfaced_conflict",
    "content",
    "counter",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken promise. `subject` is a txn_id, `table/id` or a counter's name."""

    kind: FindingKind
    subject: str
    explanation: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


def lost(facts: Facts) -> Iterator[Finding]:
    """Acknowledged, or known to a buffer as delivered, but in no state."""
    for txn in facts.transactions.values():
        reason = _why_lost(facts, txn)
        if reason is not None:
            evidence = {"state": txn.state, "positions": dict(txn.positions)}
            yield Finding("lost", txn.txn_id, reason, evidence)


def _why_lost(facts: Facts, txn: Transaction) -> str | None:
    looked = facts.observation.ledger is not None
    in_ledger = txn.txn_id in facts.ledger
    if txn.state == "absent" and txn.told == "ok":
        return "it was acknowledged, and no ledger, buffer, parked work or quarantine knows it"
    if txn.state == "applied" and looked and not in_ledger:
        return "its buffer was told that it is applied, the ledger doesn't know it"
    if txn.state == "discarded" and not facts.decided_by_person(txn):
        return "it was discarded and nobody asked for that"
    if txn.state == "superseded" and not _deleted_by_author(facts, txn):
        return "it counts as superseded and its author deleted none of its rows"
    return None


def _deleted_by_author(facts: Facts, txn: Transaction) -> bool:
    return any(
        effect.kind == "delete" and effect.user_id in (txn.user_id, None)
        for key in txn.rows_ever
        for effect in facts.effects.get(key, ())
    )


def resurrected(facts: Facts) -> Iterator[Finding]:
    """Refused or discarded, but the ledger or a buffer holds it as something to happen."""
    for txn in facts.transactions.values():
        if txn.told == "refused" and txn.state != "absent":
            text = f"every call with it was refused, yet it is {txn.state}"
            yield Finding("resurrected", txn.txn_id, text, {"positions": dict(txn.positions)})
        elif txn.state == "applied" and "discard" in facts.events.people.get(txn.txn_id, ()):
            text = "a person discarded it, yet the ledger says it is applied"
            yield Finding("resurrected", txn.txn_id, text)


def duplicated(facts: Facts) -> Iterator[Finding]:
    """One transaction or one position twice, one row inserted twice, one effect in two states."""
    yield from _ledger_twice(facts)
    yield from _acknowledged_twice(facts)
    yield from _inserted_twice(facts)
    for txn in facts.transactions.values():
        for log_id, entry in facts.entries.get(txn.txn_id, ()):
            digests = {row.digest for row in facts.ledger.get(txn.txn_id, ())}
            if entry.state == "dead" and txn.state == "applied" and entry.digest in digests:
                text = "applied on the server and a dead letter here: a retry makes it twice"
                yield Finding("duplicated", txn.txn_id, text, {"log_id": log_id})
        if txn.state in ("conflict", "dead") and (met := _own_inserts_there(facts, txn)):
            text = f"is {txn.state}, yet its own inserts stand: it took effect and was tried again"
            yield Finding("duplicated", txn.txn_id, text, {"rows": [key_name(key) for key in met]})


def _own_inserts_there(facts: Facts, txn: Transaction) -> list[Key]:
    """Return the rows that only this transaction can have made and that are there."""
    found = []
    for op in txn.ops:
        key = (op.table, op.id)
        others = [e for e in facts.effects.get(key, ()) if e.kind == "insert" and e.txn is not txn]
        if op.kind == "insert" and key in facts.observation.rows and not others:
            found.append(key)
    return found


def _ledger_twice(facts: Facts) -> Iterator[Finding]:
    positions: dict[tuple[str, int], list[str]] = defaultdict(list)
    for txn_id, rows in facts.ledger.items():
        for row in rows:
            positions[row.log_id, row.seq].append(txn_id)
        if len(rows) > 1:
            where = [(row.log_id, row.seq) for row in rows]
            yield Finding("duplicated", txn_id, "the ledger has it more than once", {"at": where})
    for (log_id, seq), txn_ids in positions.items():
        if len(set(txn_ids)) > 1:
            text = f"the ledger has several transactions at seq {seq} of one log"
            yield Finding("duplicated", txn_ids[0], text, {"log_id": log_id, "all": txn_ids})


def _acknowledged_twice(facts: Facts) -> Iterator[Finding]:
    seqs: dict[tuple[str, str], set[int]] = defaultdict(set)
    owners: dict[tuple[str, int], set[str]] = defaultdict(set)
    for call in facts.events.calls:
        if call.told == "ok" and call.log_id and call.seq:
            seqs[call.txn_id, call.log_id].add(call.seq)
            owners[call.log_id, call.seq].add(call.txn_id)
    for (txn_id, log_id), found in seqs.items():
        if len(found) > 1:
            text = "one log acknowledged it at several positions"
            evidence = {"log_id": log_id, "seqs": sorted(found)}
            yield Finding("duplicated", txn_id, text, evidence)
    for (log_id, seq), txn_ids in owners.items():
        if len(txn_ids) > 1:
            text = f"several transactions were acknowledged at seq {seq} of one log"
            evidence = {"log_id": log_id, "all": sorted(txn_ids)}
            yield Finding("duplicated", min(txn_ids), text, evidence)


def _inserted_twice(facts: Facts) -> Iterator[Finding]:
    for key in facts.effects:
        done = facts.on(key, "yes")
        births = [effect for effect in done if effect.kind == "insert"]
        ends = [effect for effect in facts.on(key, "yes", "maybe") if effect.kind == "delete"]
        if len(births) > 1 + len(ends):
            text = "inserted more often than deletes explain"
            evidence = {"by": [effect.name for effect in births]}
            yield Finding("duplicated", key_name(key), text, evidence)


def order(facts: Facts) -> Iterator[Finding]:
    """Positions against the order of calls, and the server's versions against positions."""
    yield from _positions_against_time(facts)
    yield from _ledger_against_receipts(facts)
    for key in facts.effects:
        yield from _versions_against_log(facts, key)


def _positions_against_time(facts: Facts) -> Iterator[Finding]:
    """A call that began after another had been acknowledged must have the later seq."""
    ends: dict[tuple[str, str], float] = {}
    for call in facts.events.calls:
        if call.told == "ok" and call.log_id:
            place = call.txn_id, call.log_id
            ends[place] = min(call.end, ends.get(place, UNTOLD))
    placed: dict[str, list[tuple[int, Transaction]]] = defaultdict(list)
    for txn in facts.transactions.values():
        for log_id, seq in txn.positions.items():
            placed[log_id].append((seq, txn))
    for log_id, found in placed.items():
        first_end, first = UNTOLD, ""
        # From the last position down: nothing that stands later may have ended before this began.
        for seq, txn in sorted(found, key=lambda item: item[0], reverse=True):
            if first_end < txn.begin:
                text = f"it began after {first} was acknowledged, and has the earlier seq"
                yield Finding("order", txn.txn_id, text, {"log_id": log_id, "seq": seq})
            end = ends.get((txn.txn_id, log_id), UNTOLD)
            if end < first_end:
                first_end, first = end, txn.txn_id


def _ledger_against_receipts(facts: Facts) -> Iterator[Finding]:
    for txn in facts.transactions.values():
        for row in facts.ledger.get(txn.txn_id, ()):
            promised = txn.positions.get(row.log_id)
            if promised is not None and promised != row.seq:
                text = f"acknowledged at seq {promised}, delivered as seq {row.seq}"
                yield Finding("order", txn.txn_id, text, {"log_id": row.log_id})


def _versions_against_log(facts: Facts, key: Key) -> Iterator[Finding]:
    """Within one life of a row its version grows with the seq of the log that wrote it."""
    if not facts.one_life(key):
        return
    last: dict[str, Effect] = {}
    written = [e for e in facts.on(key, "yes") if e.txn is not None and e.version is not None]
    for log_id in sorted({log_id for e in written if e.txn for log_id in e.txn.positions}):
        mine = [e for e in written if e.txn and log_id in e.txn.positions]
        for effect in sorted(mine, key=lambda e: e.txn.positions[log_id] if e.txn else 0):
            earlier = last.get(log_id)
            moved = compare_versions(earlier.version, effect.version) if earlier else None
            if earlier is not None and moved is not None and moved > 0:
                text = f"{effect.name} was written after {earlier.name} and applied before it"
                evidence = {"versions": [earlier.version, effect.version], "log_id": log_id}
                yield Finding("order", key_name(key), text, evidence)
            last[log_id] = effect


def cross_user(facts: Facts) -> Iterator[Finding]:
    """Somebody's transaction, row or sight of a row that isn't theirs."""
    for txn in facts.transactions.values():
        told = {row.user_id for row in facts.ledger.get(txn.txn_id, ()) if row.user_id}
        told |= {entry.user_id for _, entry in facts.entries.get(txn.txn_id, ())}
        if told - {txn.user_id}:
            text = "written by one user, delivered or kept as another's"
            evidence: dict[str, Any] = {"author": txn.user_id, "as": sorted(told)}
            yield Finding("cross_user", txn.txn_id, text, evidence)
    for key in facts.effects:
        yield from _wrong_owner(facts, key)
    for seen in facts.observation.visible:
        if seen.viewer != seen.owner:
            text = "somebody can read a row that isn't theirs"
            evidence = {"viewer": seen.viewer, "owner": seen.owner}
            yield Finding("cross_user", f"{seen.table}/{seen.id}", text, evidence)


def _wrong_owner(facts: Facts, key: Key) -> Iterator[Finding]:
    row, changes = facts.observation.rows.get(key), facts.on(key, "yes", "maybe")
    owners = {e.user_id for e in changes if e.kind == "insert"}
    if row is not None and owners and row.user_id not in owners:
        text = "the row belongs to somebody who didn't write it"
        evidence = {"owner": row.user_id, "inserted_by": sorted(map(str, owners))}
        yield Finding("cross_user", key_name(key), text, evidence)
        return
    owners = owners or ({row.user_id} if row else set())
    for effect in changes if owners else ():
        own = effect.txn is None or effect.happened != "yes" or effect.via is not None
        if not own and effect.user_id not in owners:
            text = f"{effect.name} changed a row of somebody else"
            evidence = {"owners": sorted(map(str, owners)), "author": [str(effect.user_id)]}
            yield Finding("cross_user", key_name(key), text, evidence)


def counter(facts: Facts) -> Iterator[Finding]:
    """A stored counter against its recount."""
    for seen in facts.observation.counters:
        if seen.stored != seen.recounted:
            text = f"stored as {seen.stored}, a recount gives {seen.recounted}"
            evidence = {"stored": seen.stored, "recounted": seen.recounted}
            yield Finding("counter", seen.name, text, evidence)


def content_of_ledger(facts: Facts) -> Iterator[Finding]:
    """Transactions nobody asked for, and delivered content that isn't what was accepted."""
    for txn_id, rows in facts.ledger.items():
        if txn_id not in facts.transactions:
            text = "the ledger has a transaction that no recorded call asked for"
            evidence = {"at": [(row.log_id, row.seq) for row in rows]}
            yield Finding("content", txn_id, text, evidence)
        kept = {entry.digest for _, entry in facts.entries.get(txn_id, ())}
        if kept and kept.isdisjoint(row.digest for row in rows):
            text = "the ledger's digest isn't that of what the buffer accepted"
            yield Finding("content", txn_id, text, {"kept": sorted(kept)})
    for txn_id in facts.entries:
        if txn_id not in facts.transactions and txn_id not in facts.ledger:
            yield Finding("content", txn_id, "a buffer holds it and no recorded call asked for it")


Rule = Callable[[Facts], Iterator[Finding]]
TRANSACTION_RULES: tuple[Rule, ...] = (
    lost,
    resurrected,
    duplicated,
    order,
    cross_user,
    counter,
    content_of_ledger,
)
