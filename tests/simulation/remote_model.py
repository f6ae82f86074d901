"""A model of the server: the batch RPC's rules in plain Python, for histories by the thousand.

It is the second real implementation of `Remote`. It speaks the wire protocol, keeps rows, ledger
and logs in dictionaries, and knows nothing of SQL, so that it can be wrong only in its own ways:
tests/contract compares it with the real RPC. Part of the rules, in the order they apply:

    ledger hit → duplicate (or rejected for another author or digest)
    seq taken → rejected     after unmet → held     stale base → conflict     effect → applied
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from local_store.ops import Row, TableSpec
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.core.wire import CHAINED, decode_verdicts, encode_batch
from syncer.errors import ProtocolMismatch, SyncError
from syncer.remote import TableRead

START = datetime(2026, 1, 1, tzinfo=UTC)
Key = tuple[str, str]


@dataclass(slots=True)
class ServerRow:
    """One row as the server holds it."""

    user_id: str
    values: Row
    version: str


@dataclass(slots=True)
class LedgerEntry:
    """What the server remembers of an applied transaction."""

    log_id: str
    seq: int
    user_id: str
    digest: str
    versions: dict[str, str | None]


class Refusal(Exception):
    """One op can't take effect; carries the verdict that follows."""

    def __init__(
        self, verdict: str, op: int | None = None, sqlstate: str | None = None, **more: Any
    ) -> None:
        super().__init__(verdict)
        self.item = {"verdict": verdict, "op": op, "sqlstate": sqlstate, **more}


@dataclass(slots=True)
class RemoteModel:
    """The simulated server. `before_call` and `after_commit` are where a test injects faults."""

    tables: Mapping[str, TableSpec]
    rows: dict[Key, ServerRow] = field(default_factory=dict)
    ledger: dict[str, LedgerEntry] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    before_call: Callable[[], None] = lambda: None
    after_commit: Callable[[], None] = lambda: None
    remembers: bool = True
    _ticks: int = 0

    # -- Remote --

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch; a fault injected after the commit loses the reply only."""
        self.calls += 1
        self.before_call()
        reply = self.apply(encode_batch(batch))
        self.after_commit()
        return decode_verdicts(batch, reply)

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read as the user: other users' rows are absent."""
        self.before_call()
        return [
            [
                self._shown(key, row)
                for key, row in sorted(self.rows.items())
                if key[0] == read.table
                and row.user_id == user_id
                and read.where.items() <= self._shown(key, row).items()
            ][: read.limit]
            for read in reads
        ]

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Answer as `sync_audit_v1` does."""
        self.before_call()
        logs = [
            {
                "log_id": name,
                "acknowledged_seq": acknowledged,
                "ledger": sum(e.log_id == name for e in self.ledger.values()),
                "duplicated": 0,
            }
            for name, acknowledged in self.logs.items()
            if log_id in (None, name)
        ]
        if log_id is None:
            return {"logs": logs}
        entries = sorted(
            (entry.seq, txn_id, entry)
            for txn_id, entry in self.ledger.items()
            if entry.log_id == log_id and entry.seq > after_seq
        )
        return {
            "logs": logs,
            "entries": [
                {"seq": seq, "txn_id": txn_id, "digest": entry.digest, "verdict": "applied"}
                for seq, txn_id, entry in entries[:limit]
            ],
        }

    # -- the RPC --

    def apply(self, p_batch: Row) -> Row:
        """Apply a batch as one database transaction: a protocol error leaves no trace of it."""
        saved = (copy.deepcopy(self.rows), dict(self.ledger), dict(self.logs))
        log_id = p_batch["log_id"]
        self.logs[log_id] = max(self.logs.get(log_id, 0), p_batch["acknowledged_seq"])
        chain: dict[str, str | None] = {}
        try:
            verdicts = [self._one(log_id, item, chain) for item in p_batch["transactions"]]
        except SyncError:
            self.rows, self.ledger, self.logs = saved
            raise
        return {"verdicts": verdicts}

    def _one(self, log_id: str, item: Row, chain: dict[str, str | None]) -> Row:
        told = {
            "txn_id": item["txn_id"],
            "versions": {},
            "rows": {},
            "blocked_by": None,
            "op": None,
            "sqlstate": None,
            "message": None,
        }
        known = self.ledger.get(item["txn_id"])
        if known is not None:
            if known.user_id != item["user_id"]:
                return {**told, "verdict": "rejected", "sqlstate": "42501"}
            if known.digest != item["digest"]:
                return {**told, "verdict": "rejected", "sqlstate": "SYT01"}
            chain.update(known.versions)
            rows = {key: self._seen(key, item["user_id"]) for key in known.versions}
            return {**told, "verdict": "duplicate", "versions": known.versions, "rows": rows}
        taken = {(entry.log_id, entry.seq) for entry in self.ledger.values()}
        if (log_id, item["seq"]) in taken:
            return {**told, "verdict": "rejected", "sqlstate": "SYT02"}
        for predecessor in item["after"]:
            found = self.ledger.get(predecessor)
            if found is None or found.user_id != item["user_id"]:
                return {**told, "verdict": "held", "blocked_by": predecessor}
            for key, version in found.versions.items():
                chain.setdefault(key, version)
        saved = copy.deepcopy(self.rows)
        try:
            versions = self._effects(item, chain)
        except Refusal as refusal:
            self.rows = saved
            return {**told, **refusal.item}
        chain.update(versions)
        if self.remembers:
            self.ledger[item["txn_id"]] = LedgerEntry(
                log_id, item["seq"], item["user_id"], item["digest"], versions
            )
        return {**told, "verdict": "applied", "versions": versions}

    def _effects(self, item: Row, chain: Mapping[str, str | None]) -> dict[str, str | None]:
        self._check_bases(item, chain)
        for index, op in enumerate(item["ops"]):
            row = self.rows.get((op["table"], op["id"]))
            if op["kind"] == "insert":
                self._insert(index, op, item["user_id"])
            elif row is None and op["kind"] == "delete":
                continue  # a delete of its parent in this transaction took it along
            elif row is None or row.user_id != item["user_id"]:
                raise Refusal("rejected", index, "42501", message="not the author's")
            elif op["kind"] == "update":
                self._check(index, op)
                self._update(op, row)
            else:
                self._delete((op["table"], op["id"]))
        keys = [(op["table"], op["id"]) for op in item["ops"]]
        return {"/".join(key): self.version(*key) for key in keys}

    def _check_bases(self, item: Row, chain: Mapping[str, str | None]) -> None:
        """Conflict outranks every other refusal, so all bases are checked before any effect."""
        made_here: set[Key] = set()
        stale: dict[str, Row | None] = {}
        hidden = False
        for op in item["ops"]:
            key, name = (op["table"], op["id"]), f"{op['table']}/{op['id']}"
            if key in made_here:
                continue
            made_here.add(key)
            row = self.rows.get(key)
            if not self._is_stale(op, name, row, chain):
                continue
            if row is not None and row.user_id != item["user_id"]:
                hidden = True
            else:
                stale[name] = None if row is None else self._shown(key, row)
        if stale:
            raise Refusal("conflict", rows=stale)
        if hidden:
            raise Refusal("rejected", sqlstate="42501", message="not the author's")

    @staticmethod
    def _is_stale(
        op: Row, name: str, row: ServerRow | None, chain: Mapping[str, str | None]
    ) -> bool:
        if op["kind"] == "insert":
            return row is not None
        base = op.get("base")
        if base == CHAINED:
            if name not in chain:
                raise ProtocolMismatch(f"chained without a predecessor: {name}")
            base = chain[name]
        elif base is None:
            raise ProtocolMismatch(f"an op without a base: {name}")
        return row is None or row.version != base

    def _insert(self, index: int, op: Row, user_id: str) -> None:
        spec = self.tables[op["table"]]
        self._check(index, op)
        if (op["table"], op["id"]) in self.rows:
            raise Refusal("rejected", index, "23505", message="the id is taken")
        if spec.parent is not None:
            parent = self.rows.get((spec.parent[1], op["values"].get(spec.parent[0])))
            if parent is None or parent.user_id != user_id:
                raise Refusal("held", index, "23503", message="no such parent")
        self.rows[op["table"], op["id"]] = ServerRow(user_id, dict(op["values"]), self._tick())

    def _update(self, op: Row, row: ServerRow) -> None:
        if not op["values"].items() <= row.values.items():
            row.values = {**row.values, **op["values"]}
            row.version = self._tick()

    def _delete(self, key: Key) -> None:
        del self.rows[key]
        for name, spec in self.tables.items():
            if spec.parent is None or spec.parent[1] != key[0]:
                continue
            column = spec.parent[0]
            children = [
                child
                for child, row in self.rows.items()
                if child[0] == name and row.values.get(column) == key[1]
            ]
            for child in children:
                self._delete(child)

    def _check(self, index: int, op: Row) -> None:
        """Stand for the table's constraints; a value that says it is poison is refused too."""
        spec = self.tables[op["table"]]
        for column, value in op["values"].items():
            rule = spec.columns[column]
            if value is None and not rule.nullable:
                raise Refusal("rejected", index, "23502", message="null in a required column")
        for column, value in op["values"].items():
            enum = spec.columns[column].enum
            if value == "poison" or (enum is not None and value not in enum):
                raise Refusal("rejected", index, "23514", message="violates a check constraint")

    # -- for tests --

    def edit(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row, if it is there, as somebody with SQL would: the version moves."""
        row = self.rows.get((table, row_id))
        if row is None:
            return
        row.values = {**row.values, **values}
        row.version = self._tick()

    def version(self, table: str, row_id: str) -> str | None:
        """Return a row's version, None when there is none."""
        row = self.rows.get((table, row_id))
        return None if row is None else row.version

    def _tick(self) -> str:
        self._ticks += 1
        return (START + timedelta(microseconds=self._ticks)).isoformat(timespec="microseconds")

    def _shown(self, key: Key, row: ServerRow) -> Row:
        spec = self.tables[key[0]]
        return {
            **row.values,
            spec.key: key[1],
            spec.owner: row.user_id,
            spec.version: row.version,
        }

    def _seen(self, name: str, user_id: str) -> Row | None:
        table, row_id = name.split("/", 1)
        row = self.rows.get((table, row_id))
        return None if row is None or row.user_id != user_id else self._shown((table, row_id), row)
