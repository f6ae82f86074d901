"""A model of the server: the batch RPC's rules in plain Python, for histories by the thousand.

It is the second real implementation of `Remote`. It speaks the wire protocol, keeps rows, ledger
and logs in dictionaries, and knows nothing of SQL, so that it can be wrong only in its own ways:
tests/contract compares it with the real RPC. The rules, in the order they apply:

    ledger hit → duplicate (or rejected for another author or digest)     parked → parked
    seq taken → rejected       after unmet → held      stale base, or a deleted row → conflict
    no such row → held         effect → applied
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from local_store.ops import Row
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.core.wire import (
    CHAINED,
    Park,
    decode_parked,
    decode_verdicts,
    encode_batch,
    encode_parks,
)
from syncer.errors import ProtocolMismatch, SyncError
from syncer.remote import SeqRange, TableRead
from tests.simulation.model_audit import answered_audit, answered_settled
from tests.simulation.model_entries import LedgerEntry, ParkedEntry, is_open
from tests.simulation.model_rows import Key, ModelRows, Refusal, ServerRow, answered

Link = tuple[str | None, str | None]
"""What a chain says of a row: its version, and what a merge had met before that (013)."""

RecordKey = tuple[str, str, str, str]
"""Transaction, table, row, outcome."""

NEVER = object()
"""The base of a row that only a parked insert would have made."""


@dataclass(slots=True)
class RemoteModel(ModelRows):
    """The simulated server. `before_call` and `after_commit` are where a test injects faults."""

    ledger: dict[str, LedgerEntry] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    parked: dict[str, ParkedEntry] = field(default_factory=dict)
    records: dict[RecordKey, Row] = field(default_factory=dict)
    decided: list[tuple[RecordKey, Row]] = field(default_factory=list)
    aliases: dict[tuple[str, int], str] = field(default_factory=dict)
    calls: int = 0
    before_call: Callable[[], None] = lambda: None
    after_commit: Callable[[], None] = lambda: None
    remembers: bool = True

    # -- Remote --

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch; a fault injected after the commit loses the reply only."""
        self.calls += 1
        self.before_call()
        reply = self.apply(encode_batch(batch))
        self.after_commit()
        return decode_verdicts(batch, reply)

    def park(
        self, log_id: str, acknowledged_seq: int, parks: Sequence[Park]
    ) -> tuple[Verdict, ...]:
        """Take over what is refused, in conflict or waiting; a lost reply loses the reply only."""
        self.calls += 1
        self.before_call()
        reply = self.take(encode_parks(log_id, acknowledged_seq, parks))
        self.after_commit()
        return decode_parked(parks, reply)

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read as the user: other users' rows are absent."""
        self.before_call()
        return [
            answered(
                (
                    self._shown(key, row)
                    for key, row in sorted(self.rows.items())
                    if key[0] == read.table and row.user_id == user_id
                ),
                read,
                self.tables[read.table].key,
            )
            for read in reads
        ]

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Answer as `sync_audit_v1` does."""
        self.before_call()
        return answered_audit(self, log_id, after_seq, limit)

    def settled(self, ranges: Sequence[SeqRange]) -> list[bool]:
        """Answer as `sync_settled_v1` does."""
        self.before_call()
        return answered_settled(self, ranges)

    # -- the RPC --

    def apply(self, p_batch: Row) -> Row:
        """Apply a batch as one database transaction: a protocol error leaves no trace of it."""
        saved = [
            dict(part) for part in (self.rows, self.ledger, self.logs, self.parked, self.tombstones)
        ]
        log_id = p_batch["log_id"]
        self.logs[log_id] = max(self.logs.get(log_id, 0), p_batch["acknowledged_seq"])
        chain: dict[str, Link] = {}
        try:
            verdicts = [self._one(log_id, item, chain) for item in p_batch["transactions"]]
        except SyncError:
            self.rows, self.ledger, self.logs, self.parked, self.tombstones = saved
            raise
        return {"verdicts": verdicts}

    def take(self, p: Row) -> Row:
        """Park as `sync_park_v1` does."""
        log_id = p["log_id"]
        self.logs[log_id] = max(self.logs.get(log_id, 0), p["acknowledged_seq"])
        return {"verdicts": [self._park_one(log_id, park) for park in p["parks"]]}

    def _park_one(self, log_id: str, park: Row) -> Row:
        item, empty = self._with_successors(park["transaction"]), told(park["transaction"])
        known = self._known(log_id, item)
        if known is not None and known["verdict"] in ("duplicate", "parked"):
            return {**empty, **known}
        if self._seq_taken(log_id, item["seq"]):
            return {**empty, "verdict": "rejected", "sqlstate": "SYT02"}
        waits = any(
            a in self.parked and self.parked[a].state != "superseded" for a in item["after"]
        )
        if park["state"] == "held" and not waits:
            return {**empty, "verdict": "held", "blocked_by": park.get("blocked_by")}
        self.parked[item["txn_id"]] = ParkedEntry(log_id, item, park["state"], park)
        self._record(item, park.get("records") or [])
        return {**empty, "verdict": "parked", "state": park["state"]}

    def _record(self, item: Row, records: Sequence[Row]) -> None:
        for record in records:
            key = (item["txn_id"], record["table"], record["id"], record["outcome"])
            if key in self.records and self.records[key].get("resolution") is not None:
                self.decided.append((key, self.records.pop(key)))  # it is another conflict
            self.records.setdefault(key, record)

    def _decide_records(self, txn_id: str, resolution: str) -> None:
        """Note what came of a transaction's records that nobody has decided yet."""
        for key, record in self.records.items():
            if key[0] == txn_id and is_open(record):
                self.records[key] = {**record, "resolution": resolution}

    def _known(self, log_id: str, item: Row, *, is_parked: bool = False) -> Row | None:
        """Return what is remembered of a transaction; `is_parked`: its parked copy asks."""
        known = self.ledger.get(item["txn_id"])
        if known is not None:
            if known.user_id != item["user_id"]:
                return {"verdict": "rejected", "sqlstate": "42501"}
            if known.digest != item["digest"]:
                return {"verdict": "rejected", "sqlstate": "SYT01"}
            self._note_alias(log_id, item, known.log_id)
            rows = {key: self._seen(key, item["user_id"]) for key in known.versions}
            if known.verdict == "discarded" and self._edited(item["txn_id"]):
                return {"verdict": "parked", "state": "dead"}
            if known.verdict == "discarded":
                return {"verdict": "parked", "state": "discarded", "rows": rows}
            answer = {"versions": known.versions, "met": known.met, "defaults": known.defaults}
            return {"verdict": "duplicate", **answer, "rows": rows}
        parked = self.parked.get(item["txn_id"])
        if is_parked or parked is None:
            return None
        if parked.item["user_id"] != item["user_id"]:
            return {"verdict": "rejected", "sqlstate": "42501"}
        if parked.item["digest"] != item["digest"]:
            return {"verdict": "rejected", "sqlstate": "SYT01"}
        self._note_alias(log_id, item, parked.log_id)
        names = [f"{op['table']}/{op['id']}" for op in parked.item["ops"]]
        gone = {name: self._seen(name, item["user_id"]) for name in names}
        return {
            "verdict": "parked",
            "state": parked.state,
            **{name: parked.cause.get(name) for name in ("blocked_by", "sqlstate", "op")},
            "rows": gone if parked.state == "superseded" else {},
        }

    def _note_alias(self, log_id: str, item: Row, other_log: str) -> None:
        if log_id != other_log:
            self.aliases.setdefault((log_id, item["seq"]), item["txn_id"])

    def _seq_taken(self, log_id: str, seq: int) -> bool:
        taken = {(entry.log_id, entry.seq) for entry in self.ledger.values()}
        taken |= {(parked.log_id, parked.item["seq"]) for parked in self.parked.values()}
        return (log_id, seq) in taken or (log_id, seq) in self.aliases

    def _blocker(self, item: Row) -> str | None:
        only_deletes = item["ops"] and all(op["kind"] == "delete" for op in item["ops"])
        for predecessor in item["after"]:
            found, parked = self.ledger.get(predecessor), self.parked.get(predecessor)
            if found is not None and found.user_id == item["user_id"]:
                continue
            passes = parked is not None and parked.item["user_id"] == item["user_id"]
            is_over = passes and parked.state == "superseded"
            if not (is_over or (only_deletes and passes)):
                return str(predecessor)
        return None

    def _with_successors(self, item: Row) -> Row:
        """Let it wait for an edit that still waits, instead of for what that edit replaced.

        And for what one that has come to nothing waited for.
        """
        after: list[str] = []
        for txn_id in item["after"]:
            known = self.ledger.get(txn_id)
            is_own = known is not None and known.user_id == item["user_id"]
            successor = self._edited(txn_id) if is_own else None
            left = [] if successor else self._left_waiting(txn_id, item["user_id"])
            after += [successor or txn_id, *left]
        after = list(dict.fromkeys(after))
        return item if after == item["after"] else {**item, "after": after}

    def _left_waiting(self, txn_id: str, user_id: str) -> list[str]:
        """Return what is still parked of what one waited for that has come to nothing."""
        known, parked = self.ledger.get(txn_id), self.parked.get(txn_id)
        awaited: Sequence[str] = ()
        if known is not None and known.user_id == user_id:
            awaited = [known.replaced_by] if known.replaced_by else known.after
        elif parked and parked.state == "superseded" and parked.item["user_id"] == user_id:
            awaited = parked.item["after"]  # superseded: its row was deleted
        found: list[str] = []
        for other in awaited:
            entry = self.parked.get(other)
            is_open = entry is not None and entry.state != "superseded"
            if is_open and entry.item["user_id"] == user_id:
                found.append(other)
            elif not is_open:
                found += self._left_waiting(other, user_id)
        return found

    def _edited(self, txn_id: str) -> str | None:
        """Return the one that a person put in its place, if that still waits."""
        last: str | None = txn_id
        while last in self.ledger:
            last = self.ledger[last].replaced_by
        waits = last in self.parked and self.parked[last].state != "superseded"
        return last if waits else None

    def _one(
        self, log_id: str, item: Row, chain: dict[str, Link], *, is_parked: bool = False
    ) -> Row:
        empty = told(item)
        known = self._known(log_id, item, is_parked=is_parked)
        if known is not None:
            if known["verdict"] == "duplicate":
                chain.update(self.ledger[item["txn_id"]].links())
            return {**empty, **known}
        if not is_parked and self._seq_taken(log_id, item["seq"]):
            return {**empty, "verdict": "rejected", "sqlstate": "SYT02"}
        item = self._with_successors(item)
        blocker = self._blocker(item)
        if blocker is not None:
            return {**empty, "verdict": "held", "blocked_by": blocker}
        met = dict(item.get("met") or {})
        fitting = {key: link for key, link in chain.items() if link[0] and link[1] == met.get(key)}
        links = {**chain, **self._links_of(item["after"]), **fitting}
        saved, tombstones = dict(self.rows), dict(self.tombstones)
        try:
            versions = self._effects(item, links)
        except Refusal as refusal:
            self.rows, self.tombstones = saved, tombstones
            gone = self._deleted_parents(item) if refusal.item["sqlstate"] == "23503" else {}
            if gone:
                return {**empty, "verdict": "conflict", "op": refusal.item["op"], "rows": gone}
            return {**empty, **refusal.item}
        # A row decided against its author: what they built on it since must meet it by itself.
        versions |= dict.fromkeys(item.get("decided", ()))
        left = {
            f"{op['table']}/{op['id']}": self.defaults(op["table"], op["values"])
            for op in item["ops"]
            if op["kind"] == "insert" and (op["table"], op["id"]) in self.rows
        }
        sent = log_id, item["seq"], item["user_id"], item["digest"]
        entry = LedgerEntry(*sent, versions, met, defaults=left)
        chain.update(entry.links())
        self._record(item, item.get("records") or [])
        self._supersede(item)
        if self.remembers:
            self.ledger[item["txn_id"]] = entry
        return {**empty, "verdict": "applied", "versions": versions, "rows": left}

    def _links_of(self, after: Sequence[str]) -> dict[str, Link]:
        """Return what finished predecessors left of each row: the last of them that left one."""
        links: dict[str, Link] = {}
        found = [txn_id for txn_id in after if txn_id in self.ledger]
        if len(found) > 1:
            applied = list(self.ledger)
            found.sort(key=lambda txn_id: (self.ledger[txn_id].seq, applied.index(txn_id)))
        for entry in map(self.ledger.__getitem__, found):
            for key, link in entry.links().items():
                if link[0] is not None or links.get(key, (None,))[0] is None:
                    links[key] = link
        return links

    def _supersede(self, item: Row) -> None:
        """Let a delete take its author's parked work on the deleted rows with it."""
        deletes = {(op["table"], op["id"]) for op in item["ops"] if op["kind"] == "delete"}
        if not deletes:
            return
        gone = deletes | self._deleted
        for txn_id, parked in list(self.parked.items()):
            if parked.item["user_id"] == item["user_id"] and parked.keys(self.tables) & gone:
                self.parked[txn_id] = replace(parked, state="superseded")
                self._decide_records(txn_id, "discarded")

    def _effects(self, item: Row, chain: Mapping[str, Link]) -> dict[str, str | None]:
        self._check_bases(item, chain)
        self._deleted.clear()
        for index, op in enumerate(item["ops"]):
            row = self.rows.get((op["table"], op["id"]))
            if op["kind"] == "insert":
                self.insert_row(index, op, item["user_id"])
            elif row is None and op["kind"] == "delete":
                continue  # a delete of its parent in this transaction took it along
            elif row is None or row.user_id != item["user_id"]:
                raise Refusal("rejected", index, "42501", message="not the author's")
            elif op["kind"] == "update":
                self._check(index, op)
                self.update_row(op, row)
            else:
                self.delete_row((op["table"], op["id"]))
        keys = [(op["table"], op["id"]) for op in item["ops"]]
        return {"/".join(key): self.version(*key) for key in keys}

    def _check_bases(self, item: Row, chain: Mapping[str, Link]) -> None:
        """Conflict outranks every other refusal, so all bases are checked before any effect."""
        made_here: set[Key] = set()
        stale: dict[str, Row | None] = {}
        found: dict[str, int] = {}
        for index, op in enumerate(item["ops"]):
            key, name = (op["table"], op["id"]), f"{op['table']}/{op['id']}"
            if key in made_here:
                continue
            made_here.add(key)
            what = self._look(op, key, item["user_id"], self._base(op, name, item, chain))
            found.setdefault(what, index)
            if what in ("gone", "stale"):
                stale[name] = None if what == "gone" else self._shown(key, self.rows[key])
        if stale:
            raise Refusal("conflict", rows=stale)
        if "hidden" in found:
            raise Refusal("rejected", sqlstate="42501", message="not the author's")
        if "absent" in found:
            raise Refusal("held", found["absent"], "02000", message="the row isn't there")

    def _look(self, op: Row, key: Key, user_id: str, base: object) -> str:
        """Say how an op finds its row: fine, stale, gone (deleted), absent, hidden."""
        row = self.rows.get(key)
        if row is not None:
            if not self._is_stale(op, row, base):
                return "fine"
            return "stale" if row.user_id == user_id else "hidden"
        if op["kind"] == "insert" or (op["kind"] == "delete" and base is NEVER):
            return "fine"
        if self.tombstones.get(key) != user_id:
            return "absent"
        return "gone" if op["kind"] == "update" else "fine"

    @staticmethod
    def _is_stale(op: Row, row: ServerRow, base: object) -> bool:
        """Compare and set: an op goes through only on the version that it was made on."""
        return bool(op["kind"] == "insert" or row.version != base)

    def _base(self, op: Row, name: str, item: Row, chain: Mapping[str, Link]) -> object:
        """Return the version an op was made on; NEVER for a row that only a parked insert made."""
        if op["kind"] == "insert":
            return None
        if "base" not in op:
            raise ProtocolMismatch(f"an op without a base: {name}")
        if op["base"] != CHAINED:
            return op["base"]
        version, met = chain.get(name, (None, None))
        if version is not None:
            return version if met == (item.get("met") or {}).get(name) else None
        found = self._parked_base(item["after"], item["user_id"], name)
        if op["kind"] == "delete" and found is not None:
            return found[0]
        if name not in chain and not any(map(self._is_over, item["after"])):
            raise ProtocolMismatch(f"chained without a predecessor: {name}")
        return None  # it was rewritten and left the row alone, or came to nothing

    def _is_over(self, txn_id: str) -> bool:
        parked = self.parked.get(txn_id)
        return txn_id in self.ledger or (parked is not None and parked.state == "superseded")

    def _parked_base(self, after: Sequence[str], user_id: str, name: str) -> tuple[object] | None:
        for predecessor in after:
            parked = self.parked.get(predecessor)
            if parked is None or parked.item["user_id"] != user_id:
                continue
            for op in parked.item["ops"]:
                if f"{op['table']}/{op['id']}" != name:
                    continue
                if op["kind"] == "insert":
                    return (NEVER,)
                if op["base"] == CHAINED:
                    found = self._parked_base(parked.item["after"], user_id, name)
                    return found or ("-infinity",)  # forgotten: a version that no row has
                return (op["base"],)
        for predecessor in after:
            entry = self.ledger.get(predecessor)
            if entry is not None and entry.user_id == user_id and name in entry.versions:
                return (entry.versions[name],)
        own = [p for p in map(self.parked.get, after) if p and p.item["user_id"] == user_id]
        return (NEVER,) if own else None  # a person left its change of the row out


def told(item: Row) -> Row:
    """Return a verdict's fields, still empty."""
    empty = dict.fromkeys(("state", "blocked_by", "op", "sqlstate", "message"))
    return {"txn_id": item["txn_id"], "versions": {}, "rows": {}, **empty}
