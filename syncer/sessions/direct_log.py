"""The op log of a writer that has no buffer: its positions exist once the server confirms them.

A transaction is sent until its verdict is known, always under the same txn_id, so that the ledger
recognises it. A log is left, and a new one begun, as soon as it isn't certain which positions of
it are taken: a hole in a log would look like a lost transaction to every audit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from local_store.clock import Clock
from local_store.ops import PendingTransaction
from syncer.core.backoff import RetryLimits, retry_delay_s
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.errors import OutcomeUnknown, SyncError
from syncer.remote import Remote

SEND_ATTEMPTS_MAX = 4  # one caller waits for it: some lost replies, not an outage
RETRIES = RetryLimits(first_s=0.1, max_s=1.0)
SEQ_TAKEN = "SYT02"


class DirectLog:
    """One log of confirmed positions. Thread-safe; its transactions go out one after the other."""

    def __init__(
        self, remote: Remote, clock: Clock, ids: Callable[[], str], jitter: Callable[[], float]
    ) -> None:
        self._remote = remote
        self._clock = clock
        self._ids = ids
        self._jitter = jitter
        self._lock = threading.Lock()
        self._begin()

    def send(self, transaction: PendingTransaction) -> Verdict:
        """Deliver one transaction at the log's next position and return its verdict.

        Raises NotSent or Refused: it had no effect; OutcomeUnknown: it may have had, after
        SEND_ATTEMPTS_MAX attempts without an answer.
        """
        with self._lock:
            verdict = self._sent(transaction)
            if verdict.kind == "fenced" or verdict.sqlstate == SEQ_TAKEN:
                # After a fork of the process two writers share the log; one of them leaves it.
                self._begin()
                verdict = self._sent(transaction)
            if verdict.kind == "applied":
                self._confirmed += 1
            elif verdict.kind == "duplicate":
                self._begin()  # at this position, an earlier one, or another log's
            return verdict

    def ask(self, transactions: Sequence[PendingTransaction]) -> tuple[Verdict, ...]:
        """Return the verdicts of transactions that can't take effect; they take no position."""
        return self._remote.apply_batch(self._batch(transactions))

    def _begin(self) -> None:
        self._log_id = self._ids()
        self._confirmed = 0

    def _batch(self, transactions: Sequence[PendingTransaction]) -> Batch:
        log_id, confirmed = self._log_id, self._confirmed
        placed = [replace(item, log_id=log_id, seq=confirmed + 1) for item in transactions]
        return Batch(log_id, confirmed, tuple(placed))

    def _sent(self, transaction: PendingTransaction) -> Verdict:
        batch, unknown = self._batch([transaction]), None
        for attempt in range(SEND_ATTEMPTS_MAX):
            if attempt:
                self._clock.sleep(retry_delay_s(attempt, self._jitter(), RETRIES))
            try:
                return self._remote.apply_batch(batch)[0]
            except OutcomeUnknown as error:
                unknown = error
            except SyncError:
                # What this attempt says of itself doesn't tell what became of the one before.
                if unknown is None:
                    raise
        self._begin()
        assert unknown is not None
        raise unknown
