"""What the buffered store writes: which rows, which columns, in which transactions."""

from __future__ import annotations

from pathlib import Path

import pytest

from local_store import InvalidWrite, LocalStore, Outcome
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    HoleResolution,
    IRDraft,
)
from tests.unit.session_store.support import ALICE, a_revision, a_session, got


def test_a_session_survives_a_restart(tmp_path: Path) -> None:
    session = a_session()
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        BufferedSessionStore(store, ALICE).create(session)
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        assert BufferedSessionStore(store, ALICE).get(session.session_id) == session


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


def test_after_each_write_it_is_known_without_a_look_where_its_session_stands(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    for write in (sessions.create, sessions.update, sessions.update):
        session.add_revision(a_revision("more"))
        write(session)
        assert sessions.last_sync == sessions.sync_info(session)
    first, *_ = local.pending(transactions_max=9, bytes_max=10**6)
    local.record([Outcome(first.txn_id, "dead")])
    session.finalize()
    sessions.update(session)
    info = sessions.sync_info(session)
    assert (sessions.last_sync, info.state) == (info, "rejected")


def test_a_refused_creation_writes_nothing(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    session.revisions[0].content = "a\x00b"
    with pytest.raises(InvalidWrite):
        sessions.create(session)
    assert local.stats()["last_seq"] == 0


def test_a_deletion_takes_the_children_along_and_is_written_once(
    sessions: BufferedSessionStore, local: LocalStore
) -> None:
    session = a_session()
    sessions.create(session)
    for _ in range(2):
        sessions.delete(session.session_id)
    assert local.select("session_revisions", user_id=ALICE) == []
    assert local.stats()["last_seq"] == 2
