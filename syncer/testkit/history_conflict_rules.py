"""The rules about conflicts: those that are none, and those that nobody was told of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from local_store import TableSpec
from syncer.testkit.history_facts import (
    Effect,
    Facts,
    Transaction,
    compare_versions,
    foreign,
    key_name,
    value_differs,
)
from syncer.testkit.history_observation import Key
from syncer.testkit.history_rules import Finding, Rule
from syncer.testkit.history_traces import equals, may_be_last, recorded, shared


def false_conflict(facts: Facts) -> Iterator[Finding]:
    """In conflict, though nobody else can have changed its rows since its log knew them."""
    for txn in facts.transactions.values():
        found = facts.entries.get(txn.txn_id, ())
        logs = [log_id for log_id, entry in found if entry.state == "conflict"]
        if txn.state == "conflict" and not logs:
            logs = list(txn.positions)  # only its parked record is left
        for log_id in logs:
            applied = {row.log_id for row in facts.ledger.get(txn.txn_id, ())}
            if log_id in applied and not facts.decided_by_person(txn):
                text = "the ledger has it applied from the very log that calls it a conflict"
            elif not any(_may_conflict(facts, txn, log_id, key) for key in txn.rows_ever):
                text = "in conflict, though nobody else changed its rows since its log knew them"
            else:
                continue
            yield Finding("false_conflict", txn.txn_id, text, {"rows": sorted(txn.rows_ever)})


def _may_conflict(facts: Facts, txn: Transaction, log_id: str, key: Key) -> bool:
    if key in facts.strange_rows or _follows_a_failure(facts, txn, log_id, key):
        return True
    return any(
        (change.txn is None or log_id not in change.txn.positions)
        and not _part_of_base(facts, change, txn, log_id)
        for change in facts.on(key, "yes", "maybe")
    )


def _own_before(facts: Facts, txn: Transaction, log_id: str, key: Key) -> Iterator[Effect]:
    """Yield what the same log had written to a row before this transaction."""
    for effect in facts.effects.get(key, ()):
        seq = effect.txn.positions.get(log_id) if effect.txn is not None else None
        if seq is not None and seq < txn.positions[log_id]:
            yield effect


def _follows_a_failure(facts: Facts, txn: Transaction, log_id: str, key: Key) -> bool:
    """An own earlier change that was parked or discarded took the ground from under this one.

    So did one that a person decided against, in part or as a whole.
    """
    failed = ("conflict", "dead", "discarded", "superseded")
    return any(
        own.txn is not None and own.txn.state in failed
        for own in _own_before(facts, txn, log_id, key)
    ) or any(
        own.written and own.written != own.ops and key in own.rows_ever
        for own in facts.transactions.values()
        if own.positions.get(log_id, txn.positions[log_id]) < txn.positions[log_id]
    )


def _part_of_base(facts: Facts, change: Effect, txn: Transaction, log_id: str) -> bool:
    """True when the change is part of what `txn` was made on.

    That an own earlier change came after it on the server proves nothing where reads are recorded:
    unless its log had seen the change, it was merged past it on its way.
    """
    for seen in facts.seen_by(txn, change.key):
        newer = compare_versions(seen.version, change.version)
        if seen.log_id == log_id and seen.at < txn.begin and newer is not None and newer >= 0:
            return True
    return any(
        own.happened == "yes" and facts.before(change, own) and not facts.reads_recorded
        for own in _own_before(facts, txn, log_id, change.key)
    )


def overwritten(facts: Facts) -> Iterator[Finding]:
    """A change that its successor didn't know is gone, and no record tells of it."""
    for key in facts.effects:
        spec = facts.specs.get(key[0])
        done = facts.on(key, "yes")
        if spec is None or key in facts.strange_rows or not shared(done):
            continue
        losers = [effect for effect in done if effect.kind == "update"]
        last = _last_words(facts, spec, key, losers)
        for winner in done:
            direct = winner.kind != "insert" and winner.via is None
            gave_way = _gave_way(facts, winner)
            if direct and winner.txn is not None and not gave_way and not facts.unsaid(winner.txn):
                yield from _overwritten_by(facts, spec, winner, winner.txn, losers, last)
        if facts.cascades_recorded:
            yield from _taken_along(facts, key)


def _gave_way(facts: Facts, winner: Effect) -> bool:
    """Tell whether a change came to nothing: the ledger has no version of its row from it.

    It met a row that was gone already, or one that somebody had changed, which is recorded.
    """
    if winner.txn is None:
        return False
    applied = facts.ledger.get(winner.txn.txn_id, ())
    name = key_name(winner.key)
    return bool(applied) and all(
        row.versions is not None and name not in row.versions for row in applied
    )


def _ended_otherwise(facts: Facts, loser: Effect, winner: Effect) -> bool:
    """Tell whether another delete may have ended it.

    One by SQL, one of its own log, one that is recorded; or one by somebody who knew it, unless
    that came after the winner.
    """
    return any(
        change.kind == "delete"
        and change is not winner
        and (
            change.txn is None
            or (loser.txn is not None and not foreign(loser, change.txn))
            or recorded(facts, change, loser)
            or (_knew(facts, change.txn, loser) and not _came_after(facts, change, winner))
        )
        and not facts.before(change, loser)
        for change in facts.on(loser.key, "yes")
    )


def _came_after(facts: Facts, one: Effect, other: Effect) -> bool:
    """True when the ledger has the first one's transaction later than the other one's."""
    numbers = [
        row.number
        for effect in (one, other)
        for row in facts.ledger.get(effect.txn.txn_id if effect.txn else "", ())[:1]
        if row.number is not None
    ]
    return len(numbers) == 2 and numbers[0] > numbers[1]


LastWords = Mapping[str, tuple[Effect, Sequence[Effect]]]
"""Per column the only write that explains what stands, and all that may have been the last."""


def _last_words(
    facts: Facts, spec: TableSpec, key: Key, updates: Sequence[Effect]
) -> dict[str, tuple[Effect, list[Effect]]]:
    row = facts.observation.rows.get(key)
    found: dict[str, tuple[Effect, list[Effect]]] = {}
    if row is None or not facts.one_life(key):
        return found
    for column in {column for update in updates for column in update.values}:
        last = may_be_last(facts, key, column)
        explaining = [e for e in last if equals(spec, column, e, row.values.get(column))]
        if len(explaining) == 1:
            found[column] = explaining[0], last
    return found


def _overwritten_by(
    facts: Facts,
    spec: TableSpec,
    winner: Effect,
    txn: Transaction,
    losers: Sequence[Effect],
    last: LastWords,
) -> Iterator[Finding]:
    for loser in losers:
        if (
            _knew(facts, txn, loser)
            or not foreign(loser, txn)
            or _ended_otherwise(facts, loser, winner)
        ):
            continue
        ordered = facts.before(loser, winner)
        for column, value in loser.values.items():
            if not (ordered or _came_first(loser, winner, last.get(column))):
                continue
            if winner.kind == "update" and (
                column not in winner.values
                or not value_differs(spec, column, winner.values[column], value)
            ):
                continue
            if recorded(facts, winner, loser, column):
                continue
            if _is_what_was_known(facts, spec, winner, txn, column, value):
                continue  # set back to it: the merge finds no change on their side
            if _may_have_come_between(facts, winner, loser, column):
                continue
            if not _changed_nothing(facts, spec, loser, column):
                text = f"{column}: {winner.name} overwrote {loser.name} without knowing it"
                evidence = {"column": column, "lost": value, "kept": winner.values.get(column)}
                yield Finding("unsurfaced_conflict", key_name(winner.key), text, evidence)


def _is_what_was_known(
    facts: Facts, spec: TableSpec, winner: Effect, txn: Transaction, column: str, value: object
) -> bool:
    """True when a value may be the one that the winner was made on."""
    known = [
        effect
        for effect in facts.on(winner.key, "yes")
        if column in effect.values and effect is not winner and _knew(facts, txn, effect)
    ]
    own = [effect for effect in known if not foreign(effect, txn)]  # known for certain
    return any(
        equals(spec, column, effect, value)
        for among in (known, own)
        for effect in among
        if not any(facts.before(effect, other) for other in among if other is not effect)
    )


def _may_have_come_between(facts: Facts, winner: Effect, loser: Effect, column: str) -> bool:
    """True when somebody else overwrote the loser, and may have done so before the winner came.

    That one is judged for it; the winner then met another value, which is judged by itself.
    """
    return any(
        effect not in (winner, loser)
        and column in effect.values
        and facts.before(loser, effect)
        and not facts.before(winner, effect)
        for effect in facts.on(winner.key, "yes", "maybe")
    )


def _changed_nothing(facts: Facts, spec: TableSpec, change: Effect, column: str) -> bool:
    """True when a change may have found its own value there: then nothing of it could be lost."""
    others = [e for e in facts.on(change.key, "yes", "maybe") if e.txn is not change.txn]
    if change.version is not None and all(e.version != change.version for e in others):
        return False  # it moved the row's version
    return any(
        equals(spec, column, other, change.values[column])
        for other in others
        if other.begin < change.begin
    )


def _came_first(
    loser: Effect, winner: Effect, last: tuple[Effect, Sequence[Effect]] | None
) -> bool:
    """True when only the winner explains what stands: whatever else was unordered came before."""
    return last is not None and last[0] is winner and any(write is loser for write in last[1])


def _taken_along(facts: Facts, key: Key) -> Iterator[Finding]:
    done = facts.on(key, "yes")
    if any(effect.kind == "delete" and effect.via is None for effect in done):
        return  # nothing may have been left to take along
    for end in done:
        for birth in done:
            if end.txn is None or end.via is None or birth.kind != "insert":
                continue
            concurrent = foreign(birth, end.txn) and not _knew(facts, end.txn, birth)
            if concurrent and facts.before(birth, end) and not recorded(facts, end, birth):
                text = f"{end.name} took along a child added elsewhere, without a record"
                yield Finding("unsurfaced_conflict", key_name(key), text, {"by": birth.name})


def _knew(facts: Facts, txn: Transaction, change: Effect) -> bool:
    """False only when `txn` certainly was made without knowing `change`."""
    looked = compare_versions((txn.shown or {}).get(key_name(change.key)), change.version)
    if looked is not None and looked >= 0:
        return True
    if change.begin > txn.end and len(txn.positions) == 1:
        return False
    if not facts.reads_recorded or change.version is None:
        return True
    known = [seen.version for seen in facts.seen_by(txn, change.key)]
    known += [
        own.version
        for own in facts.on(change.key, "yes")
        if own.txn is not None
        and own.version is not None
        and not foreign(own, txn)
        and own.txn.begin < txn.begin
    ]
    # What can't be compared may be newer.
    return any(compare_versions(version, change.version) in (None, 0, 1) for version in known)


def unrecorded(facts: Facts) -> Iterator[Finding]:
    """In conflict, and no record keeps the two sides for a person."""
    kept = {record.txn_id for record in facts.observation.records}
    for txn in facts.transactions.values():
        if txn.state == "conflict" and txn.txn_id not in kept:
            text = "it is in conflict and no record of it is kept"
            yield Finding("unsurfaced_conflict", txn.txn_id, text, {"rows": sorted(txn.rows)})


CONFLICT_RULES: tuple[Rule, ...] = (overwritten, unrecorded)
