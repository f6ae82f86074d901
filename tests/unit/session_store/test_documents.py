"""Lists as JSON: made once, shown while nothing of a session changed, and never longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from local_store import LocalStore, Outcome, Row
from local_store.clock import new_id
from syncer.errors import RemoteUnavailable
from syncer.sessions import SESSION_TABLES, BufferedSessionStore, IRDraft
from syncer.sessions.documents import Documents, Shown
from tests.unit.session_server import ReadServer
from tests.unit.session_store.support import (
    ALICE,
    BOB,
    a_revision,
    a_session,
    assert_lists_show_what_is_there,
    document_of,
    documents_of,
    got,
)


@pytest.fixture
def row_id(through: BufferedSessionStore, local: LocalStore, server: ReadServer) -> str:
    """A session of Alice's that server and local copy agree on, shown once."""
    session = a_session()
    through.create(session)
    server.deliver(local)
    assert_lists_show_what_is_there(through)
    return session.session_id


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sessions whose documents were made, as they are."""
    from syncer.sessions import documents

    noted: list[str] = []
    make = documents.content_of

    def content_of(session_id: str, snapshot: Any) -> dict[str, Any]:
        noted.append(session_id)
        return make(session_id, snapshot)

    monkeypatch.setattr(documents, "content_of", content_of)
    return noted


def test_a_page_that_stands_is_one_question_and_makes_no_document(
    through: BufferedSessionStore, server: ReadServer, row_id: str, made: list[str]
) -> None:
    calls = server.calls
    [shown] = documents_of(through)
    assert (shown["session_id"], server.calls, made) == (row_id, calls + 1, [])


CHANGES: dict[str, Callable[[ReadServer, str], object]] = {
    "a column": lambda server, row_id: server.change("sessions", row_id, metadata={"new": 1}),
    "a child's column": lambda server, row_id: server.change(
        "session_revisions", next(iter(server.rows["session_revisions"])), content="other"
    ),
    "another child": lambda server, row_id: server.put(
        "session_revisions", ALICE, session_id=row_id, content="x", revision_type="manual_edit"
    ),
    "a child less": lambda server, row_id: server.rows["session_revisions"].clear(),
    "the session's end": lambda server, row_id: server.remove(row_id),
    "another session": lambda server, row_id: server.put(
        "sessions", ALICE, status="active", source="prompt"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_on_the_server_is_shown(
    through: BufferedSessionStore,
    server: ReadServer,
    row_id: str,
    change: Callable[[ReadServer, str], object],
) -> None:
    before = documents_of(through)
    change(server, row_id)
    page = through.list_documents()
    assert page.complete
    assert documents_of(through) != before
    assert_lists_show_what_is_there(through)
    server.is_down = True
    assert_lists_show_what_is_there(through)


def test_ones_own_change_is_shown_while_it_waits_when_it_arrived_and_when_it_was_discarded(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer, row_id: str
) -> None:
    session = got(through, through.list_all()[0])
    session.add_revision(a_revision("one"))
    through.update(session)
    [shown] = documents_of(through)
    assert (len(shown["revisions"]), shown["sync"]["state"]) == (2, "pending")
    server.deliver(local)
    [shown] = documents_of(through)
    assert (len(shown["revisions"]), shown["sync"]["state"]) == (2, "synced")
    session.add_draft(IRDraft(version=2, ir={}))
    through.update(session)
    assert len(documents_of(through)[0]["ir_drafts"]) == 2
    assert through.last_receipt is not None
    local.record([Outcome(through.last_receipt.txn_id, "discarded")])
    assert len(documents_of(through)[0]["ir_drafts"]) == 1
    assert_lists_show_what_is_there(through)


def test_a_list_in_an_outage_is_of_what_is_kept_and_stale(
    through: BufferedSessionStore, server: ReadServer, row_id: str, made: list[str]
) -> None:
    server.is_down = True
    page = through.list_documents()
    assert not page.complete
    [shown] = documents_of(through)
    assert shown["sync"] == {
        "state": "synced",
        "pending_transactions": 0,
        "durability": "remote",
        "stale": True,
    }
    assert made == []


def test_one_users_documents_are_no_other_users(local: LocalStore) -> None:
    documents = Documents()
    mine = BufferedSessionStore(local, ALICE, documents=documents)
    mine.create(a_session())
    assert len(documents_of(mine)) == 1
    assert documents_of(BufferedSessionStore(local, BOB, documents=documents)) == []


def test_no_more_than_its_bound_is_kept_and_what_was_used_last_stays(
    local: LocalStore, made: list[str]
) -> None:
    sizes = Documents()
    store = BufferedSessionStore(local, ALICE, documents=sizes)
    session_ids = [store.create(a_session()) for _ in range(3)]
    found = sizes.look(local, ALICE, session_ids)
    [size] = {len(shown.document.text) for shown in found.values()}
    documents = Documents(bytes_max=2 * size)
    made.clear()
    for row_id in [*session_ids, session_ids[1]]:
        documents.look(local, ALICE, [row_id])
    assert made == session_ids, "the second was still there"
    documents.look(local, ALICE, [session_ids[0]])
    assert made == [*session_ids, session_ids[0]]


def test_a_delivery_between_the_question_and_the_look_is_no_reason_to_ask_again(
    local: LocalStore,
) -> None:
    answered = threading.Event()

    class Delivering(ReadServer):
        """Delivers what its asker still holds, once it has answered."""

        def read(self, *args: Any, **more: Any) -> list[list[Row]]:
            told = super().read(*args, **more)
            self.deliver(local)
            answered.set()
            return told

    class Late(Documents):
        """Looks at the local copy only behind that."""

        def look(self, *args: Any) -> dict[str, Shown]:
            assert answered.wait(5)
            return super().look(*args)

    server = Delivering()
    store = BufferedSessionStore(local, ALICE, server, lambda: True, documents=Late())
    store.create(a_session())
    server.deliver(local)
    store.create(a_session())
    calls = server.calls
    page = store.list_documents()
    assert page.complete
    assert [shown["sync"]["state"] for shown in orjson.loads(page.sessions)] == ["synced"] * 2
    assert server.calls == calls + 1


# -- one session -----------------------------------------------------------------------------------


def test_a_session_that_stands_is_one_question_and_makes_no_document(
    through: BufferedSessionStore, server: ReadServer, row_id: str, made: list[str]
) -> None:
    calls = server.calls
    assert document_of(through, row_id)["session_id"] == row_id
    assert (server.calls, made) == (calls + 1, [])


def test_a_session_with_pending_changes_is_shown_without_a_question(
    through: BufferedSessionStore, server: ReadServer, row_id: str
) -> None:
    session = got(through, through.list_all()[0])
    session.add_revision(a_revision("one"))
    through.update(session)
    calls = server.calls
    assert document_of(through, row_id)["sync"]["state"] == "pending"
    assert server.calls == calls


def test_a_session_that_ended_elsewhere_is_shown_no_more(
    through: BufferedSessionStore, server: ReadServer, row_id: str
) -> None:
    server.remove(row_id)
    assert document_of(through, row_id) is None


def test_a_session_deleted_here_is_gone_before_the_server_knows(
    through: BufferedSessionStore, server: ReadServer, row_id: str
) -> None:
    through.delete(row_id)
    calls = server.calls
    assert document_of(through, row_id) is None
    assert server.calls == calls


def test_a_session_of_another_container_is_shown_and_without_a_server_unknown(
    tmp_path: Path, through: BufferedSessionStore, server: ReadServer, row_id: str
) -> None:
    with LocalStore.open(tmp_path / "other", tables=SESSION_TABLES) as other_local:
        other = BufferedSessionStore(other_local, ALICE, server, lambda: not server.is_down)
        server.is_down = True
        with pytest.raises(RemoteUnavailable):
            other.get_document(row_id)
        server.is_down = False
        assert document_of(other, row_id) == document_of(through, row_id)
        strangers = BufferedSessionStore(other_local, BOB, server)
        assert document_of(strangers, row_id) is None


def test_an_id_that_names_none_has_no_document(through: BufferedSessionStore) -> None:
    assert (through.get_document("no id"), through.get_document(new_id())) == (None, None)
