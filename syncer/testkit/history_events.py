"""What the clients did and were told, as values, and the recorder that collects it.

Nothing here judges. Times are the clock's monotonic seconds; they only decide which of two events
was over before the other began.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from local_store import Delete, Insert, LocalStore, Receipt, Update
from local_store.clock import Clock, SystemClock, new_id
from local_store.door import canonical_uuid
from local_store.errors import CommitUnknown, LocalStoreError
from local_store.ops import Kind, Op, Row, user_uuid

Told = Literal["ok", "refused", "unknown"]
"""What a client learned: it happened, it did not and never will, or nothing."""


@dataclass(frozen=True, slots=True)
class Call:
    """One client call. `number` is the order in which outcomes were learned.

    `log_id` and `seq` come from the receipt; a client behind HTTP doesn't know them (None).
    """

    number: int
    txn_id: str
    user_id: str
    ops: tuple[Op, ...]
    told: Told
    begin: float
    end: float
    log_id: str | None = None
    seq: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OutsideChange:
    """A change by SQL or another system. `version` is what it left, None when unknown or gone."""

    kind: Kind
    table: str
    id: str
    values: Row
    user_id: str | None
    version: str | None
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Seen:
    """At this moment the local copy of a log took over a row at this server version."""

    log_id: str
    table: str
    id: str
    version: str
    at: float


@dataclass(frozen=True, slots=True)
class Forgotten:
    """At this moment a log forgot what it had seen since another: its disk had lost power."""

    log_id: str
    since: float
    at: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person made of a parked transaction: these ops, and nothing else of it.

    They take effect under `replaced_by` when an edit put another transaction in its place. `shown`
    maps `table/id` to the version of the row that the person had before them.
    """

    txn_id: str
    ops: tuple[Op, ...]
    replaced_by: str | None = None
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Events:
    """A whole history as values: what `check` judges. `people` maps txn_id to their actions."""

    calls: tuple[Call, ...]
    outside: tuple[OutsideChange, ...]
    seen: tuple[Seen, ...]
    people: Mapping[str, tuple[str, ...]]
    decisions: tuple[Decision, ...] = ()
    forgotten: tuple[Forgotten, ...] = ()


def _kept(ops: Sequence[Op]) -> tuple[Op, ...]:
    """Return the ops as they are now, whatever their caller does to the values afterwards."""
    return tuple(_kept_one(op) for op in ops)


def _kept_one(op: Op) -> Op:
    match op:
        case Insert():
            return Insert(op.table, copy.deepcopy(dict(op.values)))
        case Update():
            changes = copy.deepcopy(dict(op.changes))
            return Update(op.table, op.id, changes, op.expected_version)
        case Delete():
            return op  # holds nothing that changes
        case _:
            assert_never(op)


class OpenCall:
    """A call under way: say how it ended, or let an exception say it."""

    def __init__(self) -> None:
        self.told: Told | None = None
        self.log_id: str | None = None
        self.seq: int | None = None
        self.error: str | None = None

    def ok(self, receipt: Receipt | None = None, *, log_id: str | None = None) -> None:
        """The client was told that it happened; `receipt` brings the seq when there is one."""
        self.told, self.log_id = "ok", log_id
        self.seq = None if receipt is None else receipt.seq

    def refused(self, error: str | None = None) -> None:
        """The client was told that nothing happened."""
        self.told, self.error = "refused", error

    def unknown(self, error: str | None = None) -> None:
        """The client was told nothing: it may have happened."""
        self.told, self.error = "unknown", error


class History:
    """Records what clients did and were told. Thread-safe; one for all clients of a test."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._outside: list[OutsideChange] = []
        self._seen: list[Seen] = []
        self._people: dict[str, list[str]] = {}
        self._decisions: list[Decision] = []
        self._forgotten: list[Forgotten] = []

    def now(self) -> float:
        """Return the moment, in the seconds of `begin`."""
        return self._clock.monotonic()

    def events(self) -> Events:
        """Return everything recorded so far."""
        with self._lock:
            people = {txn_id: tuple(actions) for txn_id, actions in self._people.items()}
            seen, decisions = tuple(self._seen), tuple(self._decisions)
            calls, outside = tuple(self._calls), tuple(self._outside)
            return Events(calls, outside, seen, people, decisions, tuple(self._forgotten))

    @contextmanager
    def call(self, user_id: str, ops: Sequence[Op], txn_id: str) -> Iterator[OpenCall]:
        """Record one call around its doing. Inserts must name their key, or nobody can find them.

        Without a word from the body, an error that says "nothing was written" means refused, any
        other way out means unknown.
        """
        call, kept, begin = OpenCall(), _kept(ops), self.now()
        try:
            yield call
        except LocalStoreError as error:
            if call.told is None:
                told = call.unknown if isinstance(error, CommitUnknown) else call.refused
                told(type(error).__name__)
            raise
        finally:
            self._add(txn_id, user_id, kept, call, begin)

    def write(
        self, store: LocalStore, ops: Sequence[Op], *, user_id: str, txn_id: str | None = None
    ) -> Receipt:
        """Write to a store and record how it went; raises what the store raises."""
        txn_id = txn_id or new_id()
        with self.call(user_id, ops, txn_id) as call:
            receipt = store.write(ops, user_id=user_id, txn_id=txn_id)
            call.ok(receipt, log_id=store.log_id)
        return receipt

    def ok(
        self,
        *,
        txn_id: str,
        user_id: str,
        ops: Sequence[Op],
        seq: int | None = None,
        log_id: str | None = None,
        begin: float | None = None,
    ) -> None:
        """Record an acknowledged call that ends now; `begin` as `now()` gave it."""
        call = OpenCall()
        call.told, call.log_id, call.seq = "ok", log_id, seq
        self._add(txn_id, user_id, _kept(ops), call, begin)

    def refused(
        self, *, txn_id: str, user_id: str, ops: Sequence[Op], begin: float | None = None
    ) -> None:
        """Record a call that was told to have no effect, now or ever."""
        call = OpenCall()
        call.refused()
        self._add(txn_id, user_id, _kept(ops), call, begin)

    def unknown(
        self, *, txn_id: str, user_id: str, ops: Sequence[Op], begin: float | None = None
    ) -> None:
        """Record a call whose outcome the client never learned."""
        call = OpenCall()
        call.unknown()
        self._add(txn_id, user_id, _kept(ops), call, begin)

    def outside_insert(
        self,
        table: str,
        id: str,
        values: Mapping[str, Any],
        *,
        user_id: str,
        version: str | None = None,
        begin: float | None = None,
    ) -> None:
        """Record a row that was there before or came by another way; it belongs to `user_id`."""
        self._outsider("insert", table, id, values, user_id, version, begin)

    def outside_edit(
        self,
        table: str,
        id: str,
        values: Mapping[str, Any],
        *,
        version: str | None = None,
        begin: float | None = None,
    ) -> None:
        """Record a change by SQL or another system, right after it was made.

        Only one that changed a row: an update that met none is no change. `begin` is `now()` from
        before it; needed when clients go on meanwhile.
        """
        self._outsider("update", table, id, values, None, version, begin)

    def outside_delete(self, table: str, id: str, *, begin: float | None = None) -> None:
        """Record a row that SQL or another system deleted."""
        self._outsider("delete", table, id, {}, None, None, begin)

    def saw(self, log_id: str, table: str, id: str, version: str) -> None:
        """Record that the local copy of `log_id` took over the row at this server version."""
        with self._lock:
            self._seen.append(Seen(log_id, table, id, version, self.now()))

    def forgot(self, log_id: str, *, since: float) -> None:
        """Record that a power loss took what `log_id` had seen since that moment of `now()`.

        What its local copy shows all the same is told again with `saw`, after this.
        """
        with self._lock:
            self._forgotten.append(Forgotten(log_id, since, self.now()))

    def person(self, txn_id: str, action: str) -> None:
        """Record what a person decided about a parked transaction: discard, retry, resolve…"""
        with self._lock:
            self._people.setdefault(canonical_uuid(txn_id) or txn_id, []).append(action)

    def decided(
        self,
        txn_id: str,
        action: str,
        ops: Sequence[Op],
        *,
        replaced_by: str | None = None,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        """Record what a person made of a parked transaction, right after they did it.

        `ops` is all that it may do from now on; an edit does it as `replaced_by`. `shown` names the
        versions (by `table/id`) of the rows that the person saw: those they overwrite knowingly.
        """
        self.person(txn_id, action)
        new = None if replaced_by is None else canonical_uuid(replaced_by) or replaced_by
        kept = copy.deepcopy(tuple(ops))
        with self._lock:
            txn_id = canonical_uuid(txn_id) or txn_id
            self._decisions.append(Decision(txn_id, kept, new, dict(shown or {})))

    def ops_of(self, txn_id: str) -> tuple[Op, ...]:
        """Return what a transaction is to do: as it was called, or as people decided since."""
        with self._lock:
            for decision in reversed(self._decisions):
                if txn_id in (decision.txn_id, decision.replaced_by):
                    return decision.ops
            return next((call.ops for call in self._calls if call.txn_id == txn_id), ())

    def _add(
        self, txn_id: str, user_id: str, ops: tuple[Op, ...], call: OpenCall, begin: float | None
    ) -> None:
        with self._lock:
            end = self.now()
            self._calls.append(
                Call(
                    number=len(self._calls) + 1,
                    txn_id=canonical_uuid(txn_id) or txn_id,
                    user_id=user_uuid(user_id),
                    ops=ops,
                    told=call.told or "unknown",
                    begin=end if begin is None else begin,
                    end=end,
                    log_id=call.log_id,
                    seq=call.seq,
                    error=call.error,
                )
            )

    def _outsider(
        self,
        kind: Kind,
        table: str,
        id: str,
        values: Mapping[str, Any],
        user_id: str | None,
        version: str | None,
        begin: float | None,
    ) -> None:
        owner = None if user_id is None else user_uuid(user_id)
        kept = copy.deepcopy(dict(values))
        with self._lock:
            end = self.now()
            begun = end if begin is None else begin
            self._outside.append(OutsideChange(kind, table, id, kept, owner, version, begun, end))
