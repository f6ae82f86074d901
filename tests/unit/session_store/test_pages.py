"""Pages joined from what is held here and what the server has: nothing twice, nothing skipped."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from local_store import LocalStore, Row
from local_store.clock import ManualClock
from syncer.errors import RemoteUnavailable
from syncer.remote import TableRead
from syncer.sessions import SESSION_TABLES, BufferedSessionStore, InvalidCursor
from syncer.sessions.server_reads import ROWS_MAX, stretch_of
from tests.unit.session_server import ReadServer
from tests.unit.session_store.support import ALICE, a_session, got


@pytest.fixture
def elsewhere(tmp_path: Path, server: ReadServer) -> Iterator[BufferedSessionStore]:
    """Alice's sessions in a container that holds nothing yet."""
    with LocalStore.open(tmp_path / "elsewhere", tables=SESSION_TABLES) as local:
        yield BufferedSessionStore(local, ALICE, server, lambda: not server.is_down)


def delivered(store: BufferedSessionStore, local: LocalStore, server: ReadServer) -> str:
    session_id = store.create(a_session())
    server.deliver(local)
    return session_id


def pages(store: BufferedSessionStore, limit: int) -> list[list[str]]:
    found, cursor = [], None
    while True:
        page = store.list_page(limit=limit, cursor=cursor)
        assert page.complete
        found.append([session.session_id for session in page.sessions])
        cursor = page.next
        if cursor is None:
            return found


def test_a_page_that_brings_nothing_new_asks_once_and_writes_nothing(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    for _ in range(3):
        delivered(through, local, server)
    counter, calls = local.change_counter(), server.calls
    assert len(through.list_page(limit=2).sessions) == 2
    assert (server.calls, local.change_counter()) == (calls + 1, counter)


def test_what_changed_elsewhere_leaves_a_page_that_it_no_longer_fits(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    kept, finalized, deleted = (delivered(through, local, server) for _ in range(3))
    server.change("sessions", finalized, status="finalized")
    server.remove(deleted)
    assert [session.session_id for session in through.list_active()] == [kept]
    server.is_down = True
    assert [session.session_id for session in through.list_active()] == [kept]
    assert {session.session_id for session in through.list_all()} == {kept, finalized}


def test_a_child_that_came_elsewhere_is_on_the_page(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    row_id = delivered(through, local, server)
    server.put(
        "session_revisions", ALICE, session_id=row_id, content="more", revision_type="manual_edit"
    )
    [session] = through.list_page().sessions
    assert [revision.content for revision in session.revisions] == ["Sort a list", "more"]


def test_a_session_written_here_waits_for_its_place_among_the_servers(
    tmp_path: Path, server: ReadServer
) -> None:
    clock = ManualClock()
    with (
        LocalStore.open(tmp_path / "a", tables=SESSION_TABLES, clock=clock) as there,
        LocalStore.open(tmp_path / "b", tables=SESSION_TABLES, clock=clock) as here,
    ):
        other = BufferedSessionStore(there, ALICE, server)
        mine = BufferedSessionStore(here, ALICE, server)
        made = []
        for turn in range(9):
            store = mine if turn % 4 == 1 else other
            made.append(store.create(a_session()))
            clock.advance(1)
        server.deliver(there)  # the two made here still wait
        order = made[::-1]
        assert pages(mine, 2) == [order[n : n + 2] for n in range(0, 9, 2)]
        assert [s.session_id for s in mine.list_all()] == order


def test_a_page_whose_sessions_are_all_deleted_here_is_short_and_goes_on(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    made = [delivered(through, local, server) for _ in range(5)]
    for row_id in made[2:]:
        through.delete(row_id)
    found = pages(through, 2)
    assert [row_id for page in found for row_id in page] == made[1::-1]


def test_sessions_beyond_one_read_are_listed_too(
    elsewhere: BufferedSessionStore, server: ReadServer
) -> None:
    for _ in range(ROWS_MAX + 1):
        server.put("sessions", ALICE, status="active", source="prompt")
    assert len(elsewhere.list_all()) == ROWS_MAX + 1
    assert len(elsewhere.list_all()) == ROWS_MAX + 1, "now that they are held here"


def test_an_answer_that_may_be_cut_is_asked_for_by_fewer_sessions(
    elsewhere: BufferedSessionStore, server: ReadServer
) -> None:
    rows = [server.put("sessions", ALICE, status="active", source="prompt") for _ in range(3)]
    for row in rows:
        for number in range(400):
            server.put(
                "session_revisions",
                ALICE,
                session_id=row["id"],
                content=f"{number}",
                revision_type="manual_edit",
            )
    for _ in range(2):  # read whole, then compared by versions
        page = elsewhere.list_page()
        assert page.complete
        assert [len(session.revisions) for session in page.sessions] == [400] * 3


def test_a_session_that_no_read_can_return_leaves_the_page_to_what_is_held(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    row_id = delivered(through, local, server)
    for number in range(ROWS_MAX):
        server.put(
            "session_revisions",
            ALICE,
            session_id=row_id,
            content=f"{number}",
            revision_type="manual_edit",
        )
    page = through.list_page()
    assert not page.complete
    assert [len(session.revisions) for session in page.sessions] == [1]
    assert through.sync_info(got(through, page.sessions[0])).stale


def test_nothing_of_a_page_is_dropped_when_the_server_stops_between(
    through: BufferedSessionStore,
    local: LocalStore,
    server: ReadServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row_id = delivered(through, local, server)
    server.change("sessions", row_id, metadata={"new": True})
    answers = server.read

    def once(*args: object, **more: object) -> object:
        monkeypatch.setattr(server, "read", lambda *a, **m: (_ for _ in ()).throw(down))
        return answers(*args, **more)  # type: ignore[arg-type]

    down = RemoteUnavailable("gone between two questions")
    monkeypatch.setattr(server, "read", once)
    page = through.list_page()
    assert not page.complete
    assert [session.metadata for session in page.sessions] == [{}]


@pytest.mark.parametrize("position", ["soon|{id}", "2026-01-01T00:00:00+00:00|x", "|"])
def test_a_cursor_that_names_no_position_is_refused(
    through: BufferedSessionStore, position: str
) -> None:
    text = position.replace("{id}", "0d9e0c1e-6f0f-4d39-9d0e-000000000001")
    cursor = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    with pytest.raises(InvalidCursor):
        through.list_page(cursor=cursor)


@pytest.mark.parametrize("count", [ROWS_MAX, ROWS_MAX + 1])
def test_a_list_that_fills_a_read_is_asked_for_further_until_nothing_comes(count: int) -> None:
    rows = [{"id": f"{n:05}", "created_at": "2026-01-01"} for n in range(count)]
    asked: list[object] = []

    def ask(reads: Sequence[TableRead]) -> list[list[Row]]:
        [read] = reads
        asked.append(read.after)
        start = 0 if read.after is None else int(read.after["id"]) + 1
        return [rows[start : start + read.limit]]

    found = stretch_of(ask, None, None, None)
    assert (found.rows, found.more) == (rows, False)
    assert asked == [None, {"created_at": "2026-01-01", "id": f"{ROWS_MAX - 1:05}"}]
