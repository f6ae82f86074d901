"""The vocabulary of a write: tables, row changes, transactions, receipts. Values only.

What each write makes one of is a named tuple: a frozen dataclass costs five times as much to make.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]
ColumnType = Literal["text", "int", "float", "bool", "timestamp", "uuid", "json", "text[]"]
Policy = Literal["merge", "remote_wins", "local_wins", "manual"]
Kind = Literal["insert", "update", "delete"]
OnDelete = Literal["keep_remote", "delete", "manual"]
Durability = Literal["host", "container", "remote"]
TransactionState = Literal[
    "pending", "applied", "held", "conflict", "dead", "discarded", "superseded"
]

UNSETTLED: tuple[TransactionState, ...] = ("pending", "held")
"""States the flusher still has to deliver."""
SETTLED: tuple[TransactionState, ...] = ("applied", "discarded", "superseded")
"""States that are final: their rows are no longer pending because of them."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what the door checks before a value is accepted.

    `max_bytes` bounds the value's UTF-8 JSON; None leaves only the bound on the whole op.
    """

    type: ColumnType
    nullable: bool = True
    enum: tuple[str, ...] | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One synchronised table, as it stands on the server.

    `key`, `owner` and `version` name the columns of identity, author and optimistic concurrency;
    `parent` is (column, table) of the row this one hangs on. `server_owned` columns are never
    written from here.

    How conflicts end: `policy` decides a column that both sides changed to different values: merge
    (a person, the default), remote_wins, local_wins, manual, or a callable that gets a RowConflict
    and returns columns or a Resolution; one for the table, or a dict by column. `json_merge` names
    JSON columns that are merged by key. `on_delete` says what becomes of a delete that meets a
    change: keep_remote, delete or manual.
    """

    name: str
    columns: Mapping[str, Column]
    key: str = "id"
    owner: str = "user_id"
    version: str = "updated_at"
    parent: tuple[str, str] | None = None
    server_owned: frozenset[str] = frozenset()
    json_merge: frozenset[str] = frozenset()
    policy: Policy | Callable[..., Any] | Mapping[str, Policy | Callable[..., Any]] = "merge"
    on_delete: OnDelete = "keep_remote"
    schema_version: int = 1
    upcasts: Mapping[int, Callable[[Row], Row]] = field(default_factory=dict)
    rules: Mapping[str, Column] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        written = {name: rule for name, rule in self.columns.items() if self.writable(name)}
        object.__setattr__(self, "rules", written)  # looked up for each value of each write

    def writable(self, column: str) -> bool:
        """Tell whether a caller may give `column` a value."""
        return (
            column in self.columns
            and column not in self.server_owned
            and column not in (self.key, self.owner, self.version)
        )


@dataclass(frozen=True, slots=True)
class Insert:
    """A new row. A missing key gets a fresh UUIDv7; the owner is always the author."""

    table: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Update:
    """New values for some columns of one row. JSON columns are replaced, never patched."""

    table: str
    id: str
    changes: Mapping[str, Any]
    expected_version: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """The end of one row and, by rule, of its children."""

    table: str
    id: str
    expected_version: int | None = None


Op = Insert | Update | Delete


class Receipt(NamedTuple):
    """The acknowledgement of one transaction.

    `durability` names what it survives: `host` a power loss of this machine, `container` the loss
    of this container, `remote` the server has it. `accepted_at` is ISO 8601, UTC, microseconds.
    """

    txn_id: str
    seq: int
    durability: Durability
    accepted_at: str


class WireOp(NamedTuple):
    """One op as it is stored and sent: JSON values only, key and owner taken out of `values`."""

    table: str
    kind: Kind
    id: str
    values: Row

    def to_json(self) -> Row:
        """Return the object that goes over the wire, still without a base."""
        return {"table": self.table, "kind": self.kind, "id": self.id, "values": self.values}


@dataclass(frozen=True, slots=True)
class PendingTransaction:
    """A transaction that the server has not confirmed, with what is needed to send it.

    `bases` holds per op the server version its row had when it was last clean, None for an insert,
    a never synced row, or a row with an unsettled predecessor (`chained`, parallel to `ops`).
    `after` names the nearest unsettled predecessors on the same rows or on their parents.
    `before` and `children` are per op: what it replaced, and for a delete the children its author
    knew, as {`table/id`: version, or None while the author's own change of it was under way}.
    `met` is by `table/id` the version that a merge last put the row's pending changes on, None
    where none did: what is `chained` follows only a change with the same.
    `position` orders all transactions of the buffer, `seq` those of `log_id`.
    """

    seq: int
    txn_id: str
    user_id: str
    digest: str
    accepted_at: str
    ops: tuple[WireOp, ...]
    bases: tuple[str | None, ...]
    chained: tuple[bool, ...]
    after: tuple[str, ...]
    size_bytes: int
    attempts: int
    position: int
    log_id: str
    before: tuple[Row | None, ...]
    children: tuple[Mapping[str, str | None] | None, ...]
    met: Mapping[str, str | None] = field(default_factory=dict)
    records: tuple[Row, ...] = ()
    parked: bool = False
    held_since: str | None = None


@dataclass(frozen=True, slots=True)
class DueWork:
    """What is sent next: transactions of one log, by position, and how far that log has come.

    All of one moment: an `acknowledged_seq` beyond what was acknowledged would look like a loss.
    """

    log_id: str
    acknowledged_seq: int
    transactions: tuple[PendingTransaction, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """Narrows to some transactions: accepted in [since, until), ISO 8601 in UTC with microseconds;
    with an op on `table`; by `user_id`. None doesn't narrow.
    """

    since: str | None = None
    until: str | None = None
    table: str | None = None
    user_id: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one transaction on the server, as the op log records it.

    `versions` maps `table/id` to the server's new version (None: the row is gone). `rows` are rows
    as they stand there, for a transaction that came to nothing. `learned` are columns that the
    author left to the server's defaults, or whole rows as they stand there; `defaults` are those
    columns as they were at once. `retry_after_s` delays
    the next attempt of a held one, and the next question about a parked one. `reply` keeps the
    server's evidence; None leaves what was kept before. `parked` says that the server has taken it
    over; dead and conflict are recorded only then. `doubted` rows are those that another container
    merged or left out when it delivered the transaction: what follows here didn't see that.
    """

    txn_id: str
    state: TransactionState
    versions: Mapping[str, str | None] = field(default_factory=dict)
    reply: Mapping[str, Any] | None = None
    retry_after_s: float = 0.0
    rows: Mapping[str, Row | None] = field(default_factory=dict)
    learned: Mapping[str, Row | None] = field(default_factory=dict)
    defaults: Mapping[str, Row] = field(default_factory=dict)
    parked: bool = False
    doubted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredTransaction:
    """An unsettled transaction with all that a merge needs, in the order of the buffer.

    `before` holds per op the values it replaced (None for an insert, the whole row for a delete).
    `records` are the conflict records that go to the server with it. `parked` ones are kept by the
    server, which alone decides about them: they are shown here, and never rewritten.
    """

    txn_id: str
    position: int
    user_id: str
    ops: tuple[WireOp, ...]
    before: tuple[Row | None, ...]
    records: tuple[Row, ...] = ()
    parked: bool = False


@dataclass(frozen=True, slots=True)
class Chains:
    """The unsettled transactions that touch some rows, and a token for the moment of reading."""

    token: int
    transactions: tuple[StoredTransaction, ...]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What a merge made of a transaction: it replaces ops, before images and records as a whole.

    `ops` may be empty: the transaction is still sent and still applied. The digest stays.
    """

    txn_id: str
    ops: tuple[WireOp, ...]
    before: tuple[Row | None, ...]
    records: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RowConflict:
    """What a policy callable is asked: one op of mine met a row that somebody else changed.

    `base` and `mine` hold the columns that the op sets, before and after it; `theirs` is the whole
    row as it will stand without this op, server-owned columns included; `columns` are those that
    both sides changed to different values. `siblings` are all ops of the same transaction.
    """

    table: str
    id: str
    base: Row
    mine: Row
    theirs: Row
    columns: frozenset[str]
    siblings: tuple[WireOp, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolution:
    """A policy callable's answer; a plain dict of `values` does as well.

    `values` are written for columns in conflict (a column left out stays theirs). `siblings` gives
    new values, by index, to other ops of the transaction. `derived` are server-owned columns as
    they will follow from that, for later ops of the chain. `surfaced=False` leaves no record: for
    bookkeeping columns only.
    """

    values: Row
    siblings: Mapping[int, Row] = field(default_factory=dict)
    derived: Row = field(default_factory=dict)
    surfaced: bool = True


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the op log without its ops: what an audit compares."""

    seq: int
    txn_id: str
    user_id: str
    digest: str
    state: TransactionState


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A clean local row, for comparing with the server's. `deleted` rows must be absent there."""

    table: str
    id: str
    user_id: str
    values: Row
    base: str | None
    deleted: bool


@lru_cache(maxsize=4_096)  # a handful of authors write most; a uuid5 costs 7 µs
def user_uuid(user_id: str) -> str:
    """Map any user id to the uuid the server knows: a UUID as it is, else a stable uuid5."""
    try:
        return str(uuid.UUID(user_id))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "syncer:user:" + user_id))


def by_name(tables: Sequence[TableSpec]) -> dict[str, TableSpec]:
    """Index specs by table name; refuses doubles and parents that are not registered."""
    index = {spec.name: spec for spec in tables}
    if len(index) != len(tables):
        raise ValueError("tables: two TableSpecs share a name; register each table once")
    for spec in tables:
        if spec.parent is not None and spec.parent[1] not in index:
            raise ValueError(f"{spec.name}.parent: table {spec.parent[1]!r} isn't registered too")
    return index
