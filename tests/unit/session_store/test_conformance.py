"""The stores that need no server keep what every session store promises."""

from __future__ import annotations

import pytest

from local_store import LocalStore
from syncer.sessions import BufferedSessionStore, InMemorySessionStore, MemoryRows
from tests.unit.session_store.conformance import SessionStoreConformance
from tests.unit.session_store.support import OpenStore


class TestBufferedSessionStore(SessionStoreConformance):
    @pytest.fixture
    def open_store(self, local: LocalStore) -> OpenStore:
        return lambda user_id, **more: BufferedSessionStore(local, user_id, **more)


class TestInMemorySessionStore(SessionStoreConformance):
    @pytest.fixture
    def open_store(self) -> OpenStore:
        rows = MemoryRows()
        return lambda user_id, **more: InMemorySessionStore(user_id, rows, **more)
