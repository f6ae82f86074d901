"""The conformance suite on real Postgres and PostgREST, and what only the server can show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from syncer.audit import audit
from syncer.remote import SupabaseRemote
from syncer.sessions import (
    BufferedSessionStore,
    InMemorySessionStore,
    MemoryRows,
    SupabaseSessionStore,
)
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from tests.unit.session_store.conformance import SessionStoreConformance
from tests.unit.session_store.support import OpenStore


class TestSupabaseSessionStore(SessionStoreConformance):
    """Straight to the server; each case ends with a balanced audit."""

    @pytest.fixture
    def open_store(self, remote: SupabaseRemote) -> Iterator[OpenStore]:
        yield lambda user_id, **more: SupabaseSessionStore(remote, user_id, **more)
        assert audit(remote).balanced


class TestBufferedSessionStore(SessionStoreConformance):
    """Each write is delivered at once and each read goes through: all values pass Postgres."""

    @pytest.fixture
    def open_store(self, buffered_store: Callable[..., BufferedApp]) -> Iterator[OpenStore]:
        app = buffered_store(SESSION_TABLES)
        one_at_a_time = threading.Lock()

        def deliver() -> None:
            with one_at_a_time:
                app.drain()

        app.store.on_write(deliver)
        yield lambda user_id, **more: BufferedSessionStore(
            app.store, user_id, app.remote, read_budget_s=10.0, **more
        )
        app.drain()
        assert app.audit().balanced


class TestInMemorySessionStore(SessionStoreConformance):
    @pytest.fixture
    def open_store(self) -> OpenStore:
        rows = MemoryRows()
        return lambda user_id, **more: InMemorySessionStore(user_id, rows, **more)
