"""Random batches in symbols: one description that any server can be asked, versions left open.

Two servers give different version strings, so a base is written down as "the n-th version of this
row" and filled in from what the asked server itself produced. Everything else is literal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from local_store.ops import Row, WireOp
from syncer.errors import ProtocolMismatch

ACCEPTED_AT = "2026-01-01T00:00:00.000000+00:00"


class Server(Protocol):
    """A thing that answers the batch RPC."""

    def apply(self, p_batch: Row) -> Row:
        """Answer one batch."""
        ...

    def take(self, p: Row) -> Row:
        """Answer one call of the parking RPC."""
        ...

    def retry(self, txn_ids: Sequence[str]) -> list[Row]:
        """Try parked transactions again."""
        ...

    def discard(self, txn_ids: Sequence[str]) -> list[Row]:
        """Give parked transactions up."""
        ...

    def edit_parked(
        self, txn_id: str, values: Mapping[str, Row], new_txn_id: str, digest: str
    ) -> list[Row]:
        """Replace a parked transaction by one with other values of some rows (`table/id`)."""
        ...

    def resolve(self, txn_id: str, name: str, choice: Any, **edited: Any) -> list[Row]:
        """Decide a conflict record of a row, and the others of its transaction."""
        ...

    def edit(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row from outside."""
        ...

    def version(self, table: str, row_id: str) -> str | None:
        """Return a row's version, None when there is none."""
        ...

    def row(self, table: str, row_id: str) -> Row | None:
        """Return a row, None when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Base:
    """The base of an op: the `index`-th version the row ever had, or a literal word."""

    index: int | None = None
    literal: str | None = None


@dataclass(frozen=True, slots=True)
class SymbolicOp:
    """An op whose base is still a symbol."""

    op: WireOp
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class SymbolicTransaction:
    """A transaction of symbolic ops."""

    txn_id: str
    seq: int
    user_id: str
    digest: str
    ops: tuple[SymbolicOp, ...]
    after: tuple[str, ...] = ()
    met: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One batch of one log."""

    log_id: str
    transactions: tuple[SymbolicTransaction, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """A change from outside between two batches."""

    table: str
    row_id: str
    values: Row


@dataclass(frozen=True, slots=True)
class Parking:
    """A container hands a transaction over."""

    log_id: str
    transaction: SymbolicTransaction
    state: str
    columns: tuple[tuple[str, ...], ...] = ()
    """By op, the columns that its conflict record names; none: no record."""
    through: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A person decides about a transaction, whether it is parked or not."""

    action: Literal["retry", "discard", "edit", "mine", "theirs", "edited"]
    txn_id: str
    name: str = ""
    """The row that is decided about."""
    values: Row = field(default_factory=dict)
    """By row, what a person writes instead."""
    new_txn_id: str = ""


Step = Call | Parking | Edit | Decision


@dataclass
class Asked:
    """One server being asked: fills in versions and remembers those it produced."""

    server: Server
    history: dict[str, list[str | None]] = field(default_factory=dict)

    def call(self, call: Call) -> list[Row]:
        """Send a batch; returns its verdicts."""
        sent = {
            "protocol": 1,
            "log_id": call.log_id,
            "acknowledged_seq": max(t.seq for t in call.transactions),
            "transactions": [self._fill(t) for t in call.transactions],
        }
        verdicts = self.server.apply(sent)["verdicts"]
        for verdict in verdicts:
            if verdict["verdict"] == "applied":
                for key, version in verdict["versions"].items():
                    self._remember(key, version)
        return verdicts

    def park(self, parking: Parking) -> list[Row]:
        """Park a transaction; returns its verdict."""
        transaction = self._fill(parking.transaction)
        park = {
            "transaction": {
                **transaction,
                "before": [self._before(op) for op in transaction["ops"]],
            },
            "state": parking.state,
            "blocked_by": next(iter(parking.transaction.after), None),
            "records": list(self._records(parking, transaction["ops"])),
        }
        asked = {"log_id": parking.log_id, "acknowledged_seq": 0, "parks": [park]}
        return self.server.take(asked)["verdicts"]

    def _records(self, parking: Parking, ops: Sequence[Row]) -> Iterator[Row]:
        """Yield what a container that met the rows just now would have recorded."""
        for op, columns in zip(ops, parking.columns, strict=False):
            if not columns:
                continue
            row = self.server.row(op["table"], op["id"])
            yield {
                "table": op["table"],
                "id": op["id"],
                "columns": list(columns),
                "mine": {name: _part_of(op["values"], name) for name in columns},
                "theirs": row and {name: _part_of(row, name) for name in columns},
                "theirs_version": self.server.version(op["table"], op["id"]),
                "policy": "merge",
                "outcome": "manual",
                "through": parking.through,
            }

    def _before(self, op: Row) -> Row | None:
        """Return what an op replaces, as if its author had read the row just now."""
        row = None if op["kind"] == "insert" else self.server.row(op["table"], op["id"])
        return row and {column: row[column] for column in op["values"]}

    def decide(self, decision: Decision) -> list[Row]:
        """Decide as a person does; returns the results, none where there is nothing to decide."""
        try:
            results = self._decided(decision)
        except ProtocolMismatch:
            return []
        for result in results:
            for key in result["versions"] if result["verdict"] == "applied" else ():
                self._remember(key, self.server.version(*key.split("/", 1)))
        return results

    def _decided(self, decision: Decision) -> list[Row]:
        txn_id, digest = decision.txn_id, hashlib.sha256(decision.new_txn_id.encode()).hexdigest()
        if decision.action in ("retry", "discard"):
            return getattr(self.server, decision.action)([txn_id])
        if decision.action == "edit":
            return self.server.edit_parked(txn_id, decision.values, decision.new_txn_id, digest)
        more: Row = {}
        if decision.action == "edited":
            more = {
                "row": decision.values[decision.name],
                "new_txn_id": decision.new_txn_id,
                "digest": digest,
            }
        return self.server.resolve(txn_id, decision.name, decision.action, **more)

    def edit(self, edit: Edit) -> None:
        """Change a row from outside and remember its new version."""
        self.server.edit(edit.table, edit.row_id, **edit.values)
        key = f"{edit.table}/{edit.row_id}"
        self._remember(key, self.server.version(edit.table, edit.row_id))

    def _remember(self, key: str, version: str | None) -> None:
        seen = self.history.setdefault(key, [])
        if not seen or seen[-1] != version:
            seen.append(version)

    def _fill(self, transaction: SymbolicTransaction) -> Row:
        ops = []
        for symbolic in transaction.ops:
            op = symbolic.op.to_json()
            if symbolic.base is not None:
                op["base"] = self._base(symbolic)
            ops.append(op)
        return {
            "txn_id": transaction.txn_id,
            "seq": transaction.seq,
            "user_id": transaction.user_id,
            "digest": transaction.digest,
            "accepted_at": ACCEPTED_AT,
            "after": list(transaction.after),
            "met": transaction.met,
            "replaces": None,
            "ops": ops,
        }

    def _base(self, symbolic: SymbolicOp) -> str | None:
        assert symbolic.base is not None
        if symbolic.base.literal is not None:
            return symbolic.base.literal
        seen = self.history.get(f"{symbolic.op.table}/{symbolic.op.id}") or [None]
        version = seen[min(symbolic.base.index or 0, len(seen) - 1)]
        return version or "2001-01-01T00:00:00+00:00"


def key_of(symbolic: SymbolicOp) -> str:
    """Return `table/id` of the row that an op changes."""
    return f"{symbolic.op.table}/{symbolic.op.id}"


def _part_of(row: Row, name: str) -> Any:
    """Return a column, or a key of a document, as records name them."""
    column, _, key = name.partition(".")
    found = row.get(column)
    return (found or {}).get(key) if key else found
