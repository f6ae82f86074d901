"""The bounds of a store: each with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass

from local_store.door import DoorLimits


@dataclass(frozen=True, slots=True)
class StoreLimits(DoorLimits):
    """Bounds on the whole buffer; reaching one refuses writes, it never drops any."""

    buffer_bytes_max: int = 2 * 1024**3  # ≥ 48 h of outage at ten 1 KB writes a second
    buffer_transactions_max: int = 2_000_000
    full_retry_after_s: float = 5.0  # about one flush interval: space comes from the drain
    free_bytes_min: int = 16 * 1024**2  # left on the disk for the drain: a WAL and a checkpoint
    cache_bytes_max: int = (
        512 * 1024**2
    )  # clean rows: a copy of the server's, for reads in an outage
    settled_retention_s: float = 86_400.0  # what a restored server may have to be told again
    file_bytes_max: int = 4 * 1024**3  # above it the oldest settled ones go before their time
    views_bytes_max: int = 32 * 1024**2  # rows remembered for the next write to them
    fork_wait_s: float = 5.0  # for each of a store's locks: a sync under way, a long read, a backup
