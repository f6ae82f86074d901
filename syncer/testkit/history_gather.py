"""Build the facts: group calls by transaction, place each, and spread its ops over the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from local_store import TableSpec
from local_store.door import lookup_id
from local_store.ops import Delete, Insert, LogEntry, Op, WireOp, by_name
from syncer.testkit.history_events import Call, Decision, Events, OutsideChange, Told
from syncer.testkit.history_facts import UNTOLD, Effect, Facts, Happened, Transaction
from syncer.testkit.history_observation import Key, LedgerRow, Observation, ParkedRecord


def gather(
    events: Events,
    observation: Observation,
    tables: Sequence[TableSpec],
    *,
    reads_recorded: bool,
    cascades_recorded: bool,
) -> Facts:
    """Bring a history and what was observed after it together."""
    specs = by_name(tables)
    ledger: dict[str, list[LedgerRow]] = defaultdict(list)
    for entry in observation.ledger or ():
        ledger[entry.txn_id].append(entry)
    entries: dict[str, list[tuple[str, LogEntry]]] = defaultdict(list)
    for buffer in observation.buffers:
        for line in buffer.entries:
            entries[line.txn_id].append((buffer.log_id, line))
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in events.calls:
        calls[call.txn_id].append(call)
    # What says where it is parked says more than a record of a conflict that it was in.
    ranked = sorted(observation.records, key=lambda record: record.log_id is not None)
    parked = {record.txn_id: record for record in ranked}

    def made_of(txn_id: str, group: Sequence[Call]) -> Transaction:
        there, here = ledger.get(txn_id, []), entries.get(txn_id, [])
        return _transaction(group, there, here, parked, observation, specs)

    transactions = {txn_id: made_of(txn_id, group) for txn_id, group in calls.items()}
    _decide(transactions, calls, events.decisions, made_of)
    return Facts(
        specs,
        observation,
        events,
        transactions,
        ledger,
        entries,
        _effects(specs, transactions.values(), events.outside),
        _records(observation.records, transactions),
        frozenset(_strange_rows(ledger, transactions)),
        reads_recorded=reads_recorded,
        cascades_recorded=cascades_recorded,
    )


def _decide(
    transactions: dict[str, Transaction],
    calls: Mapping[str, Sequence[Call]],
    decisions: Sequence[Decision],
    made_of: Callable[[str, Sequence[Call]], Transaction],
) -> None:
    """Take over what people made of parked work. An edit stands where that stood which it replaces.

    Decisions about transactions that no recorded call asked for are left out.
    """
    groups = {txn_id: tuple(group) for txn_id, group in calls.items()}
    for decision in decisions:
        if decision.txn_id not in groups:
            continue
        was = transactions[decision.txn_id] = replace(transactions[decision.txn_id], shown={})
        new_id = decision.replaced_by or was.txn_id
        group = [replace(c, txn_id=new_id, ops=decision.ops) for c in groups[was.txn_id]]
        if decision.replaced_by is not None:  # its own log and position are the server's
            group = [replace(call, log_id=None, seq=None) for call in group]
        groups[new_id] = tuple(group)
        made = made_of(new_id, group)
        transactions[new_id] = replace(
            made,
            positions=was.positions,
            shown={**decision.shown},
            written=() if decision.replaced_by else was.written or was.ops,
        )


def with_maybe(facts: Facts, doubted: Iterable[str]) -> Facts:
    """Let the effects of transactions whose state is wrong anyway be there or not.

    What is wrong with them is reported once, and not again for each row that they wrote.
    """
    doubted = frozenset(doubted)
    if not doubted:
        return facts
    transactions = {
        txn_id: replace(txn, happened="maybe") if txn_id in doubted else txn
        for txn_id, txn in facts.transactions.items()
    }
    effects = _effects(facts.specs, transactions.values(), facts.events.outside)
    return replace(facts, transactions=transactions, effects=effects, lives={})


def _transaction(
    calls: Sequence[Call],
    ledger: Sequence[LedgerRow],
    entries: Sequence[tuple[str, LogEntry]],
    parked: Mapping[str, ParkedRecord],
    observation: Observation,
    specs: Mapping[str, TableSpec],
) -> Transaction:
    accepted = [call for call in calls if call.told == "ok"]
    told: Told = "refused"
    if accepted or any(call.told == "unknown" for call in calls):
        told = "ok" if accepted else "unknown"
    first = next(call for call in calls if call.told == told)
    state = _state(first.txn_id, ledger, entries, parked, observation)
    positions = {call.log_id: call.seq for call in accepted if call.log_id and call.seq}
    positions |= {log_id: entry.seq for log_id, entry in entries}
    there = [(entry.log_id, entry.seq) for entry in ledger]
    record = parked.get(first.txn_id)
    if record is not None and record.log_id is not None and record.seq is not None:
        there.append((record.log_id, record.seq))
    positions = {**dict(there), **positions}
    return Transaction(
        first.txn_id,
        first.user_id,
        told,
        tuple(_wire(op, specs) for op in first.ops),
        min(call.begin for call in calls if call.told != "refused" or told == "refused"),
        min((call.end for call in accepted), default=UNTOLD),
        positions,
        state,
        _happened(told, state, looked=observation.ledger is not None),
        (ledger[0].versions or {}) if ledger else {},
    )


def _state(
    txn_id: str,
    ledger: Sequence[LedgerRow],
    entries: Sequence[tuple[str, LogEntry]],
    parked: Mapping[str, ParkedRecord],
    observation: Observation,
) -> str:
    """Say where a transaction stands; the ledger outranks the buffers, they outrank the rest."""
    if ledger:
        return ledger[0].verdict
    states = [entry.state for _, entry in entries]
    order = ("applied", "superseded", "discarded", "conflict", "dead", "held", "pending")
    for state in order:
        if state in states:
            return state
    if txn_id in parked:
        return parked[txn_id].state
    return "quarantined" if txn_id in observation.quarantined else "absent"


def _happened(told: Told, state: str, looked: bool) -> Happened:
    """Say whether effects must, may or must not show; `looked` when the ledger was read."""
    if state == "applied":
        return "yes"
    if looked or told == "refused":
        return "no"
    # Nobody read the ledger: a reply that was lost can have left the effect.
    return "maybe" if state in ("pending", "held", "absent", "quarantined") else "no"


def _wire(op: Op, specs: Mapping[str, TableSpec]) -> WireOp:
    spec = specs.get(op.table)
    key = spec.key if spec else "id"
    if isinstance(op, Insert):
        values = dict(op.values)
        given = values.pop(key, None)
        if given is None:
            raise ValueError(
                f"{op.table}: record inserts with their {key}, or nobody can find them"
            )
        if spec is not None:
            values.pop(spec.owner, None)
        return WireOp(op.table, "insert", _row_id(spec, given), values)
    if isinstance(op, Delete):
        return WireOp(op.table, "delete", _row_id(spec, op.id), {})
    return WireOp(op.table, "update", _row_id(spec, op.id), dict(op.changes))


def _row_id(spec: TableSpec | None, value: object) -> str:
    return (None if spec is None else lookup_id(spec, value)) or str(value)


def _effects(
    specs: Mapping[str, TableSpec],
    transactions: Iterable[Transaction],
    outside: Sequence[OutsideChange],
) -> dict[Key, list[Effect]]:
    effects: dict[Key, list[Effect]] = defaultdict(list)
    for txn in transactions:
        for effect in _effects_of(txn):
            effects[effect.key].append(effect)
    for number, change in enumerate(outside):
        key = (change.table, _row_id(specs.get(change.table), change.id))
        effects[key].append(
            Effect(
                key,
                change.kind,
                change.values,
                change.user_id,
                change.begin,
                change.end,
                "yes",
                number,
                version=change.version,
            )
        )
    _add_cascades(specs, effects)
    return effects


def _effects_of(txn: Transaction) -> Iterator[Effect]:
    for index, op in enumerate(txn.ops):
        yield Effect(
            (op.table, op.id),
            op.kind,
            op.values,
            txn.user_id,
            txn.begin,
            txn.end,
            txn.happened,
            index,
            txn=txn,
            version=txn.versions.get(f"{op.table}/{op.id}"),
        )


def _add_cascades(specs: Mapping[str, TableSpec], effects: dict[Key, list[Effect]]) -> None:
    """A deleted row takes its children with it, so each delete shows on them too."""
    parents = {key: _parents(specs.get(key[0]), changes) for key, changes in effects.items()}
    children: dict[Key, set[Key]] = defaultdict(set)
    for key, found in parents.items():
        for parent in found:
            children[parent].add(key)
    for delete in [e for changes in effects.values() for e in changes if e.kind == "delete"]:
        reached, todo = {delete.key}, [(delete, child) for child in children.get(delete.key, ())]
        while todo:
            cause, child = todo.pop()
            if child in reached:
                continue
            reached.add(child)
            # A row that hung on several parents may have hung elsewhere at that moment.
            unsure = len(parents[child]) > 1 and cause.happened == "yes"
            happened: Happened = "maybe" if unsure else cause.happened
            gone = replace(cause, key=child, via=delete.key, version=None, happened=happened)
            effects[child].append(gone)
            todo += [(gone, grandchild) for grandchild in children.get(child, ())]


def _parents(spec: TableSpec | None, changes: Sequence[Effect]) -> set[Key]:
    if spec is None or spec.parent is None:
        return set()
    column, table = spec.parent
    named = [change.values[column] for change in changes if change.values.get(column)]
    return {(table, str(value)) for value in named}


def _records(
    records: Sequence[ParkedRecord], transactions: Mapping[str, Transaction]
) -> dict[Key, list[ParkedRecord]]:
    """Index records by row; one that names no row stands for all rows of its transaction."""
    index: dict[Key, list[ParkedRecord]] = defaultdict(list)
    for record in records:
        txn = transactions.get(record.txn_id)
        for key in record.rows or (txn.rows if txn else ()):
            index[key].append(record)
    return index


def _strange_rows(
    ledger: Mapping[str, Sequence[LedgerRow]], transactions: Mapping[str, Transaction]
) -> Iterator[Key]:
    for txn_id, entries in ledger.items():
        for entry in entries if txn_id not in transactions else ():
            for name in entry.versions or {}:
                table, _, row_id = name.partition("/")
                yield table, row_id
