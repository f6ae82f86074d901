"""Cases for every store: what a copy that isn't the latest may and may not do."""

from __future__ import annotations

import copy

import pytest

from syncer.sessions import (
    ConcurrentModificationError,
    IRDraft,
    PromptSession,
    SessionNotFound,
    SessionStore,
)
from tests.unit.session_store.support import ALICE, OpenStore, a_revision, a_session, got


class StaleCopyCases:
    """What merges, what clashes, and what is never lost."""

    def test_the_second_change_of_one_field_is_refused_and_names_it(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session()
        sessions.create(session)
        stale = got(sessions, session)
        session.status, stale.status = "finalized", "abandoned"
        sessions.update(session)
        with pytest.raises(ConcurrentModificationError) as raised:
            sessions.update(stale)
        assert raised.value.fields == ("status",)
        assert raised.value.session_id == session.session_id
        assert got(sessions, session).status == "finalized"

    def test_both_making_the_same_change_is_no_conflict(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        stale = got(sessions, session)
        session.finalize()
        stale.finalize()
        sessions.update(session)
        sessions.update(stale)
        assert got(sessions, session).status == "finalized"

    def test_disjoint_changes_merge_down_to_metadata_keys(self, sessions: SessionStore) -> None:
        session = a_session(mine=1, theirs=1, gone=1)
        sessions.create(session)
        stale = got(sessions, session)
        session.metadata["theirs"] = 2
        session.status = "finalized"
        sessions.update(session)
        stale.metadata["mine"] = 2
        del stale.metadata["gone"]
        sessions.update(stale)
        found = got(sessions, session)
        assert found.metadata == {"mine": 2, "theirs": 2}
        assert found.status == "finalized"

    def test_one_metadata_key_changed_twice_is_refused(self, sessions: SessionStore) -> None:
        session = a_session(key=1)
        sessions.create(session)
        stale = got(sessions, session)
        session.metadata["key"], stale.metadata["key"] = 2, 3
        sessions.update(session)
        with pytest.raises(ConcurrentModificationError) as raised:
            sessions.update(stale)
        assert raised.value.fields == ("metadata.key",)

    def test_children_appended_to_stale_copies_all_stay(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        copies = [got(sessions, session) for _ in range(4)]
        for number, stale in enumerate(copies):
            stale.revisions.append(a_revision(str(number)))
            sessions.update(stale)
        copies[0].revisions.append(a_revision("again"))
        sessions.update(copies[0])
        contents = [r.content for r in got(sessions, session).revisions]
        assert contents == ["Sort a list", "0", "1", "2", "3", "again"]

    def test_two_copies_that_both_set_a_new_current_draft_clash(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session()
        sessions.create(session)
        one, other = got(sessions, session), got(sessions, session)
        one.add_draft(IRDraft(version=2, ir={"by": "one"}))
        other.add_draft(IRDraft(version=2, ir={"by": "other"}))
        sessions.update(one)
        with pytest.raises(ConcurrentModificationError) as raised:
            sessions.update(other)
        assert raised.value.fields == ("current_draft",)
        assert len(got(sessions, session).ir_drafts) == 2

    def test_a_child_that_was_removed_meanwhile_is_not_changed(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        stale, untouched = got(sessions, session), got(sessions, session)
        session.revisions.clear()
        sessions.update(session)
        stale.revisions[0].content = "changed"
        with pytest.raises(ConcurrentModificationError) as raised:
            sessions.update(stale)
        assert raised.value.fields == ("revisions[0]",)
        untouched.metadata["x"] = 1
        sessions.update(untouched)
        assert got(sessions, session).revisions == []

    def test_removing_a_child_that_was_changed_meanwhile_is_refused(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session()
        sessions.create(session)
        stale = got(sessions, session)
        session.revisions[0].content = "changed"
        sessions.update(session)
        stale.revisions.clear()
        with pytest.raises(ConcurrentModificationError):
            sessions.update(stale)

    def test_a_stale_copy_does_not_turn_updated_at_back(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        stale = got(sessions, session)
        session.updated_at, stale.updated_at = "2030-01-02T00:00:00Z", "2030-01-01T00:00:00Z"
        sessions.update(session)
        stale.metadata["x"] = 1
        sessions.update(stale)
        assert got(sessions, session).updated_at == "2030-01-02T00:00:00Z"

    def test_a_fresh_object_may_be_updated_again_and_again(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        for number in range(3):
            session.metadata["n"] = number
            session.add_revision(a_revision(str(number)))
            sessions.update(session)
        assert got(sessions, session) == session

    def test_an_object_made_from_a_document_is_accepted_and_removes_nothing(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session()
        sessions.create(session)
        document = session.to_dict()
        session.add_revision(a_revision("meanwhile"))
        sessions.update(session)
        fresh = PromptSession.from_dict(document)
        for number in range(2):
            fresh.metadata["n"] = number
            fresh.revisions.append(a_revision(f"f{number}"))
            sessions.update(fresh)
        found = got(sessions, session)
        assert found.metadata["n"] == 1
        assert [r.content for r in found.revisions] == ["Sort a list", "meanwhile", "f0", "f1"]

    def test_a_deep_copy_is_as_stale_as_its_original(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        twin = copy.deepcopy(got(sessions, session))
        session.status = "finalized"
        sessions.update(session)
        twin.status = "abandoned"
        with pytest.raises(ConcurrentModificationError):
            sessions.update(twin)

    def test_a_refused_copy_leaves_nothing_of_itself_behind(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        stale = got(sessions, session)
        session.status, stale.status = "finalized", "abandoned"
        sessions.update(session)
        stale.metadata["more"] = 1
        stale.add_revision(a_revision("more"))
        with pytest.raises(ConcurrentModificationError):
            sessions.update(stale)
        assert got(sessions, session).to_dict() == session.to_dict()

    def test_a_copy_is_stale_to_another_store_object_too(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        other = open_store(ALICE)
        stale = got(other, session)
        session.finalize()
        sessions.update(session)
        stale.abandon()
        with pytest.raises(ConcurrentModificationError):
            other.update(stale)
        assert got(other, session).status == "finalized"

    def test_a_copy_of_a_deleted_session_does_not_bring_it_back(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        changed, appended = got(sessions, session), got(sessions, session)
        sessions.delete(session.session_id)
        changed.finalize()
        appended.revisions.append(a_revision("too late"))
        for stale in (changed, appended):
            with pytest.raises(SessionNotFound):
                sessions.update(stale)
        assert sessions.get(session.session_id) is None
        assert sessions.list_all() == []

    def test_a_result_of_an_update_is_the_base_of_the_next(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        mine = got(sessions, session)
        mine.metadata["n"] = 1
        sessions.update(mine)
        session.status = "finalized"
        sessions.update(session)
        mine.metadata["n"] = 2
        sessions.update(mine)
        found = got(sessions, session)
        assert (found.metadata, found.status) == ({"n": 2}, "finalized")

    def test_removing_a_child_that_is_gone_already_is_no_conflict(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        one, other = got(sessions, session), got(sessions, session)
        for stale in (one, other):
            stale.revisions.clear()
            sessions.update(stale)
        assert got(sessions, session).revisions == []

    def test_an_equal_draft_in_the_place_of_the_current_one_is_the_same_draft(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        session.add_draft(session.ir_drafts[0].model_copy())
        session.add_draft(IRDraft(version=2, ir={}))
        session.current_draft = session.ir_drafts[0]
        sessions.create(session)
        found = got(sessions, session)
        assert found.current_draft is found.ir_drafts[0]
        found.current_draft = found.ir_drafts[0].model_copy(deep=True)
        found.metadata["n"] = 1
        sessions.update(found)
        again = got(sessions, session)
        assert again.current_draft is again.ir_drafts[0]
        again.current_draft = again.ir_drafts[2].model_copy(deep=True)
        sessions.update(again)
        last = got(sessions, session)
        assert last.current_draft is last.ir_drafts[2]
