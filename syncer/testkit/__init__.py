"""What ships for testing applications against outages: a local Supabase, faults, drills."""

from __future__ import annotations

from typing import Any

__all__ = ["BufferedApp", "outage", "wait_until"]


def __getattr__(name: str) -> Any:
    """Import on first use: the pytest plugin loads this package in every test run."""
    if name in __all__:
        from syncer.testkit import buffer

        return getattr(buffer, name)
    raise AttributeError(name)
