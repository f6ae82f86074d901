"""Sealing and shipping: what is acknowledged here goes to the Volume, where a worker finds it.

Whoever calls `ship` waits until everything that was acknowledged before is on the Volume; callers
that come while a commit is under way share the next one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Self

from local_store import LocalStore
from local_store.ops import UNSETTLED, PendingTransaction
from local_store.segment_files import write_file
from local_store.segment_names import SegmentName, SegmentTooLarge
from local_store.segments import SealedSegment, SegmentHeader, SegmentKey, seal
from syncer.settings import Settings
from syncer.volume import Volume, VolumeResult

TRANSACTIONS_MAX = 2_000  # in one segment: some MB, read whole by the worker
BYTES_MAX = 8 * 1024 * 1024  # of ops; what they replaced comes on top, the format allows 64 MiB


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a log is sealed: a position in the file, and the seq that stands there."""

    log_id: str
    position: int = 0
    seq: int = 0


class Shipper:
    """Puts one buffer's undelivered transactions on a Volume. Thread-safe.

    What is sealed is remembered in memory only: after a restart what is still undelivered is sealed
    once more, which the ids make harmless.
    """

    def __init__(
        self, store: LocalStore, volume: Volume, key: SegmentKey, *, environment: str
    ) -> None:
        self._store = store
        self._volume = volume
        self._key = key
        self._environment = environment
        self._lock = threading.Lock()
        self._written = Mark("")
        self._committed = Mark("")
        self._unfit: dict[str, int] = {}

    @classmethod
    def from_settings(cls, store: LocalStore, volume: Volume, settings: Settings) -> Self:
        """Build the shipper of `store`; raises SettingsError naming what is missing."""
        _, secret = settings.require_volume()
        key = SegmentKey.derive(secret)
        return cls(store, volume, key, environment=settings.environment_name)

    def ship(self, *, timeout_s: float | None = None) -> VolumeResult:
        """Seal all that is undelivered and not sealed yet, and commit it; never raises.

        `committed`: everything acknowledged before the call survives the container or is delivered.
        Anything else promises nothing; what was written stays and is in a later commit.
        """
        try:
            self._unfit = {txn: seq for txn, seq in self._unfit.items() if self._is_open(txn)}
            if not self.at_risk():
                return VolumeResult("committed")
        except Exception as error:  # a buffer that can't be read can't be sealed either
            return VolumeResult("failed", f"the buffer doesn't answer ({type(error).__name__})")
        written: list[Mark] = []
        result = self._volume.commit(lambda: written.append(self._write()), timeout_s=timeout_s)
        if result.state == "committed":
            self._note(written[0])
            if self._unfit:
                return VolumeResult("failed", "a transaction is too large for a segment")
        return result

    def at_risk(self) -> int:
        """Return how many acknowledged transactions would be lost with this container's disk."""
        mark = self._mark()
        unfit = sum(self._is_open(txn_id) for txn_id in tuple(self._unfit))
        return self._store.undelivered_after(mark.position) + unfit

    def covers(self, seq: int) -> bool:
        """Tell whether a position of the newest log survives the container."""
        return seq <= self._mark().seq and seq not in self._unfit.values()

    def _is_open(self, txn_id: str) -> bool:
        return self._store.state(txn_id) in UNSETTLED

    def _mark(self) -> Mark:
        """Return what is committed of the newest log; another log's marks say nothing of it."""
        log_id = self._store.log_id
        with self._lock:
            return self._committed if self._committed.log_id == log_id else Mark(log_id)

    def _note(self, written: Mark) -> None:
        with self._lock:
            known = self._committed
            if written.log_id != known.log_id or written.position > known.position:
                self._committed = written

    def _write(self) -> Mark:
        """Write segments up to the end of the log; on the Volume's one thread."""
        log_id = self._store.log_id
        if self._written.log_id != log_id:
            self._written = Mark(log_id)
        position = self._store.seal_from(self._written.position)
        while found := self._store.sealable(
            position, transactions_max=TRANSACTIONS_MAX, bytes_max=BYTES_MAX
        ):
            self._seal(found)
            position = found[-1].position
            seq = found[-1].seq if found[-1].log_id == log_id else 0
            self._written = Mark(log_id, position, max(seq, self._written.seq))
        return self._written

    def _seal(self, transactions: list[PendingTransaction]) -> None:
        try:
            write_file(self._volume.folder, self._sealed(transactions))
        except SegmentTooLarge:
            half = len(transactions) // 2
            if half == 0:  # it stays at durability `host`, and is counted as at risk
                self._unfit[transactions[0].txn_id] = transactions[0].seq
                return
            self._seal(transactions[:half])
            self._seal(transactions[half:])

    def _sealed(self, transactions: list[PendingTransaction]) -> SealedSegment:
        log_id = transactions[0].log_id
        ends = {log["log_id"]: log["last_seq"] for log in self._store.logs()}
        name = SegmentName(log_id, transactions[0].seq, transactions[-1].seq)
        used = {op.table for item in transactions for op in item.ops}
        schemas = {
            name: spec.schema_version for name, spec in self._store.tables.items() if name in used
        }
        end = max(int(ends.get(log_id, 0)), name.last_seq)
        return seal(transactions, SegmentHeader(name, end, self._environment, schemas), self._key)
