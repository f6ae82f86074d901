"""Which transactions go into the next call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from local_store.ops import PendingTransaction


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call carries: transactions of one log, in seq order."""

    log_id: str
    acknowledged_seq: int
    transactions: tuple[PendingTransaction, ...]


def choose(
    log_id: str, acknowledged_seq: int, due: Sequence[PendingTransaction], ops_max: int
) -> Batch:
    """Take transactions in order until `ops_max` ops; a larger single one goes alone.

    A transaction with no ops costs one, so that `ops: []` can't make a batch endless.
    """
    chosen: list[PendingTransaction] = []
    ops = 0
    for transaction in due:
        ops += max(1, len(transaction.ops))
        if chosen and ops > ops_max:
            break
        chosen.append(transaction)
    return Batch(log_id, acknowledged_seq, tuple(chosen))
