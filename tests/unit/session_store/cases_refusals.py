"""Cases for every store: who may, what is refused, what is absent."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from local_store import InvalidWrite, user_uuid
from local_store.clock import new_id
from syncer.sessions import PromptSession, SessionNotFound, SessionStore
from tests.unit.session_store.support import ALICE, BOB, OpenStore, a_session, got


class RefusalCases:
    """Users see their own sessions only; what can't be stored is named."""

    def test_a_foreign_users_session_is_absent(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        bobs = open_store(BOB)
        assert bobs.get(session.session_id) is None
        assert bobs.load(session.session_id) is None
        assert bobs.list_all() == bobs.list_active() == bobs.list_page().sessions == []
        with pytest.raises(SessionNotFound):
            bobs.update(PromptSession.from_dict(session.to_dict()))
        bobs.delete(session.session_id)
        assert got(sessions, session) == session

    def test_a_store_says_whose_it_is(self, open_store: OpenStore) -> None:
        assert open_store(ALICE).user_id == ALICE

    def test_a_session_of_another_user_is_refused_by_name(self, sessions: SessionStore) -> None:
        session = a_session()
        session.user_id = BOB
        with pytest.raises(InvalidWrite) as raised:
            sessions.create(session)
        assert raised.value.column == "user_id"
        session.user_id = None
        sessions.create(session)
        session.user_id = BOB
        with pytest.raises(InvalidWrite):
            sessions.update(session)

    def test_the_users_uuid_is_as_good_as_its_name(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        session.user_id = user_uuid(ALICE)
        sessions.create(session)
        assert got(sessions, session).user_id == user_uuid(ALICE)
        assert got(open_store(user_uuid(ALICE)), session) == session

    @pytest.mark.parametrize(
        ("spoil", "column"),
        [
            (lambda s: setattr(s.revisions[0], "content", "a\x00b"), "content"),
            (lambda s: s.metadata.update(x=float("nan")), "metadata.x"),
            (lambda s: s.metadata.update(x="\ud800"), "metadata.x"),
            (lambda s: s.ir_drafts[0].ir.update(n=2**64), "ir.n"),
            (lambda s: setattr(s, "status", "lost"), "status"),
            (lambda s: setattr(s, "session_id", "nonsense"), "id"),
            (lambda s: setattr(s, "created_at", "x\x00"), "client.created_at"),
        ],
    )
    def test_what_could_not_be_stored_is_refused_naming_the_field(
        self, sessions: SessionStore, spoil: Any, column: str
    ) -> None:
        session = a_session()
        spoil(session)
        with pytest.raises(InvalidWrite) as raised:
            sessions.create(session)
        assert raised.value.column == column
        assert sessions.list_all() == []

    def test_a_refused_update_changes_nothing(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        before = session.to_dict()
        session.finalize()
        session.metadata["x"] = {1, 2}
        with pytest.raises(InvalidWrite):
            sessions.update(session)
        assert got(sessions, session).to_dict() == before
        del session.metadata["x"]
        sessions.update(session)
        assert got(sessions, session) == session

    def test_a_value_that_only_equals_a_json_value_is_refused_too(
        self, sessions: SessionStore
    ) -> None:
        session = a_session(n=1)
        sessions.create(session)
        session.metadata["n"] = Decimal(1)
        with pytest.raises(InvalidWrite):
            sessions.update(session)

    def test_a_taken_id_is_refused_for_everybody(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        again = PromptSession.from_dict({**session.to_dict(), "status": "abandoned"})
        for store in (sessions, open_store(BOB)):
            with pytest.raises(InvalidWrite) as raised:
                store.create(again)
            assert raised.value.column == "id"
        assert got(sessions, session) == session

    @pytest.mark.parametrize("malformed", ["", "x", "../../etc/passwd", "1;drop table", None, 7])
    def test_a_malformed_id_names_no_session(self, sessions: SessionStore, malformed: Any) -> None:
        assert sessions.get(malformed) is None
        assert sessions.load(malformed) is None
        sessions.delete(malformed)
        session = PromptSession.create_new()
        session.session_id = malformed
        with pytest.raises(SessionNotFound):
            sessions.update(session)

    def test_an_id_may_be_written_in_any_form_of_a_uuid(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        found = sessions.get(session.session_id.upper().replace("-", ""))
        assert found == session

    def test_updating_an_absent_session_is_a_key_error(self, sessions: SessionStore) -> None:
        with pytest.raises(KeyError, match="not found"):
            sessions.update(PromptSession.create_new())

    def test_an_absent_session_is_none_and_deleting_it_does_nothing(
        self, sessions: SessionStore
    ) -> None:
        missing = new_id()
        assert sessions.get(missing) is None
        sessions.delete(missing)
        assert sessions.list_all() == []

    def test_a_deleted_session_is_absent(self, sessions: SessionStore) -> None:
        kept, gone = a_session(), a_session()
        for session in (kept, gone):
            sessions.create(session)
        for _ in range(2):
            sessions.delete(gone.session_id)
        assert sessions.get(gone.session_id) is None
        assert sessions.list_all() == [kept]

    def test_an_id_may_be_used_again_after_its_session_was_deleted(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        sessions.delete(session.session_id)
        again = PromptSession.create_new(metadata={"second": True})
        again.session_id = session.session_id
        sessions.create(again)
        found = got(sessions, again)
        assert (found.metadata, found.revisions) == ({"second": True}, [])
