"""History and observation brought together: where each transaction stands, what it did to rows.

`Facts` answers the questions that the rules ask. The order in which effects reached the server is
known in part only; `before` says yes when it is certain, so a rule that needs certainty finds less
than there is, never more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

from local_store import TableSpec
from local_store.ops import Kind, LogEntry, Row, WireOp
from syncer.testkit.history_events import Events, Forgotten, Seen, Told
from syncer.testkit.history_observation import Key, LedgerRow, Observation, ParkedRecord

Happened = Literal["yes", "maybe", "no"]
"""Whether a change took effect on the server: it must show, it may show, it must not show."""

UNTOLD = float("inf")  # the end of a call whose client never learned the outcome


@dataclass(frozen=True, slots=True)
class Transaction:
    """All calls with one txn_id, and what became of it.

    `positions` maps each log that holds it to its seq. `state` is `absent` when neither ledger nor
    buffer nor parked work nor quarantine knows it. `versions` is the ledger's. `shown`: the
    versions of rows that a person saw who decided about it; None when nobody told of a decision.
    `written` is what it was to do before they did.
    """

    txn_id: str
    user_id: str
    told: Told
    ops: tuple[WireOp, ...]
    begin: float
    end: float
    positions: Mapping[str, int]
    state: str
    happened: Happened
    versions: Mapping[str, str | None]
    shown: Mapping[str, str] | None = None
    written: tuple[WireOp, ...] = ()

    @property
    def rows(self) -> tuple[Key, ...]:
        """The rows that its ops name, each once."""
        return tuple(dict.fromkeys((op.table, op.id) for op in self.ops))

    @property
    def rows_ever(self) -> tuple[Key, ...]:
        """The rows that its ops name or named before somebody decided about it."""
        return tuple(dict.fromkeys((op.table, op.id) for op in (*self.written, *self.ops)))


@dataclass(frozen=True, slots=True)
class Effect:
    """One change of one row. `txn` is None for a change from outside, `version` when unknown.

    `via` is the deleted row when this row went because its parent, or the parent's, was deleted.
    """

    key: Key
    kind: Kind
    values: Row
    user_id: str | None
    begin: float
    end: float
    happened: Happened
    index: int
    txn: Transaction | None = None
    version: str | None = None
    via: Key | None = None

    @property
    def name(self) -> str:
        """How a finding calls it."""
        return "a change from outside" if self.txn is None else f"transaction {self.txn.txn_id}"


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the rules look at. `strange_rows` were written by transactions nobody recorded."""

    specs: Mapping[str, TableSpec]
    observation: Observation
    events: Events
    transactions: Mapping[str, Transaction]
    ledger: Mapping[str, Sequence[LedgerRow]]
    entries: Mapping[str, Sequence[tuple[str, LogEntry]]]
    effects: Mapping[Key, Sequence[Effect]]
    records: Mapping[Key, Sequence[ParkedRecord]]
    strange_rows: frozenset[Key]
    lives: dict[Key, bool] = field(default_factory=dict, compare=False)  # memory of one_life
    reads_recorded: bool = False
    cascades_recorded: bool = False

    def on(self, key: Key, *happened: Happened) -> list[Effect]:
        """Return the effects on a row that happened, or may have."""
        return [effect for effect in self.effects.get(key, ()) if effect.happened in happened]

    def one_life(self, key: Key) -> bool:
        """True when the row was born at most once, so its versions only grow."""
        if key not in self.lives:
            changes = self.on(key, "yes", "maybe")
            births = [change for change in changes if change.kind == "insert"]
            reborn = any(
                change.kind == "delete" and _before_in_log(change, birth) is True
                for birth in births
                for change in changes
            )
            self.lives[key] = len(births) <= 1 and not reborn
        return self.lives[key]

    def before(self, one: Effect, other: Effect) -> bool:
        """True when `one` certainly took effect on the server before `other`, on the same row."""
        in_log = _before_in_log(one, other)
        if in_log is not None:
            return in_log
        if one.txn is None and one.end < other.begin:
            return True  # nothing of the other had begun when this one was there
        if not all(self.one_life(key) for key in (one.key, one.via, other.via) if key):
            return False
        if _stage(one) != _stage(other):
            return _stage(one) < _stage(other)
        order = compare_versions(one.version, other.version)
        return order is not None and order < 0

    def decided_by_person(self, txn: Transaction | None) -> bool:
        """True when somebody had this transaction in hand."""
        return txn is not None and txn.txn_id in self.events.people

    def unsaid(self, txn: Transaction | None) -> bool:
        """True when a person did something with it, and nobody recorded what came of that."""
        actions = self.events.people.get(txn.txn_id, ()) if txn is not None else ()
        return txn is not None and txn.shown is None and bool(set(actions) - {"discard"})

    def settled_by_record(self, key: Key, column: str | None = None) -> bool:
        """True when a recorded outcome, not the ops themselves, says what stands in the row."""
        return any(
            record.outcome != "manual"
            and (column is None or record.columns is None or column in record.columns)
            for record in self.records.get(key, ())
        ) or any(self.unsaid(effect.txn) for effect in self.effects.get(key, ()))

    def seen_by(self, txn: Transaction, key: Key) -> Iterator[Seen]:
        """Yield what the logs of a transaction had taken over of a row before it was accepted."""
        for seen in self.events.seen:
            is_there = (seen.table, seen.id) == key and seen.log_id in txn.positions
            if not is_there or seen.at > txn.end:
                continue
            if not any(_took(loss, seen, txn) for loss in self.events.forgotten):
                yield seen


def _took(loss: Forgotten, seen: Seen, txn: Transaction) -> bool:
    """True when a power loss came between what was seen and a transaction."""
    is_of_log = loss.log_id == seen.log_id
    return is_of_log and loss.since <= seen.at < loss.at <= txn.begin


def by_log(one: Transaction, other: Transaction) -> int | None:
    """Compare two transactions by seq when a log holds both: negative, positive, None unknown."""
    for log_id, seq in one.positions.items():
        if log_id in other.positions:
            return seq - other.positions[log_id]
    return None


def related(one: Transaction, other: Transaction) -> bool:
    """True when they are the same or went through a common log, which knows them both."""
    return one is other or bool(one.positions.keys() & other.positions.keys())


def foreign(one: Effect, txn: Transaction) -> bool:
    """True when a change came past every log that holds `txn`."""
    return one.txn is None or not related(one.txn, txn)


def compare_versions(one: str | None, other: str | None) -> int | None:
    """Order two server versions, as moments or integers; None when that is impossible."""
    if one is None or other is None:
        return None
    mine, theirs = _parsed(one), _parsed(other)
    if isinstance(mine, datetime) and isinstance(theirs, datetime):
        return (mine > theirs) - (mine < theirs)
    if isinstance(mine, int) and isinstance(theirs, int):
        return (mine > theirs) - (mine < theirs)
    return None


@lru_cache(maxsize=10_000)  # 3 MB; long histories compare the same few versions over and over
def _parsed(version: str) -> datetime | int | None:
    """Read a version as an aware moment or an integer; None when it is neither."""
    with suppress(ValueError):
        return int(version)
    with suppress(ValueError):
        moment = datetime.fromisoformat(version)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None


def key_name(key: Key) -> str:
    """Return `table/id`."""
    return "/".join(key)


def _before_in_log(one: Effect, other: Effect) -> bool | None:
    """Order two effects by the log that holds both; None when there is none."""
    if one.txn is None or other.txn is None:
        return None
    if one.txn is other.txn:
        return one.index < other.index
    order = by_log(one.txn, other.txn)
    return None if order is None else order < 0


def _stage(effect: Effect) -> int:
    return {"insert": 0, "update": 1, "delete": 2}[effect.kind]


def value_differs(spec: TableSpec, column: str, mine: Any, theirs: Any) -> bool:
    """Compare as the column's values: the server writes timestamps in its own form."""
    rule = spec.columns.get(column)
    if rule is not None and isinstance(mine, str) and isinstance(theirs, str):
        if rule.type == "timestamp":
            with suppress(ValueError, TypeError):  # what isn't a moment is compared as text
                apart = datetime.fromisoformat(mine) - datetime.fromisoformat(theirs)
                return abs(apart.total_seconds()) > 1e-6  # Postgres rounds below a microsecond
        if rule.type == "uuid":
            return mine.lower() != theirs.lower()
    return bool(mine != theirs)
