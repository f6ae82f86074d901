"""Opening the buffered store by settings, closing it, and the buffer's own limits."""

from __future__ import annotations

from pathlib import Path

import jwt
import pytest

from local_store import BufferFull, LocalStore, StoreClosed
from local_store.clock import new_id
from syncer.errors import RemoteUnavailable
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    open_session_store,
)
from syncer.settings import Settings
from syncer.testkit.api_process import free_port
from tests.unit.session_store.support import ALICE, a_session, got

SECRET_KEY = jwt.encode({"role": "service_role"}, "k" * 32)


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


def test_a_project_that_nobody_answers_for_leaves_foreign_ids_unknown(tmp_path: Path) -> None:
    settings = Settings.load(
        supabase_url=f"http://127.0.0.1:{free_port()}", supabase_secret_key=SECRET_KEY
    )
    with open_session_store(ALICE, tmp_path, settings) as store:
        session = a_session()
        store.create(session)
        with pytest.raises(RemoteUnavailable):
            store.get(new_id())
        page = store.list_page()
        assert (page.sessions, page.complete) == ([session], False)


def test_a_store_that_did_not_open_the_buffer_does_not_close_it(local: LocalStore) -> None:
    with BufferedSessionStore(local, ALICE) as store:
        store.create(a_session())
    assert len(BufferedSessionStore(local, ALICE).list_all()) == 1
