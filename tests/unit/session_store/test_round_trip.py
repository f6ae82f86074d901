"""What goes into the session store comes out, verbatim and as a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from local_store import LocalStore
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    HoleResolution,
    IRDraft,
    PromptRevision,
)
from tests.unit.session_store.support import ALICE, a_session, got

# -- what goes in comes out ------------------------------------------------------------------------


def test_a_created_session_is_read_back_equal_and_as_a_copy(sessions: BufferedSessionStore) -> None:
    session = a_session(tags=["demo"])
    before = session.to_dict()
    assert sessions.create(session) == session.session_id
    found = got(sessions, session)
    assert found.to_dict() == before
    assert session.to_dict() == before
    found.metadata["tags"].append("changed")
    found.ir_drafts[0].ir["a"].append("changed")
    assert got(sessions, session).to_dict() == before


def test_a_session_survives_a_restart(tmp_path: Path) -> None:
    session = a_session()
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        BufferedSessionStore(store, ALICE).create(session)
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        assert BufferedSessionStore(store, ALICE).get(session.session_id) == session


def test_an_object_that_is_changed_after_it_was_stored_changes_nothing_here(
    sessions: BufferedSessionStore,
) -> None:
    session = a_session(tags=["demo"])
    before = session.to_dict()
    sessions.create(session)
    session.metadata["tags"].append("later")
    session.revisions[0].content = "later"
    assert got(sessions, session).to_dict() == before


def test_the_clients_strings_stay_verbatim(sessions: BufferedSessionStore) -> None:
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


def test_a_session_without_a_user_id_comes_back_without_one(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    assert got(sessions, session).user_id is None


@pytest.mark.parametrize(
    "text", ["Straße 東京 مرحبا 🧾‍🔧", "\u202eright to left", "a\tb\r\n\\u0000"]
)
def test_unicode_survives(sessions: BufferedSessionStore, text: str) -> None:
    session = a_session(**{text: [text], "__proto__": {"x": 1}})
    session.revisions[0].content = text
    session.ir_drafts[0].ir = {text: {"deep": [text]}}
    sessions.create(session)
    assert got(sessions, session) == session


def test_duplicate_draft_versions_and_repeated_answers_stay(
    sessions: BufferedSessionStore,
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
    assert [r.resolution_text for r in found.pending_resolutions] == ["first", "second", "second"]


def test_a_current_draft_older_than_the_last_is_kept(sessions: BufferedSessionStore) -> None:
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


def test_a_current_draft_that_is_none_of_the_drafts_is_kept(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    session.current_draft = IRDraft(version=9, ir={"only": "here"})
    sessions.create(session)
    found = got(sessions, session)
    assert found.to_dict() == session.to_dict()
    found.current_draft = None
    sessions.update(found)
    assert got(sessions, session).current_draft is None
    row = local.get("sessions", session.session_id, user_id=ALICE)
    assert row is not None
    assert (row["current_draft_id"], "current_draft" in row["client"]) == (None, False)


def test_the_current_drafts_row_is_named_and_derived_columns_are_left_alone(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    row = local.get("sessions", session.session_id, user_id=ALICE)
    [draft] = local.select("session_drafts", user_id=ALICE)
    assert row is not None
    assert row["current_draft_id"] == draft["id"]
    [transaction] = local.pending(transactions_max=10, bytes_max=10**6)
    for op in transaction.ops:
        assert not {"current_ir", "current_draft_version", "revision_count"} & set(op.values)


def test_one_aggregate_change_is_one_transaction_with_the_parent_first(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    session.add_draft(IRDraft(version=2, ir={}))
    session.add_resolution(HoleResolution(hole_id="h", resolution_text="x"))
    sessions.update(session)
    created, updated = local.pending(transactions_max=10, bytes_max=10**6)
    assert created.ops[0].table == updated.ops[0].table == "sessions"
    kinds = {(op.table, op.kind) for op in updated.ops}
    assert kinds == {
        ("sessions", "update"),
        ("session_drafts", "insert"),
        ("hole_resolutions", "insert"),
    }


def test_only_what_changed_is_written(sessions: BufferedSessionStore, local: LocalStore) -> None:
    session = a_session(keep="x" * 1_000)
    sessions.create(session)
    found = got(sessions, session)
    found.status = "finalized"
    sessions.update(found)
    update = local.pending(transactions_max=10, bytes_max=10**6)[1]
    assert set(update.ops[0].values) == {"status", "finalized_at"}
    sessions.update(found)
    assert local.stats()["pending"] == 2, "an update without a change writes nothing"


def test_finalizing_notes_when_and_reopening_forgets_it(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    session.finalize()
    session.updated_at = "2025-10-19T12:00:00+00:00Z"
    sessions.update(session)
    row = local.get("sessions", session.session_id, user_id=ALICE)
    assert row is not None
    assert row["finalized_at"] == "2025-10-19T12:00:00.000000+00:00"
    session.status = "active"
    sessions.update(session)
    row = local.get("sessions", session.session_id, user_id=ALICE)
    assert row is not None
    assert row["finalized_at"] is None


def test_removed_metadata_keys_are_gone(sessions: BufferedSessionStore) -> None:
    session = a_session(a=1, b={"c": 2})
    sessions.create(session)
    found = got(sessions, session)
    del found.metadata["a"]
    found.metadata["b"] = None
    sessions.update(found)
    assert got(sessions, session).metadata == {"b": None}


def test_true_in_the_place_of_one_is_a_change(sessions: BufferedSessionStore) -> None:
    session = a_session(flag=1)
    sessions.create(session)
    session.metadata["flag"] = True
    sessions.update(session)
    assert got(sessions, session).metadata["flag"] is True


def test_children_may_be_changed_and_removed(sessions: BufferedSessionStore) -> None:
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


def test_a_megabyte_of_metadata_passes(sessions: BufferedSessionStore) -> None:
    session = a_session(big="x" * 1_000_000)
    sessions.create(session)
    assert got(sessions, session).metadata == session.metadata


def test_children_keep_their_order_over_many_writes(sessions: BufferedSessionStore) -> None:
    session = a_session()
    sessions.create(session)
    for number in range(20):
        session.add_revision(PromptRevision(content=str(number), revision_type="manual_edit"))
        session.add_revision(PromptRevision(content=f"{number}b", revision_type="manual_edit"))
        sessions.update(session)
    contents = [r.content for r in got(sessions, session).revisions[1:]]
    assert contents == [text for n in range(20) for text in (str(n), f"{n}b")]
