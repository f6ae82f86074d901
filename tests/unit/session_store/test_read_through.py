"""Lists and reads through to a server: stale, incomplete, unknown, never wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from local_store import LocalStore, user_uuid
from local_store.clock import ManualClock, new_id
from local_store.ops import Outcome
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    GuardedReads,
    PromptSession,
)
from tests.unit.session_server import ReadServer
from tests.unit.session_store.support import ALICE, BOB, a_session, delivered, got


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


def test_without_a_server_the_local_copy_is_all_there_is_and_never_stale(
    sessions: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = a_session()
    sessions.create(session)
    server.deliver(local)
    info = sessions.sync_info(got(sessions, session))
    assert (info.state, info.durability, info.stale) == ("synced", "remote", False)


def test_a_list_shows_ones_own_pending_change_and_not_the_servers_older_row(
    through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    session.finalize()
    through.update(session)
    assert through.list_all() == [session]
    assert through.list_active() == []
    assert not through.sync_info(through.list_all()[0]).stale
