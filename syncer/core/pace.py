"""How many transactions the next batch may carry.

Additive increase, multiplicative decrease: a server that comes back is met with a small batch,
one that struggles with a smaller one each time. When a whole call is refused for what it carries,
halving finds the one transaction that spoils it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PROBE = 5
"""The first batch after an outage: a real write, and little is lost if it fails."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A frozen value; each event gives the next one. `limit` counts transactions.

    `suspects` are transactions of a refused call that weren't delivered yet: while there are any,
    the limit doesn't grow, because a larger batch would only contain the culprit again.
    """

    limit_max: int = 500  # the knee of the batch RPC; larger batches gain < 5 %
    step: int = 50  # from a probe to full batches within ten successes
    limit: int = 0
    suspects: int = 0

    def __post_init__(self) -> None:
        """Begin at the maximum unless a limit is given."""
        if self.limit == 0:
            object.__setattr__(self, "limit", self.limit_max)

    def after_success(self, sent: int) -> Pace:
        """Grow by a step, unless a culprit is still being looked for."""
        if self.suspects > sent:
            return replace(self, suspects=self.suspects - sent)
        return replace(self, suspects=0, limit=min(self.limit_max, self.limit + self.step))

    def after_throttle(self, sent: int) -> Pace:
        """Halve: the server asked for less or ran out of time."""
        return replace(self, limit=max(1, min(self.limit, sent) // 2))

    def after_outage(self) -> Pace:
        """Start small: whoever comes back is met by all who waited."""
        return replace(self, limit=min(self.limit, PROBE, self.limit_max))

    def after_split(self, sent: int) -> Pace:
        """Halve the refused call of `sent` transactions; all of them are suspects."""
        return replace(self, limit=max(1, sent // 2), suspects=max(self.suspects, sent))

    def after_culprit(self) -> Pace:
        """Go on with what is left: the one that spoiled the call is out of it."""
        return replace(self, suspects=0, limit=min(self.limit_max, self.limit + self.step))
