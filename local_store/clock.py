"""The one place where time and fresh ids come from; everything else is handed them."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

import uuid_utils


class Clock(Protocol):
    """Wall time for stamps, monotonic time for durations. They are never mixed."""

    def now(self) -> datetime:
        """Return the wall time, aware, in UTC."""

    def monotonic(self) -> float:
        """Return seconds that only grow, from an arbitrary start."""

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """Return the wall time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds since boot or so."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for `seconds`."""
        time.sleep(seconds)


class ManualClock:
    """A clock that moves only when told to, for tests and simulations."""

    def __init__(self, start: datetime | None = None) -> None:
        self._now = start or datetime(2026, 1, 1, tzinfo=UTC)
        self._monotonic = 0.0

    def now(self) -> datetime:
        """Return the wall time as set."""
        return self._now

    def monotonic(self) -> float:
        """Return the seconds advanced so far."""
        return self._monotonic

    def sleep(self, seconds: float) -> None:
        """Advance both clocks by `seconds`; nobody waits."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def set_wall(self, now: datetime) -> None:
        """Step the wall clock alone, as NTP or an operator would; monotonic time is untouched."""
        self._now = now


def new_id() -> str:
    """Return a fresh UUIDv7 (RFC 9562): roughly time-ordered, so B-trees append.

    Order within a log is `seq`, never the id: a stepped clock inverts ids.
    """
    return str(uuid_utils.uuid7())


def isoformat(moment: datetime) -> str:
    """Return `moment` in UTC as ISO 8601 with microseconds and `+00:00`; one form everywhere."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
