"""How long to wait before the next attempt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """Bounds of the exponential backoff, in seconds."""

    first_s: float = 0.2  # one round trip to a healthy project
    max_s: float = 30.0  # an outage's end is noticed within half a minute
    retry_after_max_s: float = 120.0  # a server's wish is honoured, but not for hours


def retry_delay_s(attempts: int, jitter: float, limits: RetryLimits) -> float:
    """Seconds to wait after `attempts` failures in a row; `jitter` in [0, 1) spreads the clients.

    Full jitter over an exponentially growing window, because clients that failed together would
    otherwise return together.
    """
    window_s = min(limits.max_s, limits.first_s * 2.0 ** min(attempts, 32))
    return window_s * jitter


def honoured_retry_after_s(asked_s: float | None, limits: RetryLimits) -> float:
    """Seconds to wait on a server's Retry-After: at least 0, at most the cap."""
    return 0.0 if asked_s is None else min(max(asked_s, 0.0), limits.retry_after_max_s)
