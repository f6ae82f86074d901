"""The server's answer for one transaction, and what it means for the op log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from local_store.ops import Outcome, TransactionState

VerdictKind = Literal["applied", "duplicate", "conflict", "rejected", "held", "parked", "fenced"]
VERDICT_KINDS: frozenset[str] = frozenset(
    ("applied", "duplicate", "conflict", "rejected", "held", "parked", "fenced")
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One verdict. `versions` and `rows` are keyed `table/id`; `op` is the failing op's index."""

    txn_id: str
    kind: VerdictKind
    versions: Mapping[str, str | None] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    blocked_by: str | None = None
    op: int | None = None
    sqlstate: str | None = None
    message: str | None = None


def outcome_of(verdict: Verdict, held_retry_s: float) -> Outcome:
    """Translate a verdict into what the op log records; nothing is ever dropped by it."""
    if verdict.kind in ("applied", "duplicate"):
        return Outcome(verdict.txn_id, "applied", verdict.versions)
    state = _state_of(verdict.kind)
    reply = {
        "verdict": verdict.kind,
        "rows": dict(verdict.rows),
        "blocked_by": verdict.blocked_by,
        "op": verdict.op,
        "sqlstate": verdict.sqlstate,
        "message": verdict.message,
    }
    return Outcome(
        verdict.txn_id,
        state,
        reply=reply,
        retry_after_s=held_retry_s if state == "held" else 0.0,
    )


def _state_of(kind: VerdictKind) -> TransactionState:
    match kind:
        case "applied" | "duplicate":
            return "applied"
        case "held":
            return "held"
        case "conflict":
            return "conflict"
        case "rejected" | "parked" | "fenced":
            return "dead"
        case _:
            assert_never(kind)
