"""What the modelled server answers to audits: `sync_audit_v1`, `sync_settled_v1`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from local_store.ops import Row
from syncer.remote import SeqRange
from tests.simulation.model_entries import LedgerEntry, ParkedEntry


class Remembering(Protocol):
    """The part of the modelled server that an audit reads."""

    ledger: dict[str, LedgerEntry]
    logs: dict[str, int]
    parked: dict[str, ParkedEntry]
    aliases: dict[tuple[str, int], str]


def answered_audit(server: Remembering, log_id: str | None, after_seq: int, limit: int) -> Row:
    """Return the sums of one log or of all, and of one also what stands at each position."""
    logs = [
        _audited(server, name, acknowledged)
        for name, acknowledged in server.logs.items()
        if log_id in (None, name)
    ]
    if log_id is None:
        return {"logs": logs}
    entries = [entry for entry in positions(server, log_id) if entry["seq"] > after_seq]
    return {"logs": logs, "entries": entries[:limit]}


def answered_settled(server: Remembering, ranges: Sequence[SeqRange]) -> list[bool]:
    """Tell of each range whether something final or parked stands at each of its positions."""
    known: dict[str, set[int]] = {}
    for log_id, _, _ in ranges:
        if log_id not in known:
            known[log_id] = {entry["seq"] for entry in positions(server, log_id)}
    return [set(range(first, last + 1)) <= known[log_id] for log_id, first, last in ranges]


def positions(server: Remembering, log_id: str) -> list[Row]:
    """Return what stands at each known position of a log, in order."""
    aliased: dict[str, list[int]] = {}
    for (log, seq), txn_id in server.aliases.items():
        if log == log_id:
            aliased.setdefault(txn_id, []).append(seq)
    found = [
        {"seq": seq, "txn_id": txn_id, "digest": entry.digest, "state": entry.verdict}
        for txn_id, entry in server.ledger.items()
        for seq in _seqs(entry.log_id == log_id, entry.seq, txn_id, aliased)
    ]
    found += [
        {"seq": seq, "txn_id": txn_id, "digest": entry.item["digest"], "state": entry.state}
        for txn_id, entry in server.parked.items()
        for seq in _seqs(entry.log_id == log_id, entry.item["seq"], txn_id, aliased)
    ]
    return sorted(found, key=lambda entry: entry["seq"])


def _seqs(is_own: bool, seq: int, txn_id: str, aliased: Mapping[str, list[int]]) -> list[int]:
    return [seq] if is_own else aliased.get(txn_id, [])


def _audited(server: Remembering, log_id: str, acknowledged: int) -> Row:
    states = Counter(entry["state"] for entry in positions(server, log_id))
    names = ("applied", "discarded", "dead", "conflict", "held", "superseded")
    return {
        "log_id": log_id,
        "acknowledged_seq": acknowledged,
        "floor_seq": 0,
        "duplicated": 0,
        **{name: states[name] for name in names},
    }
