"""Delivering a buffer by command: after an outage, or after the server came back from a backup.

The ordinary flusher does the work, on a selection, until nothing is left that can be delivered.
Interrupted, repeated or run twice at once, the effect is the same: the ledger recognises every
transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from local_store import LocalStore
from local_store.clock import Clock
from local_store.ops import PendingTransaction, Row, Selection
from syncer.flusher import Flusher, FlushReport, drain
from syncer.remote import Remote, TableRead

IDLE_ROUNDS_MAX = 3  # what is still held after three quiet rounds waits for something else
IDLE_WAIT_S = 1.0  # held transactions are due again after a second or so at first
PARKED_STATES = ("dead", "conflict", "held")
DRY_RUN_TRANSACTIONS_MAX = 1_000  # a page for a person to read


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay did with the transactions it selected.

    `conflict` and `rejected` now wait for a person, with the server; `remaining` are still
    undelivered here. `error` is the last failure of a call, `reachable` whether Supabase answered
    at the end.
    """

    selected: int = 0
    applied: int = 0
    duplicate: int = 0
    conflict: int = 0
    rejected: int = 0
    held: int = 0
    remaining: int = 0
    reachable: bool = True
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document that `syncer replay --json` prints."""
        document = asdict(self)
        del document["reachable"], document["error"]
        return document

    @property
    def complete(self) -> bool:
        """True when nothing is left and nothing new waits for a person."""
        return self.remaining == 0 and self.rejected == 0 and self.conflict == 0


def replay(
    store: LocalStore,
    flusher: Flusher,
    selection: Selection,
    clock: Clock,
    *,
    settled: bool = False,
    budget_s: float = 3_600.0,
    on_progress: Callable[[int], None] = lambda remaining: None,
) -> ReplayReport:
    """Deliver what is selected until empty, refused, or `budget_s` has passed.

    `flusher` must be made with the same selection. With `settled` also what the server had
    confirmed before is sent again: after a restore from an older backup it may have forgotten it,
    and what it still knows comes back as a duplicate. Raises only what the buffer raises.
    """
    if settled:
        store.reopen(selection)
        # What is parked may be forgotten there too; asking about it hands it over again.
        store.recheck(_parked_ids(store))
    selected = store.count(selection)
    end, idle, total = clock.monotonic() + budget_s, 0, FlushReport()
    while True:
        report = drain(flusher, clock, budget_s=max(0.0, end - clock.monotonic()))
        total = total.plus(report)
        remaining = store.count(selection)
        on_progress(remaining)
        idle = 0 if report.applied or report.duplicate or report.merged else idle + 1
        gave_up = flusher.breaker != "closed" or report.stopped in ("auth", "schema")
        if not remaining or gave_up or idle > IDLE_ROUNDS_MAX or clock.monotonic() >= end:
            break
        clock.sleep(max(IDLE_WAIT_S, flusher.wait_s()))
    return ReplayReport(
        selected=selected,
        applied=total.applied,
        duplicate=total.duplicate,
        conflict=total.conflict,
        rejected=total.rejected,
        held=store.count(selection, states=("held",)),
        remaining=remaining,
        reachable=total.stopped not in ("outage", "auth", "schema"),
        error=total.error,
    )


def _parked_ids(store: LocalStore) -> Iterator[str]:
    for log in store.logs():
        after_seq = 0
        while page := store.entries(log_id=log["log_id"], after_seq=after_seq):
            yield from (entry.txn_id for entry in page if entry.state in PARKED_STATES)
            after_seq = page[-1].seq


@dataclass(frozen=True, slots=True)
class Difference:
    """What one op of an undelivered transaction would change on the server as it is now.

    `columns` maps a column to (live value, value of the op). `live` tells whether there is a row.
    """

    txn_id: str
    seq: int
    user_id: str
    table: str
    id: str
    kind: str
    live: bool
    columns: dict[str, tuple[Any, Any]]

    def to_json(self) -> Row:
        """Return the difference as one object."""
        columns = {name: {"live": a, "mine": b} for name, (a, b) in self.columns.items()}
        return {**asdict(self), "columns": columns}


def differences(store: LocalStore, remote: Remote, selection: Selection) -> Iterator[Difference]:
    """Compare what is selected with the live rows, as their authors see them; changes nothing.

    At most the oldest 1,000 transactions, of all logs, also those whose next attempt is later.
    Raises SyncError when Supabase can't be asked.
    """
    for transaction in store.undelivered(selection, limit=DRY_RUN_TRANSACTIONS_MAX):
        yield from _differences_of(store, remote, transaction)


def _differences_of(
    store: LocalStore, remote: Remote, transaction: PendingTransaction
) -> Iterator[Difference]:
    reads = [TableRead(op.table, {store.tables[op.table].key: op.id}) for op in transaction.ops]
    found: Sequence[Sequence[Row]] = remote.read(transaction.user_id, reads) if reads else []
    for op, rows in zip(transaction.ops, found, strict=True):
        live = rows[0] if rows else None
        there = live or {}
        columns = {
            column: (there.get(column), value)
            for column, value in op.values.items()
            if live is None or there.get(column) != value
        }
        yield Difference(
            transaction.txn_id,
            transaction.seq,
            transaction.user_id,
            op.table,
            op.id,
            op.kind,
            live is not None,
            columns,
        )
