"""What people decide about parked work, in the modelled server: retry, discard, edit, resolve.

The rules of `sync_retry_v1` and its neighbours (migration 011); a choice is made there, in
model_decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from local_store.ops import Row
from syncer.core.wire import CHAINED
from syncer.errors import ProtocolMismatch
from tests.simulation.model_decisions import (
    Choice,
    carried_over,
    covered,
    decided,
    given_up,
    overlap,
    rebased,
    without,
)
from tests.simulation.model_entries import LedgerEntry, ParkedEntry, is_open
from tests.simulation.remote_model import RemoteModel, told

TRIES = 2  # as it is, and as it was merged
PEOPLE = "70656f70-6c65-4000-8000-000000000000"
"""The log of what people write."""


class OperatedModel(RemoteModel):
    """The modelled server with people at it."""

    def retry(self, txn_ids: Sequence[str]) -> list[Row]:
        """Try parked transactions again, and what waits for them."""
        results: list[Row] = []
        for txn_id in self._in_order(set(txn_ids) & self.parked.keys()):
            if txn_id not in self.parked or any(r["txn_id"] == txn_id for r in results):
                continue
            entry = self.parked[txn_id]
            if entry.state == "conflict":  # as it is, it would overwrite theirs undecided
                results.append({**told(entry.item), "verdict": "conflict"})
            else:
                self._retry(txn_id, results)
        return results

    def discard(self, txn_ids: Sequence[str]) -> list[Row]:
        """Give parked transactions up; what waited for them goes on without them."""
        results: list[Row] = []
        for txn_id in txn_ids:
            entry = self._open(txn_id)
            self._unlink(txn_id, entry.item)
            self._discard(txn_id, entry)
            results.append({**told(entry.item), "verdict": "parked", "state": "discarded"})
            waiting = {
                other
                for other, found in self.parked.items()
                if found.state == "held" and found.cause.get("blocked_by") == txn_id
            }
            for other in self._in_order(waiting):
                self._retry(other, results)
        return results

    def edit_parked(
        self, txn_id: str, values: Mapping[str, Row], new_txn_id: str, digest: str
    ) -> list[Row]:
        """Replace a parked transaction by one with other values of some rows (`table/id`)."""
        entry = self._open(txn_id)
        ops = [
            {**op, "values": values.get(f"{op['table']}/{op['id']}", op["values"])}
            for op in entry.item["ops"]
        ]
        self._replace(txn_id, {**entry.item, "ops": ops}, new_txn_id, digest)
        return [{**told(self.parked[new_txn_id].item), "verdict": "parked", "state": "dead"}]

    def resolve(self, txn_id: str, name: str, choice: Choice, **edited: Any) -> list[Row]:
        """Decide the record of a row (`table/id`), and every other undecided one of its kind.

        `edited`, for that choice: the `row`, its `new_txn_id` and `digest`.
        """
        table, _, row_id = name.partition("/")
        named = self.records.get((txn_id, table, row_id, "manual"))
        if named is None or not is_open(named):
            raise ProtocolMismatch(f"nothing to decide: {txn_id} {name}")
        if choice != "theirs" and named.get("theirs_version") is None:
            raise ProtocolMismatch(f"the row is gone: {name}")
        entry = self._open(txn_id)
        item = entry.item
        found = {k: r for k, r in self.records.items() if k[0] == txn_id and is_open(r)}
        for record in found.values():
            gone = record.get("theirs_version") is None
            item = decided(item, record, "theirs" if choice == "theirs" or gone else "mine")
            if choice != "mine":
                self._follow(entry, record)
                item["decided"] = [*item.get("decided", ()), f"{record['table']}/{record['id']}"]
        tried = txn_id
        if choice == "edited":
            ops = [
                {**op, "kind": "update", "values": edited["row"]}
                if (op["table"], op["id"]) == (table, row_id)
                else op
                for op in item["ops"]
            ]
            tried = edited["new_txn_id"]
            self._replace(txn_id, {**item, "ops": ops}, tried, edited["digest"])
        else:
            self.parked[txn_id] = replace(entry, item=item)
        results: list[Row] = []
        self._retry(tried, results)
        for key, record in found.items():
            now = self.records[key]
            if now is record or not is_open(now):  # else the row has moved: undecided again
                self.records[key] = {**now, "resolution": choice}
        return results

    def _open(self, txn_id: str) -> ParkedEntry:
        entry = self.parked.get(txn_id)
        if entry is None or entry.state == "superseded":
            raise ProtocolMismatch(f"not open: {txn_id}")
        return entry

    def _in_order(self, txn_ids: set[str]) -> list[str]:
        def place(txn_id: str) -> tuple[str, int]:
            entry = self.parked[txn_id]
            return entry.log_id, entry.item["seq"]

        return sorted(txn_ids, key=place)

    def _retry(self, txn_id: str, results: list[Row]) -> None:
        entry = self.parked.get(txn_id)
        if entry is None or entry.state == "superseded":
            return
        item, verdict = entry.item, self._one(entry.log_id, entry.item, {}, is_parked=True)
        for _ in range(TRIES - 1):
            merged = self._merged(item, verdict) if verdict["verdict"] == "conflict" else None
            if merged is not None:
                item, verdict = merged, self._one(entry.log_id, merged, {}, is_parked=True)
        results.append(verdict)
        if verdict["verdict"] in ("applied", "duplicate"):
            del self.parked[txn_id]
            self._decide_records(txn_id, "mine")
            waiting = {
                other
                for other, found in self.parked.items()
                if found.state in ("dead", "held") and txn_id in found.item["after"]
            }
            for other in self._in_order(waiting):
                self._retry(other, results)
            return
        if verdict["verdict"] == "conflict":
            self._merged(item, verdict)  # for its records
        state = "held" if verdict["blocked_by"] is not None else "dead"
        state = "conflict" if verdict["verdict"] == "conflict" else state
        self.parked[txn_id] = ParkedEntry(entry.log_id, item, state, verdict)

    def _merged(self, item: Row, verdict: Row) -> Row | None:
        """Return the item on the rows it met; None, with records, when a person must look."""
        records: list[Row] = []
        met: dict[str, str] = {}
        kept = []
        for op, before in zip(item["ops"], item["before"], strict=True):
            name = f"{op['table']}/{op['id']}"
            if (
                op["kind"] == "update"
                and not op["values"]
                and verdict["rows"].get(name, op) is None
            ):
                continue  # `theirs` left it empty, and the row has gone: nothing to decide about
            kept.append((op, before))
            if name not in verdict["rows"]:
                continue
            row = verdict["rows"][name]
            columns = overlap(op, before or {}, row)
            version = None if row is None else row[self.tables[op["table"]].version]
            if columns is None:
                met[name] = version
            else:
                records.append(
                    {
                        "table": op["table"],
                        "id": op["id"],
                        "columns": list(columns),
                        "mine": {column: op["values"][column] for column in columns},
                        "theirs": {column: (row or {}).get(column) for column in columns},
                        "theirs_version": version,
                        "outcome": "manual",
                    }
                )
        if not records and (met or len(kept) < len(item["ops"])):
            ops, befores = [op for op, _ in kept], [before for _, before in kept]
            return rebased({**item, "ops": ops, "before": befores}, met)
        self._renew(item, records, verdict["rows"])
        return None

    def _renew(self, item: Row, records: Sequence[Row], rows: Mapping[str, Row | None]) -> None:
        """Bring the undecided records of an item's rows up to date with what it has met now."""
        for record in records:
            key = (item["txn_id"], record["table"], record["id"], "manual")
            older = self.records.get(key)
            if older is not None and is_open(older):
                del self.records[key]
                ops = [*item["ops"], *self._covered_ops(item, older.get("through"))]
                row = rows[f"{record['table']}/{record['id']}"]
                more = self._on_its_way(older.get("through"))
                record = carried_over(record, older, ops, row, more=more)
            self._record(item, [record])

    def _covered_ops(self, item: Row, through: str | None) -> list[Row]:
        """Return the ops of what waits behind an item and is covered by its record."""
        entry = self.parked[item["txn_id"]]
        last = self.covered_through(entry, through)
        waiting = [found for found in self.behind(entry) if found.place[1] <= last]
        return [op for found in waiting for op in found.item["ops"]]

    def behind(self, entry: ParkedEntry) -> list[ParkedEntry]:
        """Return what its author wrote after a parked transaction and is parked too, in order."""
        found = [
            other
            for other in self.parked.values()
            if (other.place[0], other.item["user_id"]) == (entry.place[0], entry.item["user_id"])
            and other.state != "superseded"
            and other.place[1] > entry.place[1]
        ]
        return sorted(found, key=lambda other: other.place[1])

    def covered_through(self, entry: ParkedEntry, through: str | None) -> float:
        """Return the last position that a record covers: all that is parked, if it isn't here yet.

        What comes behind a waiting change is never parked before it.
        """
        log_id, seq = entry.place
        for found in (self.parked.get(through or ""), self.ledger.get(through or "")):
            if isinstance(found, ParkedEntry) and found.place[0] == log_id:
                return found.place[1]
            if isinstance(found, LedgerEntry) and found.log_id == log_id:
                return found.seq
        return float("inf") if self._on_its_way(through) else seq

    def _on_its_way(self, txn_id: str | None) -> bool:
        return txn_id is not None and txn_id not in self.parked and txn_id not in self.ledger

    def _unlink(self, txn_id: str, item: Row) -> None:
        bases = {f"{op['table']}/{op['id']}": op.get("base") for op in item["ops"]}
        for other, entry in list(self.parked.items()):
            if entry.state == "superseded" or txn_id not in entry.item["after"]:
                continue
            after = dict.fromkeys(a for a in entry.item["after"] if a != txn_id)
            ops = []
            for op in entry.item["ops"]:
                name = f"{op['table']}/{op['id']}"
                is_next = op.get("base") == CHAINED and name in bases
                same = _met(item, name) == _met(entry.item, name)
                ops.append({**op, "base": bases[name] if same else None} if is_next else op)
            changed = {**entry.item, "after": [*after, *item["after"]], "ops": ops}
            self.parked[other] = replace(entry, item=changed)

    def _discard(self, txn_id: str, entry: ParkedEntry, replaced_by: str | None = None) -> None:
        item = entry.item
        del self.parked[txn_id]
        self._decide_records(txn_id, "edited" if replaced_by else "discarded")
        if txn_id in self.ledger:  # with other content: it was refused for that
            self.aliases.setdefault((entry.log_id, item["seq"]), txn_id)
            return
        self.ledger[txn_id] = LedgerEntry(
            entry.log_id,
            item["seq"],
            item["user_id"],
            item["digest"],
            {f"{op['table']}/{op['id']}": None for op in item["ops"]},
            {},
            "discarded",
            replaced_by,
            after=tuple(item["after"]),
        )

    def _replace(self, txn_id: str, item: Row, new_txn_id: str, digest: str) -> None:
        """Discard in favour of another; what waited for the old one waits for the new one."""
        entry = self._open(txn_id)
        self.logs[PEOPLE] = seq = self.logs.get(PEOPLE, 0) + 1
        self._discard(txn_id, entry, new_txn_id)
        new = {"txn_id": new_txn_id, "seq": seq, "digest": digest, "replaces": txn_id}
        new["stands_for"] = entry.place
        cause = {**entry.cause, "blocked_by": None}
        self.parked[new_txn_id] = ParkedEntry(PEOPLE, {**item, **new}, "dead", cause)
        for other, found in list(self.parked.items()):
            if found.state == "superseded" or txn_id not in found.item["after"]:
                continue
            after = [new_txn_id if a == txn_id else a for a in found.item["after"]]
            blocked = found.cause.get("blocked_by")
            cause = {**found.cause, "blocked_by": new_txn_id if blocked == txn_id else blocked}
            item = {**found.item, "after": after}
            self.parked[other] = replace(found, item=item, cause=cause)

    def _follow(self, entry: ParkedEntry, record: Mapping[str, Any]) -> None:
        """Take a decision against the author over to what waits and is covered by its record."""
        last = self.covered_through(entry, record.get("through"))
        for found in self.behind(entry):
            is_told = found.place[1] <= last
            ops = []
            for op in found.item["ops"]:
                if is_told and (covered(op, record) or given_up(op, record)):
                    op = without(op, record, op["base"])
                elif covered(op, record):
                    op = {**op, "base": None}
                ops.append(op)
            self.parked[found.item["txn_id"]] = replace(found, item={**found.item, "ops": ops})


def _met(item: Row, name: str) -> str | None:
    found: str | None = (item.get("met") or {}).get(name)
    return found
