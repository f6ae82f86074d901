"""Which transactions go into the next call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from local_store.ops import PendingTransaction


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call carries: transactions of one log, each author's together and in seq order."""

    log_id: str
    acknowledged_seq: int
    transactions: tuple[PendingTransaction, ...]


def choose(due: Sequence[PendingTransaction], ops_max: int) -> tuple[PendingTransaction, ...]:
    """Take from each author in turn until `ops_max` ops; a larger single transaction goes alone.

    In turn, because one author's thousand queued writes must not keep another's single one waiting;
    each author's own stay in order. A transaction with no ops costs one, so that `ops: []` can't
    make a batch endless.
    """
    queues: dict[str, list[PendingTransaction]] = {}
    for transaction in due:
        queues.setdefault(transaction.user_id, []).append(transaction)
    chosen: list[PendingTransaction] = []
    ops, turn = 0, 0
    while queues:
        for user_id, queue in list(queues.items()):
            ops += max(1, len(queue[turn].ops))
            if chosen and ops > ops_max:
                return _by_author(chosen)
            chosen.append(queue[turn])
            if turn + 1 == len(queue):
                del queues[user_id]
        turn += 1
    return _by_author(chosen)


def _by_author(chosen: Sequence[PendingTransaction]) -> tuple[PendingTransaction, ...]:
    """Put each author's transactions together: the server changes its role once per run of them."""
    first: dict[str, int] = {}
    for transaction in sorted(chosen, key=lambda transaction: transaction.position):
        first.setdefault(transaction.user_id, transaction.position)
    return tuple(sorted(chosen, key=lambda item: (first[item.user_id], item.position)))


def next_turn(after_user: str, served: Sequence[PendingTransaction]) -> str:
    """Return the author after whom the next batch begins: the last served one, going round.

    The store serves authors in the order of their ids from `after_user` on, then from the start.
    """
    users = {transaction.user_id for transaction in served}
    wrapped = {user for user in users if user <= after_user}
    return max(wrapped or users, default=after_user)
