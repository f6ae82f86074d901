"""Cases for every store: what goes in comes out, verbatim, in order and as a copy."""

from __future__ import annotations

from typing import Any

import pytest

from syncer.sessions import (
    HoleResolution,
    InvalidCursor,
    IRDraft,
    PromptRevision,
    PromptSession,
    SessionStore,
)
from tests.unit.session_store.support import ALICE, a_session, got


class RoundTripCases:
    """What is stored, shown and listed."""

    def test_a_created_session_is_read_back_equal_and_as_a_copy(
        self, sessions: SessionStore
    ) -> None:
        session = a_session(tags=["demo"])
        before = session.to_dict()
        assert sessions.create(session) == session.session_id
        found = got(sessions, session)
        assert found.to_dict() == before
        assert session.to_dict() == before
        found.metadata["tags"].append("changed")
        found.ir_drafts[0].ir["a"].append("changed")
        assert got(sessions, session).to_dict() == before

    def test_an_object_that_is_changed_after_it_was_stored_changes_nothing_here(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session(tags=["demo"])
        before = session.to_dict()
        sessions.create(session)
        session.metadata["tags"].append("later")
        session.revisions[0].content = "later"
        assert got(sessions, session).to_dict() == before

    def test_the_clients_strings_stay_verbatim(self, sessions: SessionStore) -> None:
        odd = "2025-10-19T00:00:00.120000+00:00Z"
        session = a_session()
        session.user_id = ALICE
        session.created_at, session.updated_at = odd, "2025-10-19T00:00:01Z"
        session.revisions[0].timestamp = odd
        session.ir_drafts[0].created_at = "2025-10-19T02:00:00+02:00"
        answer = HoleResolution(hole_id="h", resolution_text="x", timestamp="no timestamp at all")
        session.pending_resolutions.append(answer)
        sessions.create(session)
        assert got(sessions, session).to_dict() == session.to_dict()

    def test_a_session_without_a_user_id_comes_back_without_one(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        assert got(sessions, session).user_id is None

    @pytest.mark.parametrize(
        "text", ["Straße 東京 مرحبا 🧾‍🔧", "\u202eright to left", "a\tb\r\n\\u0000"]
    )
    def test_unicode_survives(self, sessions: SessionStore, text: str) -> None:
        session = a_session(**{text: [text], "__proto__": {"x": 1}})
        session.revisions[0].content = text
        session.ir_drafts[0].ir = {text: {"deep": [text]}}
        sessions.create(session)
        assert got(sessions, session) == session

    def test_duplicate_draft_versions_and_repeated_answers_stay(
        self,
        sessions: SessionStore,
    ) -> None:
        session = a_session()
        draft = session.ir_drafts[0]
        session.add_draft(draft)  # the very same object again, as ordinary traffic does
        session.add_draft(IRDraft(version=1, ir={"other": True}))
        for text in ("first", "second", "second"):
            session.add_resolution(HoleResolution(hole_id="h", resolution_text=text))
        sessions.create(session)
        found = got(sessions, session)
        assert found.to_dict() == session.to_dict()
        assert [r.resolution_text for r in found.pending_resolutions] == [
            "first",
            "second",
            "second",
        ]

    def test_a_current_draft_older_than_the_last_is_kept(self, sessions: SessionStore) -> None:
        session = a_session()
        first = session.ir_drafts[0]
        session.add_draft(IRDraft(version=2, ir={}))
        session.current_draft = first
        sessions.create(session)
        found = got(sessions, session)
        assert found.current_draft is found.ir_drafts[0]
        found.current_draft = found.ir_drafts[1]
        sessions.update(found)
        assert got(sessions, session).current_draft == found.ir_drafts[1]

    def test_removed_metadata_keys_are_gone(self, sessions: SessionStore) -> None:
        session = a_session(a=1, b={"c": 2})
        sessions.create(session)
        found = got(sessions, session)
        del found.metadata["a"]
        found.metadata["b"] = None
        sessions.update(found)
        assert got(sessions, session).metadata == {"b": None}

    def test_true_in_the_place_of_one_is_a_change(self, sessions: SessionStore) -> None:
        session = a_session(flag=1)
        sessions.create(session)
        session.metadata["flag"] = True
        sessions.update(session)
        assert got(sessions, session).metadata["flag"] is True

    def test_children_may_be_changed_and_removed(self, sessions: SessionStore) -> None:
        session = a_session()
        session.add_revision(PromptRevision(content="second", revision_type="manual_edit"))
        session.add_resolution(HoleResolution(hole_id="h", resolution_text="x"))
        sessions.create(session)
        found = got(sessions, session)
        found.revisions.pop(0)
        found.mark_resolution_applied("h")
        sessions.update(found)
        again = got(sessions, session)
        assert [r.content for r in again.revisions] == ["second"]
        assert again.pending_resolutions[0].applied

    def test_a_megabyte_of_metadata_passes(self, sessions: SessionStore) -> None:
        session = a_session(big="x" * 1_000_000)
        sessions.create(session)
        assert got(sessions, session).metadata == session.metadata

    def test_children_keep_their_order_over_many_writes(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)
        for number in range(20):
            session.add_revision(PromptRevision(content=str(number), revision_type="manual_edit"))
            session.add_revision(PromptRevision(content=f"{number}b", revision_type="manual_edit"))
            sessions.update(session)
        contents = [r.content for r in got(sessions, session).revisions[1:]]
        assert contents == [text for n in range(20) for text in (str(n), f"{n}b")]

    def test_lists_are_filtered_and_newest_first(self, sessions: SessionStore) -> None:
        made = [a_session(n=number) for number in range(4)]
        for session in made:
            sessions.create(session)
        made[1].finalize()
        sessions.update(made[1])
        assert sessions.list_all() == [made[3], made[2], made[1], made[0]]
        assert sessions.list_active() == [made[3], made[2], made[0]]

    def test_pages_follow_each_other_without_gap_or_repetition(
        self, sessions: SessionStore
    ) -> None:
        made = [a_session(n=number) for number in range(7)]
        for session in made:
            sessions.create(session)
        seen: list[PromptSession] = []
        cursor = None
        while True:
            page = sessions.list_page("active", limit=3, cursor=cursor)
            assert page.complete
            seen += page.sessions
            cursor = page.next
            if cursor is None:
                break
        assert seen == made[::-1]

    @pytest.mark.parametrize("cursor", ["", "x", "é", "aGVsbG8", "!!!!", "fHw"])
    def test_a_made_up_cursor_is_refused(self, sessions: SessionStore, cursor: str) -> None:
        with pytest.raises(InvalidCursor):
            sessions.list_page(cursor=cursor)

    @pytest.mark.parametrize(
        "stamp",
        [
            "2025-10-19T00:00:00.120000+00:00Z",
            "2025-10-19T00:00:00Z",
            "2025-10-19T00:00:00+00:00",
            "2025-10-19 00:00",
            "yesterday",
            "",
        ],
    )
    def test_every_timestamp_stays_as_it_was_written_also_by_an_update(
        self, sessions: SessionStore, stamp: str
    ) -> None:
        session = a_session()
        session.add_resolution(HoleResolution(hole_id="h", resolution_text="x"))
        sessions.create(session)
        changed = got(sessions, session)
        changed.created_at = changed.updated_at = stamp
        changed.revisions[0].timestamp = stamp
        changed.ir_drafts[0].created_at = stamp
        changed.pending_resolutions[0].timestamp = stamp
        sessions.update(changed)
        found = got(sessions, session)
        assert found.to_dict() == changed.to_dict()
        assert found.pending_resolutions[0].timestamp == stamp

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            {},
            {"": {"": [None, True, False, ""]}},
            [1, 1.0, -0.5, 0.1, 1e-300, 5e-324],
            [2**63 - 1, -(2**63), 2**53 + 1],
            [1e23, -1e308, 1.7976931348623157e308],
            {"z": 1, "a": {"z": 1, "a": 2}},
            "x" * 100_000,
            [[[[[[[[[[{"deep": [1]}]]]]]]]]]],
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_an_ir_is_opaque_json(self, sessions: SessionStore, value: Any) -> None:
        session = PromptSession.create_new(initial_draft=IRDraft(version=1, ir={"v": value}))
        sessions.create(session)
        found = got(sessions, session)
        assert found.current_draft is not None
        assert found.current_draft.ir == {"v": value}
        found.metadata["n"] = 1
        sessions.update(found)
        assert got(sessions, session).ir_drafts[0].ir == {"v": value}

    def test_a_change_of_a_returned_object_changes_nothing_until_it_is_stored(
        self, sessions: SessionStore
    ) -> None:
        session = a_session(tags=["a"])
        sessions.create(session)
        before = session.to_dict()
        for returned in (
            got(sessions, session),
            sessions.load(session.session_id),
            sessions.list_all()[0],
            sessions.list_active()[0],
            sessions.list_page().sessions[0],
            session,
        ):
            assert returned is not None
            returned.metadata["tags"].append("b")
            returned.ir_drafts[0].ir["a"].append("b")
            returned.revisions[0].content = "b"
            returned.status = "abandoned"
            assert got(sessions, session).to_dict() == before
        sessions.update(session)
        assert got(sessions, session).status == "abandoned"

    def test_an_object_that_is_changed_after_its_update_changes_nothing(
        self, sessions: SessionStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        session.metadata["tags"] = ["a"]
        session.add_draft(IRDraft(version=2, ir={"v": [1]}))
        sessions.update(session)
        stored = session.to_dict()
        session.metadata["tags"].append("b")
        session.ir_drafts[1].ir["v"].append(2)
        assert got(sessions, session).to_dict() == stored
        sessions.update(session)
        assert got(sessions, session).to_dict() == session.to_dict()

    def test_a_list_page_tells_that_it_is_complete(self, sessions: SessionStore) -> None:
        page = sessions.list_page()
        assert (page.sessions, page.complete, page.next) == ([], True, None)

    @pytest.mark.parametrize(("asked", "given"), [(0, 1), (-5, 1), (2, 2), (10**9, 3)])
    def test_the_size_of_a_page_is_bounded(
        self, sessions: SessionStore, asked: int, given: int
    ) -> None:
        for _ in range(3):
            sessions.create(PromptSession.create_new())
        assert len(sessions.list_page(limit=asked).sessions) == given

    def test_a_page_may_be_of_one_status(self, sessions: SessionStore) -> None:
        made = [PromptSession.create_new() for _ in range(3)]
        for session in made:
            sessions.create(session)
        made[0].abandon()
        sessions.update(made[0])
        assert sessions.list_page("abandoned").sessions == [made[0]]
        assert sessions.list_page("finalized").sessions == []
        assert sessions.list_page("active", limit=1).sessions == [made[2]]
