"""What the tests of the session store share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from local_store import LocalStore
from syncer.sessions import (
    BufferedSessionStore,
    IRDraft,
    PromptRevision,
    PromptSession,
    SessionStore,
)
from tests.unit.session_server import ReadServer

OpenStore = Callable[..., SessionStore]
"""Opens a user's store: each call another object on the same rows; `ids` gives its fresh ids."""

ALICE, BOB = "github:42", "0d9e0c1e-6f0f-4d39-9d0e-000000000001"


def a_session(**metadata: Any) -> PromptSession:
    session = PromptSession.create_new(metadata=metadata)
    session.add_revision(PromptRevision(content="Sort a list", revision_type="initial"))
    session.add_draft(IRDraft(version=1, ir={"a": [1, 2.5, None, {"b": "ü"}]}, ambiguities=["h"]))
    return session


def a_revision(content: str) -> PromptRevision:
    return PromptRevision(content=content, revision_type="manual_edit")


def got(store: SessionStore, session: PromptSession) -> PromptSession:
    found = store.get(session.session_id)
    assert found is not None
    return found


def documents_of(store: BufferedSessionStore) -> list[Any]:
    """Return all sessions as the API's list shows them."""
    found: list[Any] = orjson.loads(store.list_documents(limit=1_000).sessions)
    return found


def assert_lists_show_what_is_there(store: BufferedSessionStore) -> None:
    found = store.list_all()
    infos = store.sync_infos(found)
    expected = [
        {**session.to_dict(), "sync": info.to_dict()}
        for session, info in zip(found, infos, strict=True)
    ]
    assert documents_of(store) == expected
    assert [document_of(store, session.session_id) for session in found] == expected


def document_of(store: BufferedSessionStore, session_id: str) -> Any:
    """Return a session as the API shows it, None when there is none."""
    text = store.get_document(session_id)
    return None if text is None else orjson.loads(text)


def delivered(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> PromptSession:
    """Return a session that the server has and that is clean here."""
    session = a_session()
    through.create(session)
    server.deliver(local)
    return session
