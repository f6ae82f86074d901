"""What people decide about parked work, in the modelled server: `sync_retry_v1`, `sync_discard_v1`.

Resolving and editing are tested on the real functions only (tests/sql/test_parking.py,
tests/e2e/test_operators.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from local_store.ops import Row
from syncer.core.wire import CHAINED
from syncer.errors import ProtocolMismatch
from tests.simulation.model_entries import LedgerEntry, ParkedEntry
from tests.simulation.remote_model import RemoteModel, told

TRIES = 2  # as it is, and as it was merged
Overlap = tuple[str, ...]


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
            entry = self.parked.get(txn_id)
            if entry is None or entry.state == "superseded":
                raise ProtocolMismatch(f"not open: {txn_id}")
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
        for op, before in zip(item["ops"], item["before"], strict=True):
            name = f"{op['table']}/{op['id']}"
            if name not in verdict["rows"]:
                continue
            row = verdict["rows"][name]
            columns = _overlap(op, before or {}, row)
            if columns is None:
                met[name] = row[self.tables[op["table"]].version]
            else:
                records.append(
                    {
                        "table": op["table"],
                        "id": op["id"],
                        "columns": list(columns),
                        "mine": {column: op["values"][column] for column in columns},
                        "theirs": {column: (row or {}).get(column) for column in columns},
                        "outcome": "manual",
                    }
                )
        if met and not records:
            return _rebased(item, met)
        for record in records:
            self.records.pop((item["txn_id"], record["table"], record["id"], "manual"), None)
        self._record(item, records)
        return None

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

    def _discard(self, txn_id: str, entry: ParkedEntry) -> None:
        item = entry.item
        del self.parked[txn_id]
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
        )


def _overlap(op: Row, before: Row, row: Row | None) -> Overlap | None:
    """Return the columns that both sides changed to different values; None for none."""
    if row is None or op["kind"] == "delete":
        return tuple(sorted(op["values"]))
    found = [
        column
        for column, mine in sorted(op["values"].items())
        if (op["kind"] == "insert" or before.get(column) != row.get(column))
        and mine != row.get(column)
    ]
    return tuple(found) or None


def _met(item: Row, name: str) -> str | None:
    found: str | None = (item.get("met") or {}).get(name)
    return found


def _rebased(item: Row, met: dict[str, str]) -> Row:
    ops = []
    for op in item["ops"]:
        name = f"{op['table']}/{op['id']}"
        moved = name in met and op["kind"] != "insert"
        ops.append({**op, "base": met[name]} if moved else op)
    return {**item, "met": {**(item.get("met") or {}), **met}, "ops": ops}
