"""When a write may be acknowledged: from the buffer, or once it outlives the container."""

from __future__ import annotations

from typing import Literal

from syncer.core.breaker import BreakerState

AckMode = Literal["local", "volume", "remote", "adaptive"]


def must_ship(
    mode: AckMode,
    *,
    delivers: bool,
    breaker: BreakerState,
    oldest_age_s: float | None,
    adaptive_after_s: float,
) -> bool:
    """Tell whether what is acknowledged now must be on the Volume first.

    `adaptive` is `local` while Supabase takes writes as fast as they come: then a container's loss
    costs at most the writes of `adaptive_after_s` seconds. When nobody in this process delivers,
    the breaker isn't closed, or the oldest undelivered write is older than that, it is `volume`.
    """
    if mode != "adaptive":
        return mode == "volume"
    if not delivers or breaker != "closed":
        return True
    return oldest_age_s is not None and oldest_age_s > adaptive_after_s
