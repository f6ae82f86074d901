"""One bounded pass: breaker → next batch → one RPC → record, merge what met, park what is refused.

Delivery is at least once and the server's ledger makes it exactly once in effect, so this module
needs no memory of what is under way: a transaction is pending until the server's verdict on it is
written down, and sending it again is harmless. Whatever interrupts a pass, the next one continues.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from local_store import LocalStore, LocalStoreError
from local_store.clock import Clock, SystemClock
from local_store.ops import Outcome, PendingTransaction, Row, Selection
from syncer.core.backoff import RetryLimits, honoured_retry_after_s, retry_delay_s
from syncer.core.batch import Batch, choose, next_turn
from syncer.core.breaker import Breaker, BreakerState
from syncer.core.merge import merge
from syncer.core.pace import Pace
from syncer.core.sorting import (
    Sorted,
    SortingLimits,
    as_left,
    conflict_park,
    evidence_of,
    needs_person,
    park_of,
    parked_before,
    rewritten_for,
    sort_out,
    unregistered,
)
from syncer.core.verdict import Verdict
from syncer.core.wire import Park
from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    SyncError,
    Throttled,
    TookTooLong,
)
from syncer.remote import Remote, SupabaseRemote
from syncer.settings import Settings

Stopped = Literal["empty", "budget", "outage", "auth", "schema"]

BEHIND_PARKED_S = 1.0  # until what precedes it is parked, which is on its way
SPOILT_RETRY_S = 3_600.0  # what spoils every call is tried again when a limit may have been raised
# What alone takes longer than the server allows: ten minutes of others' deliveries are worth the
# twenty seconds of another try, and an overload has often passed by then.
SLOW_RETRY_S = 600.0
TURN_WAIT_S = 0.2  # about one batch: another process is flushing the folder


@dataclass(frozen=True, slots=True)
class FlushLimits:
    """Bounds of one pass."""

    batch_ops_max: int = 500
    batch_bytes_max: int = 4 * 1024 * 1024
    breaker_interval_s: float = 5.0
    retry: RetryLimits = field(default_factory=RetryLimits)
    sorting: SortingLimits = field(default_factory=SortingLimits)

    @classmethod
    def from_settings(cls, settings: Settings) -> FlushLimits:
        """Take the bounds from the environment's settings."""
        return cls(
            batch_ops_max=settings.batch_ops_max,
            batch_bytes_max=settings.batch_bytes_max,
            breaker_interval_s=settings.breaker_interval_s,
            sorting=SortingLimits(parent_wait_s=settings.parent_wait_s),
        )


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What one pass did. An outage is a report, not an exception.

    `conflict` and `rejected` count what now waits for a person, `merged` the conflicts that were
    merged and are sent again. `stopped` says why the pass ended: nothing left that is due
    (`empty`), one batch done and more may be left (`budget`; with nothing sent: another process is
    flushing this folder), Supabase is unavailable (`outage`), it refuses the key (`auth`) or lacks
    the schema (`schema`). `pending` counts what is still undelivered. `took_s` is the time it took.
    """

    sent: int = 0
    applied: int = 0
    duplicate: int = 0
    conflict: int = 0
    rejected: int = 0
    held: int = 0
    fenced: int = 0
    merged: int = 0
    pending: int = 0
    breaker: BreakerState = "closed"
    stopped: Stopped = "empty"
    error: str | None = None
    took_s: float = field(default=0.0, compare=False)

    def plus(self, later: FlushReport) -> FlushReport:
        """Add up the counts of two passes; the rest is the later one's."""
        return replace(
            later,
            sent=self.sent + later.sent,
            applied=self.applied + later.applied,
            duplicate=self.duplicate + later.duplicate,
            conflict=self.conflict + later.conflict,
            rejected=self.rejected + later.rejected,
            held=self.held + later.held,
            fenced=self.fenced + later.fenced,
            merged=self.merged + later.merged,
            took_s=self.took_s + later.took_s,
        )


class Flusher:
    """Delivers one store's op log to one remote. Thread-safe; passes never overlap on a folder.

    `selection` narrows it to some transactions, for a replay.
    """

    def __init__(
        self,
        store: LocalStore,
        remote: Remote,
        *,
        limits: FlushLimits | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._store = store
        self._remote = remote
        self._limits = limits or FlushLimits()
        self._clock = clock or SystemClock()
        self._jitter = jitter or random.SystemRandom().random
        self._selection = selection
        self._lock = threading.Lock()
        self._breaker = Breaker(interval_s=self._limits.breaker_interval_s)
        self._pace = Pace(limit_max=self._limits.batch_ops_max)
        self._after_user = ""
        self._slow: set[str] = set()  # transactions that took too long alone: sent alone from then

    @classmethod
    def from_settings(cls, store: LocalStore, settings: Settings | None = None) -> Flusher:
        """Build the flusher of `store`; raises SettingsError naming what is missing."""
        settings = settings or Settings.load()
        remote = SupabaseRemote.from_settings(settings)
        return cls(store, remote, limits=FlushLimits.from_settings(settings))

    @property
    def breaker(self) -> BreakerState:
        """Where the breaker stands now."""
        return self._breaker.state(self._clock.monotonic())

    def wait_s(self) -> float:
        """Seconds until the breaker lets the next attempt through."""
        return self._breaker.wait_s(self._clock.monotonic())

    def flush_once(self) -> FlushReport:
        """Send at most one batch and record what became of each transaction.

        Bounded by `batch_ops_max`, `batch_bytes_max` and the remote's call deadline; one RPC, and
        a second one when something must be parked. One flusher works on a folder at a time.
        """
        with self._lock, self._store.flushing() as mine:
            if not mine:
                return self._report(FlushReport(stopped="budget"))
            began = self._clock.monotonic()
            report = self._flush_once()
            with suppress(LocalStoreError):  # a full disk, say: the next pass tidies
                self._store.tidy()
            return self._report(report, began)

    def _flush_once(self) -> FlushReport:
        if not self._breaker.allows(self._clock.monotonic()):
            return FlushReport(stopped="outage")
        batch, undecided = self._next_batch()
        if not batch.transactions and not undecided:
            return FlushReport(stopped="empty")
        self._after_user = next_turn(self._after_user, (*batch.transactions, *undecided))
        report = FlushReport(sent=len(batch.transactions) + len(undecided), stopped="budget")
        try:
            parks = [conflict_park(transaction) for transaction in undecided]
            if batch.transactions:
                verdicts = self._remote.apply_batch(batch)
                self._breaker = self._breaker.after_success()
                self._pace = self._pace.after_success(len(batch.transactions))
                self._slow.difference_update(verdict.txn_id for verdict in verdicts)
                report = _tally(report, verdicts)
                found = self._settle(batch.transactions, verdicts)
                parks += found.refused
                parks += self._behind(found, parks)
            if parks:
                report = self._park(batch, parks, report)
        except SyncError as error:
            return self._after_failure(batch, error, report)
        return report

    def _next_batch(self) -> tuple[Batch, list[PendingTransaction]]:
        """Return what to send, and what a merge left to a person and is to be parked."""
        due = self._store.due(
            transactions_max=self._pace.limit,
            bytes_max=self._limits.batch_bytes_max,
            selection=self._selection,
            after_user=self._after_user,
        )
        undecided = [item for item in due.transactions if needs_person(item)]
        sendable = [item for item in due.transactions if not needs_person(item)]
        slow = [item for item in sendable if item.txn_id in self._slow]
        chosen = choose(slow[:1] or sendable, self._limits.batch_ops_max)
        return Batch(due.log_id, due.acknowledged_seq, chosen), undecided

    # -- what a reply asks for --

    def _settle(
        self, transactions: Sequence[PendingTransaction], verdicts: Sequence[Verdict]
    ) -> Sorted:
        """Write down, merge and renumber what can be; the rest is for the caller."""
        now, limits = self._clock.now(), self._limits.sorting
        found = sort_out(transactions, verdicts, now, self._jitter, limits)
        self._store.record(found.outcomes)
        freed = {outcome.txn_id for outcome in found.outcomes}
        tables = self._store.tables
        for transaction, rows in as_left(tables, transactions, verdicts, found.met):
            # Rows that come with something final needn't have been changed by anybody else.
            is_free = transaction.txn_id in freed
            names = [f"{op.table}/{op.id}" for op in transaction.ops]
            if not is_free and unregistered(tables, names):  # it waits for who can merge it
                later = Outcome(transaction.txn_id, "held", retry_after_s=SLOW_RETRY_S)
                self._store.record([later])
                continue
            blocker = self._meet(transaction, rows, () if is_free else rows)
            if blocker is not None and not is_free:
                held = Outcome(transaction.txn_id, "held", retry_after_s=BEHIND_PARKED_S)
                found.waiting.append((transaction, held, blocker))
        if found.forked:
            self._store.start_new_log(found.forked)
        if found.early:
            self._store.recheck(found.early)
        return found

    def _meet(
        self,
        transaction: PendingTransaction,
        rows: Mapping[str, Row | None],
        moved: Collection[str],
    ) -> str | None:
        """Merge all that is pending on some rows with what stands there, in one local transaction.

        What a policy leaves to a person is marked in the same transaction: sent as it is, it would
        overwrite the row that it was just rebased on. Returns the parked transaction behind which
        this one couldn't be merged: sent again as it is, it would meet the same row for ever.
        """
        keys = [(table, id_) for table, _, id_ in (key.partition("/") for key in rows)]
        keys += [(op.table, op.id) for op in transaction.ops]
        while True:
            chains = self._store.chains(keys, user_id=transaction.user_id)
            merged = merge(self._store.tables, chains.transactions, rows, moved=moved)
            rewritten, gone = rewritten_for(self._store.tables, chains, merged, rows)
            is_merged = any(item.txn_id == transaction.txn_id for item in rewritten)
            blocker = None if is_merged else parked_before(chains, transaction, rows)
            # What wasn't merged with these rows must not count as having met them.
            if (blocker and moved) or self._store.rebase(chains, rewritten, {**gone, **rows}):
                return blocker
            # else a write came between: merge with that one too

    def _behind(self, found: Sorted, parks: Sequence[Park]) -> list[Park]:
        """Sort out what waits: behind work that is or will be parked it is too, else it stays."""
        if not found.waiting:
            return []
        blockers = {blocker for _, _, blocker in found.waiting}
        parked = self._store.parked_among(list(blockers))
        # What an adopted transaction waits for and isn't here was handed over by its own buffer.
        parked |= {blocker for blocker in blockers if self._store.state(blocker) is None}
        parked |= {park.transaction.txn_id for park in parks}
        behind, stays = [], []
        for transaction, outcome, blocker in found.waiting:
            if blocker in parked:
                parked.add(transaction.txn_id)
                behind.append(Park(transaction, "held", blocked_by=blocker))
            else:
                stays.append(outcome)
        self._store.record(stays)
        return behind

    def _park(self, batch: Batch, parks: list[Park], report: FlushReport) -> FlushReport:
        """Hand over what a person or an event must free; settled here only by the reply."""
        parks = sorted(parks, key=lambda park: park.transaction.position)
        verdicts = self._remote.park(batch.log_id, batch.acknowledged_seq, parks)
        self._breaker = self._breaker.after_success()
        found = self._settle([park.transaction for park in parks], verdicts)
        if found.waiting:  # what they waited for was decided meanwhile: ask about that first
            self._store.record([outcome for _, outcome, _ in found.waiting])
            self._store.recheck([blocker for _, _, blocker in found.waiting])
        fresh = [
            park.state
            for park, verdict in zip(parks, verdicts, strict=True)
            if verdict.kind == "parked" and not park.transaction.parked
        ]
        return replace(
            report,
            conflict=report.conflict + fresh.count("conflict"),
            rejected=report.rejected + fresh.count("dead"),
        )

    # -- what a failure asks for --

    def _after_failure(self, batch: Batch, error: SyncError, report: FlushReport) -> FlushReport:
        now, told, sent = self._clock.monotonic(), str(error), max(1, len(batch.transactions))
        if isinstance(error, NotAuthorized | ProtocolMismatch):
            self._breaker = self._breaker.after_refusal(now)
            stopped: Stopped = "auth" if isinstance(error, NotAuthorized) else "schema"
            return replace(report, stopped=stopped, error=told)
        if isinstance(error, BatchTooLarge):
            return self._split(batch, error, report)
        delay_s = retry_delay_s(self._breaker.failures, self._jitter(), self._limits.retry)
        if isinstance(error, Throttled):
            asked_s = honoured_retry_after_s(error.retry_after_s, self._limits.retry)
            delay_s = max(delay_s, asked_s)
            self._pace = self._pace.after_throttle(sent)
        if isinstance(error, TookTooLong) and len(batch.transactions) == 1:
            report = self._set_aside(batch.transactions[0], error, report)
        self._breaker = self._breaker.after_failure(now, delay_s)
        if self.breaker != "closed":
            self._pace = self._pace.after_outage()
        return replace(report, stopped="outage", error=told)

    def _set_aside(
        self, slow: PendingTransaction, error: TookTooLong, report: FlushReport
    ) -> FlushReport:
        """Let the others go on without the one that is too slow by itself; it is tried again."""
        self._slow.add(slow.txn_id)
        self._pace = self._pace.after_culprit()
        evidence = evidence_of(Verdict(slow.txn_id, "held", message=str(error)))
        held = Outcome(slow.txn_id, "held", reply=evidence, retry_after_s=SLOW_RETRY_S)
        self._store.record([held])
        return replace(report, held=report.held + 1)

    def _split(self, batch: Batch, error: BatchTooLarge, report: FlushReport) -> FlushReport:
        """Halve the next batch until the one transaction that spoils the call stands alone."""
        report = replace(report, error=str(error))
        if len(batch.transactions) != 1:
            self._pace = self._pace.after_split(len(batch.transactions))
            return report
        [only] = batch.transactions
        self._pace = self._pace.after_culprit()
        refusal = Verdict(only.txn_id, "rejected", message=str(error))
        try:
            return self._park(batch, [park_of(only, refusal)], report)
        except BatchTooLarge:
            # It can't even be handed over. Kept here as a dead letter, it keeps nobody waiting.
            evidence = evidence_of(refusal)
            kept = Outcome(only.txn_id, "dead", reply=evidence, retry_after_s=SPOILT_RETRY_S)
            self._store.record([kept])
            return replace(report, rejected=report.rejected + 1)
        except SyncError as later:
            return self._after_failure(batch, later, report)

    def _report(self, report: FlushReport, began: float | None = None) -> FlushReport:
        """Say what is left; `began` is when the pass had its turn on the folder."""
        pending, breaker = self._store.backlog(), self.breaker
        took_s = 0.0 if began is None else self._clock.monotonic() - began
        return replace(report, pending=pending, breaker=breaker, took_s=took_s)


def _tally(report: FlushReport, verdicts: Sequence[Verdict]) -> FlushReport:
    kinds = [verdict.kind for verdict in verdicts]
    return replace(
        report,
        applied=kinds.count("applied"),
        duplicate=kinds.count("duplicate"),
        merged=kinds.count("conflict"),
        held=kinds.count("held"),
        fenced=kinds.count("fenced"),
    )


def drain(
    flusher: Flusher,
    clock: Clock,
    *,
    budget_s: float,
    keep_going: Callable[[], bool] = lambda: True,
    on_pass: Callable[[FlushReport], None] = lambda report: None,
) -> FlushReport:
    """Repeat passes until nothing is due, Supabase fails, or `budget_s` has passed.

    The budget is checked between passes: one call may overrun it by its own deadline. While another
    process flushes the folder this one waits for its turn.
    """
    end = clock.monotonic() + budget_s
    total = FlushReport()
    while True:
        report = flusher.flush_once()
        on_pass(report)
        total = total.plus(report)
        if report.stopped != "budget" or clock.monotonic() >= end or not keep_going():
            return total
        if not report.sent:
            clock.sleep(TURN_WAIT_S)
