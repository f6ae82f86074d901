"""The stores that need no server keep what every session store promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from local_store import LocalStore
from syncer.sessions import BufferedSessionStore, InMemorySessionStore, MemoryRows
from syncer.sessions.documents import Documents
from tests.unit.session_store.conformance import SessionStoreConformance
from tests.unit.session_store.support import OpenStore, assert_lists_show_what_is_there


class TestBufferedSessionStore(SessionStoreConformance):
    """Whatever a case leaves, lists show it as `get` does; also from documents kept since."""

    @pytest.fixture
    def open_store(self, local: LocalStore) -> Iterator[OpenStore]:
        documents, users = Documents(), set()

        def opened(user_id: str, **more: Any) -> BufferedSessionStore:
            users.add(user_id)
            store = BufferedSessionStore(local, user_id, documents=documents, **more)
            assert_lists_show_what_is_there(store)
            return store

        yield opened
        for user_id in users:
            store = BufferedSessionStore(local, user_id, documents=documents)
            assert_lists_show_what_is_there(store)
            assert_lists_show_what_is_there(store)


class TestInMemorySessionStore(SessionStoreConformance):
    @pytest.fixture
    def open_store(self) -> OpenStore:
        rows = MemoryRows()
        return lambda user_id, **more: InMemorySessionStore(user_id, rows, **more)
