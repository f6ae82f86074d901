"""Sessions on the real buffer: copies, stale copies, verbatim values, reads through."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from local_store import BufferFull, InvalidWrite, LocalStore, StoreClosed, user_uuid
from local_store.clock import ManualClock, new_id
from local_store.ops import Outcome
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    ConcurrentModificationError,
    GuardedReads,
    HoleResolution,
    InvalidCursor,
    IRDraft,
    PromptRevision,
    PromptSession,
    SessionNotFound,
    open_session_store,
)
from syncer.settings import Settings
from tests.unit.session_server import ReadServer

ALICE, BOB = "github:42", "0d9e0c1e-6f0f-4d39-9d0e-000000000001"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        yield store


@pytest.fixture
def sessions(local: LocalStore) -> BufferedSessionStore:
    return BufferedSessionStore(local, ALICE)


@pytest.fixture
def server() -> ReadServer:
    return ReadServer()


@pytest.fixture
def through(local: LocalStore, server: ReadServer) -> BufferedSessionStore:
    """Alice's sessions with a server to read through to."""
    return BufferedSessionStore(local, ALICE, server, lambda: not server.is_down)


def a_session(**metadata: Any) -> PromptSession:
    session = PromptSession.create_new(metadata=metadata)
    session.add_revision(PromptRevision(content="Sort a list", revision_type="initial"))
    session.add_draft(IRDraft(version=1, ir={"a": [1, 2.5, None, {"b": "ü"}]}, ambiguities=["h"]))
    return session


def got(store: BufferedSessionStore, session: PromptSession) -> PromptSession:
    found = store.get(session.session_id)
    assert found is not None
    return found


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


# -- lists -----------------------------------------------------------------------------------------


def test_lists_are_filtered_and_newest_first(sessions: BufferedSessionStore) -> None:
    made = [a_session(n=number) for number in range(4)]
    for session in made:
        sessions.create(session)
    made[1].finalize()
    sessions.update(made[1])
    assert sessions.list_all() == [made[3], made[2], made[1], made[0]]
    assert sessions.list_active() == [made[3], made[2], made[0]]


def test_pages_follow_each_other_without_gap_or_repetition(sessions: BufferedSessionStore) -> None:
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
def test_a_made_up_cursor_is_refused(sessions: BufferedSessionStore, cursor: str) -> None:
    with pytest.raises(InvalidCursor):
        sessions.list_page(cursor=cursor)


# -- reading through -------------------------------------------------------------------------------


def delivered(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> PromptSession:
    session = a_session()
    through.create(session)
    server.deliver(local)
    return session


def test_a_write_of_a_held_session_asks_nobody(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    session.finalize()
    through.update(session)
    assert through.load(session.session_id) == session
    through.delete(session.session_id)
    assert server.calls == 0


def test_a_session_with_pending_changes_is_read_here(
    through: BufferedSessionStore, server: ReadServer
) -> None:
    session = a_session()
    through.create(session)
    assert got(through, session) == session
    assert server.calls == 0


def test_a_clean_session_is_refreshed_from_the_server(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    server.change("sessions", session.session_id, status="finalized", metadata={"by": "other"})
    server.put(
        "session_revisions",
        ALICE,
        session_id=session.session_id,
        content="from elsewhere",
        revision_type="manual_edit",
        target_hole=None,
        client={"timestamp": "2031-02-02T00:00:00Z"},
    )
    found = got(through, session)
    assert (found.status, found.metadata) == ("finalized", {"by": "other"})
    assert found.revisions[-1].content == "from elsewhere"
    assert found.revisions[-1].timestamp == "2031-02-02T00:00:00Z"
    assert through.sync_info(found).to_dict() == {
        "state": "synced",
        "pending_transactions": 0,
        "durability": "remote",
        "stale": False,
    }


def test_a_read_that_brings_nothing_new_writes_nothing(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    counter = local.change_counter()
    assert got(through, session) == session
    assert server.calls == 1
    assert local.change_counter() == counter


def test_an_outage_shows_the_local_copy_marked_stale(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    server.is_down = True
    found = got(through, session)
    assert found == session
    assert through.sync_info(found).stale
    found.metadata["x"] = 1
    through.update(found)
    assert not through.sync_info(got(through, session)).stale, "one's own pending change is fresh"


def test_an_id_that_can_not_be_asked_for_is_unknown_and_not_absent(
    through: BufferedSessionStore, server: ReadServer
) -> None:
    unknown = new_id()
    assert through.get(unknown) is None
    server.is_down = True
    for call in (through.get, through.load, through.delete):
        with pytest.raises(RemoteUnavailable):
            call(unknown)
    with pytest.raises(RemoteUnavailable):
        through.update(PromptSession.create_new())


def test_any_failure_of_a_read_counts_as_unavailable(local: LocalStore) -> None:
    class Slow:
        def read(self, *_: object, **__: object) -> list[list[dict[str, Any]]]:
            raise ReplyTimedOut("no reply in time")

    store = BufferedSessionStore(local, ALICE, Slow())
    with pytest.raises(RemoteUnavailable):
        store.get(new_id())


def test_a_session_of_another_container_is_fetched_and_can_be_changed(
    tmp_path: Path, through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    with LocalStore.open(tmp_path / "other", tables=SESSION_TABLES) as other_local:
        other = BufferedSessionStore(other_local, ALICE, server)
        found = other.load(session.session_id)
        assert found == session
        found.finalize()
        other.update(found)
        assert got(other, session).status == "finalized"
        strangers = BufferedSessionStore(other_local, BOB, server)
        assert strangers.get(session.session_id) is None


def test_what_the_server_no_longer_has_is_gone_here_too(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    one, other = delivered(through, local, server), delivered(through, local, server)
    server.remove(one.session_id)
    assert through.get(one.session_id) is None
    assert local.select("session_drafts", user_id=ALICE, where={"session_id": one.session_id}) == []
    server.remove(other.session_id)
    assert through.list_all() == []
    assert local.select("session_drafts", user_id=ALICE) == []


def test_a_child_that_the_server_no_longer_has_is_gone_here_too(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    server.rows["session_revisions"].clear()
    assert got(through, session).revisions == []


def test_a_session_without_the_clients_strings_shows_the_servers(
    through: BufferedSessionStore, server: ReadServer
) -> None:
    row = server.put("sessions", ALICE, status="active", source="prompt", finalized_at=None)
    found = through.get(row["id"])
    assert found is not None
    assert (found.created_at, found.updated_at) == (row["created_at"], row["updated_at"])
    assert found.user_id == user_uuid(ALICE)
    found.metadata["x"] = 1
    through.update(found)
    assert got(through, found).metadata == {"x": 1}


def test_a_cut_list_of_children_is_not_taken_for_the_whole(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    for number in range(1_000):
        server.put(
            "session_revisions",
            ALICE,
            session_id=session.session_id,
            content=str(number),
            revision_type="manual_edit",
            target_hole=None,
        )
    found = got(through, session)
    assert through.sync_info(found).stale
    assert [r.content for r in found.revisions] == ["Sort a list"]


def test_a_list_joins_what_is_here_with_what_the_server_has(
    tmp_path: Path, through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    elsewhere = [delivered(through, local, server) for _ in range(3)]
    with LocalStore.open(tmp_path / "other", tables=SESSION_TABLES) as other_local:
        other = BufferedSessionStore(other_local, ALICE, server, lambda: not server.is_down)
        mine = a_session()
        other.create(mine)
        deleted = other.load(elsewhere[0].session_id)
        assert deleted is not None
        other.delete(deleted.session_id)
        calls = server.calls
        page = other.list_page()
        assert page.complete
        ids = [s.session_id for s in page.sessions]
        assert sorted(ids) == sorted([mine.session_id, *(s.session_id for s in elsewhere[1:])])
        assert all(len(s.revisions) == 1 and s.current_draft for s in page.sessions)
        assert server.calls - calls == 2, "sessions, then the children of the page"
        server.is_down = True
        page = other.list_page()
        assert not page.complete
        assert {s.session_id for s in page.sessions} == set(ids)
        stale = {s.session_id for s in page.sessions if other.sync_info(s).stale}
        assert stale == set(ids) - {mine.session_id}


def test_a_page_from_the_server_continues_by_its_cursor(
    tmp_path: Path, through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    made = [delivered(through, local, server) for _ in range(5)]
    with LocalStore.open(tmp_path / "other", tables=SESSION_TABLES) as other_local:
        other = BufferedSessionStore(other_local, ALICE, server)
        first = other.list_page(limit=2)
        second = other.list_page(limit=3, cursor=first.next)
        seen = [s.session_id for s in first.sessions + second.sessions]
        assert seen == [s.session_id for s in reversed(made)]
        assert second.next is None


@pytest.mark.parametrize(
    ("state", "shown"),
    [("pending", "pending"), ("held", "held"), ("conflict", "conflict"), ("dead", "rejected")],
)
def test_the_sync_state_follows_the_transactions(
    through: BufferedSessionStore, local: LocalStore, state: Any, shown: str
) -> None:
    session = a_session()
    through.create(session)
    assert through.last_receipt is not None
    if state != "pending":
        local.record([Outcome(through.last_receipt.txn_id, state)])
    info = through.sync_info(got(through, session))
    assert info.state == shown
    assert info.pending_transactions == (1 if state in ("pending", "held") else 0)
    assert (info.durability, info.stale) == ("host", False)


def test_an_outage_costs_one_probe_per_interval(server: ReadServer) -> None:
    clock = ManualClock()
    heard: list[bool] = []
    reads = GuardedReads(server, watch=heard.append, interval_s=5.0, clock=clock)
    server.is_down = True
    for _ in range(50):
        with pytest.raises(RemoteUnavailable):
            reads.read("u", [])
    assert server.calls == 3, "three failures in a row open the breaker"
    assert not reads.usable()
    assert heard == [False]
    clock.advance(5.0)
    for _ in range(50):
        with pytest.raises(RemoteUnavailable):
            reads.read("u", [])
    assert server.calls == 4
    server.is_down = False
    clock.advance(5.0)
    assert reads.read("u", []) == []
    assert reads.usable()
    assert heard[-1] is True


def test_only_one_reader_probes_a_server_that_was_away() -> None:
    clock, inside, leave = ManualClock(), threading.Event(), threading.Event()

    class Hanging:
        calls = 0

        def read(self, *_: object, **__: object) -> list[list[dict[str, Any]]]:
            self.calls += 1
            if self.calls > 3:
                inside.set()
                leave.wait(5)
            raise RemoteUnavailable("away")

    remote = Hanging()
    reads = GuardedReads(remote, interval_s=5.0, clock=clock)
    for _ in range(3):
        with pytest.raises(RemoteUnavailable):
            reads.read("u", [])
    clock.advance(5.0)
    with ThreadPoolExecutor(1) as pool:
        probe = pool.submit(reads.read, "u", [])
        assert inside.wait(5)
        with pytest.raises(RemoteUnavailable):
            reads.read("u", [])
        leave.set()
        assert isinstance(probe.exception(5), RemoteUnavailable)
    assert remote.calls == 4


def test_a_server_that_may_not_be_asked_is_not_asked(local: LocalStore, server: ReadServer) -> None:
    sessions = BufferedSessionStore(local, ALICE, server, lambda: False)
    session = a_session()
    sessions.create(session)
    server.deliver(local)
    assert sessions.sync_info(got(sessions, session)).stale
    assert not sessions.list_page().complete
    with pytest.raises(RemoteUnavailable):
        sessions.get(new_id())
    assert server.calls == 0


def test_children_come_in_the_order_of_acceptance_whatever_the_stamps_look_like(
    through: BufferedSessionStore, server: ReadServer
) -> None:
    row = server.put("sessions", ALICE, status="active", source="prompt", finalized_at=None)
    # As text they would sort the other way round.
    stamps = (
        "2026-01-01T01:00:00.1+00:00",
        "2026-01-01T01:00:00+00:00",
        "2026-01-01T02:00:00+02:00",
    )
    for number, stamp in enumerate(stamps):
        server.put(
            "session_revisions",
            ALICE,
            id=f"00000000-0000-7000-8000-00000000000{number}",
            session_id=row["id"],
            content=stamp,
            revision_type="manual_edit",
            target_hole=None,
            created_at=stamp,
        )
    found = through.get(row["id"])
    assert found is not None
    assert [r.content for r in found.revisions] == [stamps[2], stamps[1], stamps[0]]


# -- the buffer's own limits -----------------------------------------------------------------------


def test_a_full_buffer_refuses_writes_and_answers_reads(tmp_path: Path) -> None:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES, buffer_transactions_max=1) as store:
        sessions = BufferedSessionStore(store, ALICE)
        session = a_session()
        sessions.create(session)
        with pytest.raises(BufferFull):
            sessions.create(a_session())
        session.finalize()
        with pytest.raises(BufferFull):
            sessions.update(session)
        assert got(sessions, session).status == "active"


def test_opening_by_settings_starts_local_and_closes_the_buffer(tmp_path: Path) -> None:
    settings = Settings(supabase_url=None, _env_file=None)  # type: ignore[call-arg]
    session = a_session()
    with open_session_store(ALICE, tmp_path, settings) as store:
        store.create(session)
        assert store.get(new_id()) is None
    with pytest.raises(StoreClosed):
        store.get(session.session_id)
    with open_session_store(ALICE, str(tmp_path), settings) as store:
        assert store.get(session.session_id) == session


def test_a_project_that_is_switched_off_leaves_foreign_ids_unknown(tmp_path: Path) -> None:
    settings = Settings(supabase_url="https://x.supabase.co", use_supabase=False)
    with open_session_store(ALICE, tmp_path, settings) as store:
        session = a_session()
        store.create(session)
        assert store.get(session.session_id) == session
        with pytest.raises(RemoteUnavailable):
            store.get(new_id())
