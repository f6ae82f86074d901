"""From a reply to what has to be done about it: pure, so that a test can ask every verdict."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, assert_never

from local_store.ops import (
    Chains,
    Outcome,
    PendingTransaction,
    Rewritten,
    Row,
    TableSpec,
    TransactionState,
)
from syncer.core.backoff import RetryLimits, retry_delay_s
from syncer.core.merge import Merged
from syncer.core.verdict import Verdict
from syncer.core.wire import Park

FORKED = "SYT02"
"""The server knows another transaction at this position: the buffer came from a backup."""
AWAITED = ("23503", "02000")
"""A parent or a row that isn't there: another container may still bring it, for a while."""

Met = list[tuple[PendingTransaction, Mapping[str, Row | None]]]
"""Transactions with rows as they stand on the server, None: it is gone there."""


@dataclass(frozen=True, slots=True)
class SortingLimits:
    """How long transactions wait, in seconds."""

    held: RetryLimits = field(default_factory=lambda: RetryLimits(max_s=30.0))
    # Another container's buffer delivers within minutes once Supabase is back; after an hour the
    # parent isn't on its way, and a person must look.
    parent_wait_s: float = 3_600.0
    # How often a parked transaction asks what became of it.
    parked_check_s: float = 60.0


@dataclass(slots=True)
class Sorted:
    """What a reply asks for.

    `outcomes` are written down; `refused` are parked; `waiting` (with the txn_id that blocks them)
    are parked too if that one is; `met` are rows that have to be merged with what is still pending
    on them; `forked` go on in a new log. `early`: parked before something that was freed, so they
    must have been too, and are asked about first.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    refused: list[Park] = field(default_factory=list)
    waiting: list[tuple[PendingTransaction, Outcome, str]] = field(default_factory=list)
    met: Met = field(default_factory=list)
    forked: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)


def sort_out(
    transactions: Sequence[PendingTransaction],
    verdicts: Sequence[Verdict],
    now: datetime,
    jitter: Callable[[], float],
    limits: SortingLimits,
) -> Sorted:
    """Sort a reply by what each verdict asks for; nothing is ever dropped by it."""
    found, heard = Sorted(), {transaction.txn_id for transaction in transactions}
    for transaction, verdict in zip(transactions, verdicts, strict=True):
        unheard = [txn_id for txn_id in transaction.after if txn_id not in heard]
        if transaction.parked and unheard and verdict.kind in ("applied", "duplicate"):
            # Settled before them, it would end up beneath them in the local row, and what its
            # author writes next would be built on the older change.
            found.early += unheard
            heard.remove(transaction.txn_id)
            continue
        match verdict.kind:
            case "applied" | "duplicate":
                outcome = Outcome(
                    verdict.txn_id,
                    "applied",
                    verdict.versions,
                    learned=verdict.rows,
                    defaults=verdict.defaults,
                    doubted=_doubted(transaction, verdict),
                )
                _settle(found, transaction, verdict, outcome)
            case "parked":
                _sort_parked(found, transaction, verdict, jitter(), limits)
            case "conflict":
                found.met.append((transaction, verdict.rows))
            case "rejected" | "fenced" if verdict.sqlstate != FORKED:
                found.refused.append(park_of(transaction, verdict))
            case "rejected" | "fenced":
                found.forked.append(verdict.txn_id)
            case "held":
                _sort_held(found, transaction, verdict, now, jitter(), limits)
            case _:
                assert_never(verdict.kind)
    return found


def as_left(
    tables: Mapping[str, TableSpec],
    transactions: Sequence[PendingTransaction],
    verdicts: Sequence[Verdict],
    met: Met,
) -> Met:
    """Return the rows that were met as the whole call left them, not as they stood in between.

    On top of what somebody freed, the same call may have applied a later change: merged with the
    row as it stood before that one, the local row would lose it. A row that was made meanwhile is
    left out, for its own settling knows all of it.
    """
    told = {transaction.txn_id: rows for transaction, rows in met}
    left: dict[str, Row | None] = {}
    for transaction, verdict in zip(transactions, verdicts, strict=True):
        left |= told.get(transaction.txn_id, {})
        if verdict.kind != "applied":
            continue
        for op, children in zip(transaction.ops, transaction.children, strict=True):
            name, gone = f"{op.table}/{op.id}", (children or {}).keys() & left.keys()
            row = left.pop(name, None)
            if op.kind == "delete":
                left |= dict.fromkeys((name, *gone))
            elif row is not None and op.table in tables:
                left[name] = {**row, **op.values, tables[op.table].version: verdict.versions[name]}
    left = {name: row for name, row in left.items() if name not in unregistered(tables, left)}
    return [(item, {name: left[name] for name in rows if name in left}) for item, rows in met]


def unregistered(tables: Mapping[str, TableSpec], rows: Collection[str]) -> set[str]:
    """Return the rows (`table/id`) of tables that are not known any more: none can be merged."""
    return {name for name in rows if name.partition("/")[0] not in tables}


def _doubted(transaction: PendingTransaction, verdict: Verdict) -> tuple[str, ...]:
    """Return the rows of a duplicate that another container merged, or left out, in its own way.

    What its author wrote after it knew nothing of that: it must meet those rows by itself.
    """
    if verdict.kind != "duplicate":
        return ()
    if transaction.parked:  # freed by somebody else, perhaps in another form
        return tuple(verdict.rows)
    names = dict.fromkeys(f"{op.table}/{op.id}" for op in transaction.ops)
    return tuple(
        name
        for name in names
        if name not in verdict.versions or verdict.met.get(name) != transaction.met.get(name)
    )


def park_of(transaction: PendingTransaction, verdict: Verdict) -> Park:
    """Return what is handed over of a refused transaction."""
    message = verdict.message
    if verdict.kind == "fenced":
        message = "fenced: " + (message or "older than the ledger remembers")
    return Park(transaction, "dead", verdict.sqlstate, verdict.op, message)


def conflict_park(transaction: PendingTransaction) -> Park:
    """Return what is handed over of a transaction whose conflict a person must decide."""
    records = tuple(r for r in transaction.records if r["outcome"] == "manual")
    return Park(transaction, "conflict", message="a person must decide", records=records)


def needs_person(transaction: PendingTransaction) -> bool:
    """Tell whether a merge left a conflict of this transaction to a person.

    It must not be sent as it is: what it builds on was rebased, so it would overwrite their change.
    """
    return any(record["outcome"] == "manual" for record in transaction.records)


def parked_before(
    chains: Chains, transaction: PendingTransaction, keys: Collection[str]
) -> str | None:
    """Return the last transaction before this one on the rows that is parked or will be."""
    blocker = None
    for item in chains.transactions:
        if item.txn_id == transaction.txn_id:
            break
        waits = item.parked or any(record["outcome"] == "manual" for record in item.records)
        if waits and any(f"{op.table}/{op.id}" in keys for op in item.ops):
            blocker = item.txn_id
    return blocker


def rewritten_for(
    tables: Mapping[str, TableSpec],
    chains: Chains,
    merged: Merged,
    rows: Mapping[str, Row | None],
) -> tuple[list[Rewritten], dict[str, None]]:
    """Return what the store writes of a merge, and the rows whose insert came to nothing.

    A transaction that needs a person carries its records, outcome `manual`; until it is parked
    that is the mark which keeps it from being sent.
    """
    stored = {transaction.txn_id: transaction for transaction in chains.transactions}
    rewritten = {item.txn_id: item for item in merged.rewritten}
    for txn_id, records in merged.manual.items():
        was = stored[txn_id]
        item = rewritten.get(txn_id) or Rewritten(txn_id, was.ops, was.before, was.records)
        rewritten[txn_id] = replace(item, records=(*item.records, *records))
    gone: dict[str, None] = {}
    for txn_id, item in rewritten.items():
        kept = {(op.table, op.id) for op in item.ops}
        for op in stored[txn_id].ops:
            if op.kind == "insert" and (op.table, op.id) not in kept:
                gone[f"{op.table}/{op.id}"] = None
    return [_with_versions(tables, item, rows) for item in rewritten.values()], gone


def _with_versions(
    tables: Mapping[str, TableSpec], item: Rewritten, rows: Mapping[str, Row | None]
) -> Rewritten:
    """Say in each record which version of their row it speaks of."""
    records = []
    for record in item.records:
        row = rows.get(f"{record['table']}/{record['id']}")
        if row is not None and "theirs_version" not in record:
            record = {**record, "theirs_version": row[tables[record["table"]].version]}
        records.append(record)
    return replace(item, records=tuple(records))


def evidence_of(verdict: Verdict) -> dict[str, Any]:
    """Return what the op log keeps of a verdict that isn't final."""
    return {
        "verdict": verdict.kind,
        "state": verdict.state,
        "rows": dict(verdict.rows),
        "blocked_by": verdict.blocked_by,
        "op": verdict.op,
        "sqlstate": verdict.sqlstate,
        "message": verdict.message,
    }


def _settle(
    found: Sorted, transaction: PendingTransaction, verdict: Verdict, outcome: Outcome
) -> None:
    found.outcomes.append(outcome)
    # Freed by somebody else: the rows may be other than this buffer made them, and what was written
    # on top of them since has to be merged with what they are.
    if transaction.parked and verdict.rows:
        found.met.append((transaction, verdict.rows))


def _sort_parked(
    found: Sorted,
    transaction: PendingTransaction,
    verdict: Verdict,
    jitter: float,
    limits: SortingLimits,
) -> None:
    state: TransactionState = verdict.state or "dead"
    if state in ("discarded", "superseded"):
        found.outcomes.append(Outcome(verdict.txn_id, state, reply=evidence_of(verdict)))
        found.met.append((transaction, verdict.rows))
        return
    wait_s = limits.parked_check_s * (0.5 + jitter)
    reply = None if transaction.parked else evidence_of(verdict)
    found.outcomes.append(
        Outcome(verdict.txn_id, state, reply=reply, retry_after_s=wait_s, parked=True)
    )


def _sort_held(
    found: Sorted,
    transaction: PendingTransaction,
    verdict: Verdict,
    now: datetime,
    jitter: float,
    limits: SortingLimits,
) -> None:
    if verdict.sqlstate in AWAITED and transaction.held_since is not None:
        waited = now - datetime.fromisoformat(transaction.held_since)
        if waited.total_seconds() >= limits.parent_wait_s:
            found.refused.append(park_of(transaction, verdict))
            return
    delay_s = retry_delay_s(transaction.attempts, jitter, limits.held)
    outcome = Outcome(verdict.txn_id, "held", reply=evidence_of(verdict), retry_after_s=delay_s)
    if verdict.blocked_by is None:
        found.outcomes.append(outcome)
    else:
        found.waiting.append((transaction, outcome, verdict.blocked_by))
