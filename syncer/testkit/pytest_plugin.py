"""Fixtures for testing an application against a real local Supabase and its outages.

Registered as a pytest plugin by the distribution; nothing heavy is imported before a test asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from local_store import TableSpec
    from syncer.testkit.buffer import BufferedApp
    from syncer.testkit.fault_proxy import FaultProxy
    from syncer.testkit.local_supabase import LocalSupabase


@pytest.fixture(scope="session")
def local_supabase() -> Iterator[LocalSupabase]:
    """A migrated Supabase, one per test run; it ends with the run, also when that is killed."""
    from syncer.testkit.local_supabase import LocalSupabase

    with LocalSupabase.start() as stack:
        yield stack


@pytest.fixture
def fresh_supabase(local_supabase: LocalSupabase) -> LocalSupabase:
    """Give the Supabase of this run with empty tables and without memory of deliveries."""
    import psycopg

    with psycopg.connect(local_supabase.database_url, autocommit=True) as connection:
        found = connection.execute(
            "select format('%I.%I', schemaname, tablename) from pg_tables"
            " where schemaname = 'public' or (schemaname = 'sync'"
            " and tablename not in ('tables', 'schema_migrations'))"
        ).fetchall()
        if found:
            connection.execute(f"truncate {', '.join(name for (name,) in found)} cascade")
    return local_supabase


@pytest.fixture
def fault_proxy(fresh_supabase: LocalSupabase) -> Iterator[FaultProxy]:
    """A proxy in front of the run's Supabase: point the application at `fault_proxy.url`."""
    from syncer.testkit.fault_proxy import FaultProxy

    host, port = fresh_supabase.url.removeprefix("http://").split(":")
    with FaultProxy.start(host, int(port)) as proxy:
        yield proxy


@pytest.fixture
def buffered_store(
    fresh_supabase: LocalSupabase, fault_proxy: FaultProxy, tmp_path: Path
) -> Iterator[Callable[..., BufferedApp]]:
    """Make containers: each `buffered_store(tables)` is a buffer that delivers by the proxy."""
    from syncer.testkit.buffer import BufferedApp

    made: list[BufferedApp] = []

    def make(tables: Sequence[TableSpec], **limits: Any) -> BufferedApp:
        folder = tmp_path / f"buffer-{len(made)}"
        app = BufferedApp(folder, tables, fault_proxy.url, fresh_supabase.secret_key, **limits)
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()
