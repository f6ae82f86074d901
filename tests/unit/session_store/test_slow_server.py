"""Reads while Supabase is slow: what is held is shown, what isn't is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from local_store import LocalStore
from local_store.clock import ManualClock
from syncer.errors import RemoteUnavailable, ReplyTimedOut
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    GuardedReads,
)
from tests.unit.session_server import ReadServer
from tests.unit.session_store.support import ALICE, delivered, got

SLOW_S = 0.3


def test_a_held_session_is_shown_stale_and_a_slow_server_asked_again_after_an_interval(
    local: LocalStore, server: ReadServer
) -> None:
    clock, heard = ManualClock(), list[bool]()
    reads = GuardedReads(server, watch=heard.append, interval_s=5.0, clock=clock)
    store = BufferedSessionStore(local, ALICE, reads, reads.usable, 0.1, clock=clock)
    session = delivered(store, local, server)
    server.takes_s = SLOW_S
    for _ in range(50):
        assert store.sync_info(got(store, session)).stale
        assert not store.list_page().complete
    assert server.calls == 3, "three that were late in a row are enough"
    assert (reads.usable(), heard) == (True, [])
    clock.advance(5.0)
    for _ in range(50):
        assert store.sync_info(got(store, session)).stale
    assert server.calls == 4
    server.takes_s = 0.0
    clock.advance(5.0)
    assert not store.sync_info(got(store, session)).stale
    assert store.list_page().complete


def test_what_is_not_held_is_waited_for_although_the_server_is_slow(
    tmp_path: Path, through: BufferedSessionStore, local: LocalStore, server: ReadServer
) -> None:
    session = delivered(through, local, server)
    server.takes_s = SLOW_S
    with LocalStore.open(tmp_path / "other", tables=SESSION_TABLES) as other_local:
        reads = GuardedReads(server, clock=ManualClock())
        other = BufferedSessionStore(other_local, ALICE, reads, reads.usable, 0.1)
        listed = other.list_page()
        assert ([s.session_id for s in listed.sessions], listed.complete) == (
            [session.session_id],
            True,
        )
        for _ in range(5):
            assert other.sync_info(got(other, session)).stale
        second = delivered(through, local, server)
        assert got(other, second) == second, "that the others were late is no outage"


def test_reads_that_wait_long_in_vain_are_an_outage(server: ReadServer) -> None:
    heard = list[bool]()
    reads = GuardedReads(server, watch=heard.append, clock=ManualClock())
    server.takes_s = 60.0
    for _ in range(50):
        with pytest.raises((ReplyTimedOut, RemoteUnavailable)):
            reads.read("u", [], timeout_s=2.0)
    assert (server.calls, reads.usable(), heard) == (3, False, [False])
