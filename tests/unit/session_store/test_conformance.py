"""The stores that need no server keep what every session store promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from local_store import LocalStore
from syncer.sessions import (
    BufferedSessionStore,
    ConcurrentModificationError,
    InMemorySessionStore,
    MemoryRows,
    PromptSession,
)
from syncer.sessions.documents import Documents
from tests.unit.session_store.conformance import SessionStoreConformance
from tests.unit.session_store.support import ALICE, OpenStore, assert_lists_show_what_is_there, got


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


def test_rows_that_another_store_read_are_no_ground_for_a_change() -> None:
    here, elsewhere = InMemorySessionStore(ALICE), InMemorySessionStore(ALICE)
    session = PromptSession.create_new()
    elsewhere.create(PromptSession.from_dict(session.to_dict()))
    session.metadata["who"] = "they"
    here.create(session)
    loaded = elsewhere.load(session.session_id)
    assert loaded is not None
    loaded.metadata["who"] = "I"
    with pytest.raises(ConcurrentModificationError):
        here.update(loaded)  # both are at their first version
    assert got(here, session).metadata == {"who": "they"}
