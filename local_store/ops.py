"""The vocabulary of a write: tables, row changes, transactions, receipts. Values only."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
ColumnType = Literal["text", "int", "float", "bool", "timestamp", "uuid", "json", "text[]"]
Policy = Literal["merge", "remote_wins", "local_wins", "manual"]
Kind = Literal["insert", "update", "delete"]
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
    written from here. `json_merge`, `policy` and `on_delete` say how conflicts end.
    """

    name: str
    columns: Mapping[str, Column]
    key: str = "id"
    owner: str = "user_id"
    version: str = "updated_at"
    parent: tuple[str, str] | None = None
    server_owned: frozenset[str] = frozenset()
    json_merge: frozenset[str] = frozenset()
    policy: Policy | Mapping[str, Policy] | Callable[..., Row] = "merge"
    on_delete: str = "keep_remote"
    schema_version: int = 1
    upcasts: Mapping[int, Callable[[Row], Row]] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class Receipt:
    """The acknowledgement of one transaction.

    `durability` names what it survives: `host` a power loss of this machine, `container` the loss
    of this container, `remote` the server has it. `accepted_at` is ISO 8601, UTC, microseconds.
    """

    txn_id: str
    seq: int
    durability: Durability
    accepted_at: str


@dataclass(frozen=True, slots=True)
class WireOp:
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one transaction on the server, as the op log records it.

    `versions` maps `table/id` to the server's new version (None: the row is gone).
    `retry_after_s` delays the next attempt of a held one. `reply` keeps the server's evidence.
    """

    txn_id: str
    state: TransactionState
    versions: Mapping[str, str | None] = field(default_factory=dict)
    reply: Mapping[str, Any] | None = None
    retry_after_s: float = 0.0


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
