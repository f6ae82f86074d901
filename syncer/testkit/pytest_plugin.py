"""Fixtures for testing an application against a real local Supabase and its outages.

Registered as a pytest plugin by the distribution; nothing heavy is imported before a test asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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
