"""The circuit breaker: after some failures in a row, one probe per interval until one succeeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class Breaker:
    """A frozen value; each event gives the next one. Times are monotonic seconds.

    While open, `allows` lets one attempt through per `interval_s`; that attempt is a real write,
    because a health page says nothing about writes.
    """

    interval_s: float
    failures_max: int = 3  # flapping isn't an outage; three failures in a row are
    failures: int = 0
    not_before: float = 0.0

    def state(self, now: float) -> BreakerState:
        """Return where the breaker stands at `now`."""
        if self.failures < self.failures_max:
            return "closed"
        return "half_open" if now >= self.not_before else "open"

    def allows(self, now: float) -> bool:
        """Tell whether an attempt may go out at `now`."""
        return now >= self.not_before

    def wait_s(self, now: float) -> float:
        """Seconds until the next attempt may go out."""
        return max(0.0, self.not_before - now)

    def after_success(self) -> Breaker:
        """Return a closed breaker."""
        return replace(self, failures=0, not_before=0.0)

    def after_failure(self, now: float, delay_s: float) -> Breaker:
        """Count a failure; wait `delay_s`, or the whole interval once open."""
        failures = min(self.failures + 1, 1_000)
        opened = failures >= self.failures_max
        wait_s = max(delay_s, self.interval_s) if opened else delay_s
        return replace(self, failures=failures, not_before=now + wait_s)

    def after_refusal(self, now: float) -> Breaker:
        """Open at once: the server answers, but it won't take writes until somebody acts."""
        return replace(self, failures=self.failures_max, not_before=now + self.interval_s)
