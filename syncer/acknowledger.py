"""What a receipt may say: how far a write has come when it is acknowledged, as its mode demands.

The buffer's own acknowledgement is durability `host`. This is what lies between it and the caller:
nothing (`local`), the Volume (`volume`), the server (`remote`), or the Volume whenever the server
isn't keeping up (`adaptive`). A receipt names what was reached, never what was hoped for.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from local_store import LocalStore, Receipt
from local_store.clock import Clock, SystemClock
from local_store.ops import SETTLED, UNSETTLED, Durability
from syncer.core.acknowledge import AckMode, must_ship
from syncer.core.breaker import BreakerState
from syncer.flusher import FlushReport
from syncer.settings import Settings
from syncer.shipper import Shipper


@dataclass(frozen=True, slots=True)
class AckLimits:
    """The mode, and its bounds in seconds. `delivers`: a flusher runs in this process."""

    mode: AckMode = "local"
    delivers: bool = True
    adaptive_after_s: float = 1.0
    ack_timeout_s: float = 5.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Take the bounds from the environment's settings."""
        return cls(
            settings.ack,
            settings.use_supabase and settings.embedded_flusher,
            settings.adaptive_after_s,
            settings.ack_timeout_s,
        )


class Acknowledger:
    """Takes a receipt of the buffer as far as the mode demands. Thread-safe.

    Give the flusher's reports to `heard`: they tell how far delivery is behind.
    """

    def __init__(
        self,
        store: LocalStore,
        shipper: Shipper | None = None,
        limits: AckLimits | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._shipper = shipper
        self._limits = limits or AckLimits()
        self._clock = clock or SystemClock()
        self._changed = threading.Condition()
        self._breaker: BreakerState = "closed"
        self._behind_since: float | None = None
        self._error: str | None = None
        self._measure()

    @property
    def waits_for_server(self) -> bool:
        """Tell whether a write is acknowledged when the server has decided about it."""
        return self._limits.mode == "remote"

    @property
    def error(self) -> str | None:
        """Why the last shipment didn't reach the Volume, None when it did."""
        return self._error

    def reach(self, receipt: Receipt) -> Receipt:
        """Take a fresh receipt as far as the mode demands; returns what was reached.

        Waits for a Volume commit at most as long as the Volume's timeout, in mode `remote` for the
        server at most `ack_timeout_s`. Never raises and never refuses: the write is in the buffer.
        """
        with self._changed:
            if self._behind_since is None:
                self._behind_since = self._clock.monotonic()
        if self._limits.mode == "remote":
            return self._reach_remote(receipt)
        if self.must_ship() and self._ship():
            return receipt._replace(durability="container")
        return receipt

    def must_ship(self) -> bool:
        """Tell whether a write that is acknowledged now must be on the Volume first."""
        since = self._behind_since
        return must_ship(
            self._limits.mode,
            delivers=self._limits.delivers,
            breaker=self._breaker,
            oldest_age_s=None if since is None else self._clock.monotonic() - since,
            adaptive_after_s=self._limits.adaptive_after_s,
        )

    def ship_if_due(self) -> None:
        """Ship what was acknowledged before the mode demanded it; for a call every few seconds."""
        if self.must_ship():
            self._ship()

    def ship_all(self, timeout_s: float) -> bool:
        """Ship whatever isn't delivered, in any mode; for the end of the process."""
        return self._shipper is None or self._ship(timeout_s)

    def heard(self, report: FlushReport) -> None:
        """Take in what a flush found, and wake who waits for the server."""
        self._measure(report)

    def durability(self, seqs: Collection[int]) -> Durability:
        """Return what the least safe of some undelivered transactions survives."""
        if not seqs:
            return "remote"
        shipper = self._shipper
        if shipper is not None and all(shipper.covers(seq) for seq in seqs):
            return "container"
        return "host"

    def at_risk(self) -> int:
        """Return how many acknowledged transactions are on this container's disk only."""
        if self._shipper is None:
            return int(self._store.stats()["pending"])
        return self._shipper.at_risk()

    def _measure(self, report: FlushReport | None = None) -> None:
        """Note since when delivery is behind: the oldest one's age, at most."""
        age_s = None if report is not None and not report.pending else self._store.oldest_age_s()
        with self._changed:
            self._breaker = "closed" if report is None else report.breaker
            self._behind_since = None if age_s is None else self._clock.monotonic() - age_s
            self._changed.notify_all()

    def _ship(self, timeout_s: float | None = None) -> bool:
        if self._shipper is None:
            return False
        result = self._shipper.ship(timeout_s=timeout_s)
        self._error = None if result.state == "committed" else result.reason
        return result.state == "committed"

    def _reach_remote(self, receipt: Receipt) -> Receipt:
        """Wait for the flusher's reports until one of them settled the transaction."""
        end = self._clock.monotonic() + self._limits.ack_timeout_s
        with self._changed:
            while (state := self._store.state(receipt.txn_id)) in UNSETTLED:
                left_s = end - self._clock.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    break
        # What waits for a person is with the server too, and not what was asked for.
        return receipt._replace(durability="remote") if state in SETTLED else receipt
