"""Cases for every store: a keyed request has one effect, however often it comes."""

from __future__ import annotations

import pytest

from local_store import TransactionIdReused
from syncer.sessions import (
    IdempotencyMismatch,
    PromptRevision,
    PromptSession,
    RequestKey,
    SessionNotFound,
    SessionStore,
)
from syncer.sessions.tables import SESSIONS
from tests.unit.session_store.support import ALICE, BOB, OpenStore, a_session, got


def key(name: str, asks: str = "this", user: str = ALICE) -> RequestKey:
    return RequestKey.derive(user, name, asks)


def keyed(request: RequestKey) -> PromptSession:
    session = a_session()
    session.session_id = request.row_id(SESSIONS)
    return session


class RequestCases:
    """What is known of a key, and what a repeat is told."""

    def test_a_key_is_unknown_until_it_was_used(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        request = key("k1")
        assert not sessions.knows(request)
        assert sessions.created_by(request) is None
        session = keyed(request)
        sessions.create(session, request=request)
        for store in (sessions, open_store(ALICE)):
            assert store.knows(request)
            assert store.created_by(request) == session

    def test_asking_about_a_key_uses_it_not_up(self, sessions: SessionStore) -> None:
        request = key("k1")
        for _ in range(3):
            assert not sessions.knows(request)
            assert sessions.created_by(request) is None
        sessions.create(keyed(request), request=request)

    def test_a_key_used_for_something_else_is_refused(self, sessions: SessionStore) -> None:
        request = key("k1")
        sessions.create(keyed(request), request=request)
        with pytest.raises(IdempotencyMismatch):
            sessions.created_by(key("k1", "that"))

    def test_a_second_creation_under_one_key_has_no_effect(self, sessions: SessionStore) -> None:
        request = key("k1")
        sessions.create(keyed(request), request=request)
        other = keyed(request)
        other.session_id = key("k2").row_id(SESSIONS)
        with pytest.raises(TransactionIdReused):
            sessions.create(other, request=request)
        assert sessions.get(other.session_id) is None

    def test_two_users_may_use_the_same_key(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        bobs = open_store(BOB)
        mine, theirs = key("k1"), key("k1", user=BOB)
        sessions.create(keyed(mine), request=mine)
        assert not bobs.knows(theirs)
        assert not bobs.knows(mine) or bobs.created_by(theirs) is None
        bobs.create(keyed(theirs), request=theirs)
        assert len(sessions.list_all()) == len(bobs.list_all()) == 1

    def test_children_of_a_keyed_request_keep_their_order(self, sessions: SessionStore) -> None:
        request = key("k1")
        session = keyed(request)
        for number in range(12):
            session.add_revision(PromptRevision(content=str(number), revision_type="manual_edit"))
        sessions.create(session, request=request)
        assert got(sessions, session).to_dict() == session.to_dict()

    def test_a_session_carries_the_requests_that_changed_it(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        appends, changes = key("k1"), key("k2")
        session.add_revision(PromptRevision(content="more", revision_type="manual_edit"))
        sessions.update(session, request=appends)
        session.finalize()
        sessions.update(session, request=changes)
        for store in (sessions, open_store(ALICE)):
            found = got(store, session)
            for request in (appends, changes):
                assert store.is_repeat(request, found, store.knows(request))
            with pytest.raises(IdempotencyMismatch):
                store.is_repeat(key("k1", "that"), found, store.knows(appends))
            assert not store.is_repeat(key("k3"), found, store.knows(key("k3")))

    def test_an_update_under_a_used_key_has_no_effect(self, sessions: SessionStore) -> None:
        session, other = a_session(), a_session()
        for each in (session, other):
            sessions.create(each)
        session.finalize()
        sessions.update(session, request=key("k1"))
        other.finalize()
        with pytest.raises(TransactionIdReused):
            sessions.update(other, request=key("k1", "that"))
        assert got(sessions, other).status == "active"

    def test_a_repeated_deletion_is_one_deletion(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session, other = a_session(), a_session()
        for each in (session, other):
            sessions.create(each)
        for store in (sessions, sessions, open_store(ALICE)):
            store.delete(session.session_id, request=key("k1"))
            assert store.knows(key("k1"))
        with pytest.raises(TransactionIdReused):
            sessions.delete(other.session_id, request=key("k1", "that"))
        assert sessions.list_all() == [other]

    def test_deleting_nothing_uses_no_key_up(self, sessions: SessionStore) -> None:
        sessions.delete(PromptSession.create_new().session_id, request=key("k1"))
        assert not sessions.knows(key("k1"))

    def test_what_a_request_created_and_somebody_deleted_does_not_come_back(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        request = key("k1")
        session = keyed(request)
        sessions.create(session, request=request)
        sessions.delete(session.session_id)
        for store in (sessions, open_store(ALICE)):
            with pytest.raises(SessionNotFound):
                store.created_by(request)
