"""Who may, what is refused, and what a stale copy can not do."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from local_store import InvalidWrite, LocalStore, user_uuid
from syncer.sessions import (
    BufferedSessionStore,
    ConcurrentModificationError,
    IRDraft,
    PromptRevision,
    PromptSession,
    SessionNotFound,
)
from tests.unit.session_store.support import ALICE, BOB, a_session, got

# -- who may, and what is refused ------------------------------------------------------------------


def test_a_foreign_users_session_is_absent(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    bobs = BufferedSessionStore(local, BOB)
    assert bobs.get(session.session_id) is None
    assert bobs.list_all() == []
    with pytest.raises(SessionNotFound):
        bobs.update(PromptSession.from_dict(session.to_dict()))
    bobs.delete(session.session_id)
    assert sessions.get(session.session_id) == session


def test_a_session_of_another_user_is_refused_by_name(sessions: BufferedSessionStore) -> None:
    session = a_session()
    session.user_id = BOB
    with pytest.raises(InvalidWrite) as raised:
        sessions.create(session)
    assert raised.value.column == "user_id"


def test_the_users_uuid_is_as_good_as_its_name(sessions: BufferedSessionStore) -> None:
    session = a_session()
    session.user_id = user_uuid(ALICE)
    sessions.create(session)
    assert got(sessions, session).user_id == user_uuid(ALICE)


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
def test_what_could_not_be_delivered_is_refused_naming_the_field(
    sessions: BufferedSessionStore, local: LocalStore, spoil: Any, column: str
) -> None:
    session = a_session()
    spoil(session)
    with pytest.raises(InvalidWrite) as raised:
        sessions.create(session)
    assert raised.value.column == column
    assert local.stats()["last_seq"] == 0


def test_a_taken_id_is_refused(sessions: BufferedSessionStore, local: LocalStore) -> None:
    session = a_session()
    sessions.create(session)
    with pytest.raises(InvalidWrite):
        sessions.create(PromptSession.from_dict(session.to_dict()))
    with pytest.raises(InvalidWrite):
        BufferedSessionStore(local, BOB).create(PromptSession.from_dict(session.to_dict()))


@pytest.mark.parametrize("malformed", ["", "x", "../../etc/passwd", "1;drop table", None, 7])
def test_a_malformed_id_names_no_session(through: BufferedSessionStore, malformed: Any) -> None:
    assert through.get(malformed) is None
    through.delete(malformed)


def test_updating_an_absent_session_is_a_key_error(sessions: BufferedSessionStore) -> None:
    with pytest.raises(KeyError, match="not found"):
        sessions.update(PromptSession.create_new())


def test_a_deleted_session_is_absent_with_its_children(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    stale = got(sessions, session)
    sessions.delete(session.session_id)
    assert sessions.get(session.session_id) is None
    assert local.select("session_revisions", user_id=ALICE) == []
    stale.add_revision(PromptRevision(content="too late", revision_type="manual_edit"))
    with pytest.raises(SessionNotFound):
        sessions.update(stale)
    sessions.delete(session.session_id)
    assert local.stats()["last_seq"] == 2, "deleting twice writes once"


# -- stale copies ----------------------------------------------------------------------------------


def test_the_second_change_of_one_field_is_refused_and_names_it(
    sessions: BufferedSessionStore,
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


def test_both_making_the_same_change_is_no_conflict(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    stale = got(sessions, session)
    session.finalize()
    stale.finalize()
    sessions.update(session)
    sessions.update(stale)
    assert got(sessions, session).status == "finalized"


def test_disjoint_changes_merge_down_to_metadata_keys(sessions: BufferedSessionStore) -> None:
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


def test_one_metadata_key_changed_twice_is_refused(sessions: BufferedSessionStore) -> None:
    session = a_session(key=1)
    sessions.create(session)
    stale = got(sessions, session)
    session.metadata["key"], stale.metadata["key"] = 2, 3
    sessions.update(session)
    with pytest.raises(ConcurrentModificationError) as raised:
        sessions.update(stale)
    assert raised.value.fields == ("metadata.key",)


def test_children_appended_to_stale_copies_all_stay(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    copies = [got(sessions, session) for _ in range(4)]
    for number, stale in enumerate(copies):
        stale.revisions.append(PromptRevision(content=str(number), revision_type="manual_edit"))
        sessions.update(stale)
    copies[0].revisions.append(PromptRevision(content="again", revision_type="manual_edit"))
    sessions.update(copies[0])
    contents = [r.content for r in got(sessions, session).revisions]
    assert contents == ["Sort a list", "0", "1", "2", "3", "again"]


def test_two_copies_that_both_set_a_new_current_draft_clash(
    sessions: BufferedSessionStore,
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


def test_a_child_that_was_removed_meanwhile_is_not_changed(sessions: BufferedSessionStore) -> None:
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
    sessions: BufferedSessionStore,
) -> None:
    session = a_session()
    sessions.create(session)
    stale = got(sessions, session)
    session.revisions[0].content = "changed"
    sessions.update(session)
    stale.revisions.clear()
    with pytest.raises(ConcurrentModificationError):
        sessions.update(stale)


def test_a_stale_copy_does_not_turn_updated_at_back(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    stale = got(sessions, session)
    session.updated_at, stale.updated_at = "2030-01-02T00:00:00Z", "2030-01-01T00:00:00Z"
    sessions.update(session)
    stale.metadata["x"] = 1
    sessions.update(stale)
    assert got(sessions, session).updated_at == "2030-01-02T00:00:00Z"


def test_a_fresh_object_may_be_updated_again_and_again(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    for number in range(3):
        session.metadata["n"] = number
        session.add_revision(PromptRevision(content=str(number), revision_type="manual_edit"))
        sessions.update(session)
    assert got(sessions, session) == session


def test_an_object_made_from_a_document_is_accepted_and_removes_nothing(
    sessions: BufferedSessionStore,
) -> None:
    session = a_session()
    sessions.create(session)
    document = session.to_dict()
    session.add_revision(PromptRevision(content="meanwhile", revision_type="manual_edit"))
    sessions.update(session)
    fresh = PromptSession.from_dict(document)
    for number in range(2):
        fresh.metadata["n"] = number
        fresh.revisions.append(PromptRevision(content=f"f{number}", revision_type="manual_edit"))
        sessions.update(fresh)
    found = got(sessions, session)
    assert found.metadata["n"] == 1
    assert [r.content for r in found.revisions] == ["Sort a list", "meanwhile", "f0", "f1"]


def test_a_deep_copy_is_as_stale_as_its_original(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    twin = copy.deepcopy(got(sessions, session))
    session.status = "finalized"
    sessions.update(session)
    twin.status = "abandoned"
    with pytest.raises(ConcurrentModificationError):
        sessions.update(twin)


def test_appends_from_many_threads_all_stay(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)

    def append(number: int) -> None:
        mine = got(sessions, session)
        mine.add_revision(PromptRevision(content=str(number), revision_type="manual_edit"))
        sessions.update(mine)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(24)))
    contents = {r.content for r in got(sessions, session).revisions[1:]}
    assert contents == {str(number) for number in range(24)}
