"""The server's answer for one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VerdictKind = Literal["applied", "duplicate", "conflict", "rejected", "held", "parked", "fenced"]
VERDICT_KINDS: frozenset[str] = frozenset(
    ("applied", "duplicate", "conflict", "rejected", "held", "parked", "fenced")
)

ParkedState = Literal["dead", "conflict", "held", "discarded", "superseded"]
PARKED_STATES: frozenset[str] = frozenset(("dead", "conflict", "held", "discarded", "superseded"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """One verdict. `versions` and `rows` are keyed `table/id`; `op` is the failing op's index.

    `state` says where a parked transaction stands; it is None for every other verdict. `met` tells
    of a duplicate what a merge had put its rows on when it was applied (PendingTransaction.met),
    `defaults` what its inserted rows had then in the columns that were left to the server.
    """

    txn_id: str
    kind: VerdictKind
    state: ParkedState | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    met: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    blocked_by: str | None = None
    op: int | None = None
    sqlstate: str | None = None
    message: str | None = None
