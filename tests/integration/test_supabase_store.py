"""SupabaseSessionStore where only the server can show it: faults, RLS, races, the buffer beside."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from local_store import InvalidWrite, user_uuid
from local_store.clock import ManualClock, new_id
from syncer.audit import audit
from syncer.errors import OutcomeUnknown, RemoteUnavailable, Throttled
from syncer.remote import SupabaseRemote
from syncer.sessions import (
    BufferedSessionStore,
    IRDraft,
    PromptRevision,
    PromptSession,
    RequestKey,
    SessionNotFound,
    SupabaseSessionStore,
)
from syncer.sessions.direct_log import SEND_ATTEMPTS_MAX
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import outage
from syncer.testkit.faults import Cut
from tests.unit.session_store.cases_races import Between
from tests.unit.session_store.support import ALICE, BOB, a_session, got


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


# -- lost replies and outages ----------------------------------------------------------------------


@pytest.fixture
def far(fresh_supabase, fault_proxy) -> Iterator[SupabaseSessionStore]:
    """Alice's store behind the fault proxy."""
    remote = SupabaseRemote(fault_proxy.url, fresh_supabase.secret_key)
    yield SupabaseSessionStore(remote, ALICE, clock=ManualClock())
    remote.close()


def counts(sql: psycopg.Connection) -> tuple[int, int, int]:
    """Count sessions, revisions and applied transactions."""
    tables = ("sessions", "session_revisions", "sync.ledger")
    found = [sql.execute(f"select count(*) from {table}").fetchone() for table in tables]
    return tuple(row[0] for row in found if row is not None)  # type: ignore[return-value]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_write_whose_reply_is_lost_has_one_effect(far, sql, fault_proxy, remote, moment):
    session = a_session()
    for step, expected in (
        (lambda: far.create(session), (1, 1, 1)),
        (lambda: far.update(session), (1, 2, 2)),
        (lambda: far.delete(session.session_id), (0, 0, 3)),
    ):
        for _ in range(2):
            fault_proxy.next(Cut(moment), matching="/rpc/sync_apply_batch")
        step()
        assert counts(sql) == expected
        session.add_revision(PromptRevision(content="more", revision_type="manual_edit"))
    assert audit(remote).balanced


def test_a_write_that_is_never_answered_is_unknown_and_safe_to_repeat_with_its_key(
    far, sql, fault_proxy, remote
):
    request = RequestKey.derive(ALICE, "k1", "this")
    session = PromptSession.create_new()
    session.session_id = request.row_id("sessions")
    for _ in range(SEND_ATTEMPTS_MAX):
        fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
    with pytest.raises(OutcomeUnknown):
        far.create(session, request=request)
    made = far.created_by(request)
    assert made is not None
    made.finalize()
    far.update(made)
    assert counts(sql) == (1, 0, 2)
    assert audit(remote).balanced


def test_in_an_outage_nothing_is_answered_from_memory(far, sql, fault_proxy):
    session = a_session()
    far.create(session)
    changed = got(far, session)
    changed.finalize()
    with outage(fault_proxy):
        for call in (
            lambda: far.get(session.session_id),
            lambda: far.load(new_id()),
            lambda: far.list_all(),
            lambda: far.list_page(),
            lambda: far.create(a_session()),
            lambda: far.update(changed),
            lambda: far.delete(session.session_id),
            lambda: far.delete(new_id()),
            lambda: far.knows(RequestKey.derive(ALICE, "k", "f")),
        ):
            with pytest.raises(RemoteUnavailable):
                call()
        assert far.get("nonsense") is None
    far.update(changed)
    assert counts(sql) == (1, 1, 2)


# -- the server decides ----------------------------------------------------------------------------


def test_row_level_security_decides_and_not_this_code(remote, sql):
    store = SupabaseSessionStore(remote, ALICE)
    session = a_session()
    store.create(session)
    sql.execute(
        "create policy for_the_test on sessions as restrictive to authenticated using (false)"
    )
    try:
        assert store.get(session.session_id) is None
        assert store.list_all() == []
        with pytest.raises(InvalidWrite):
            store.create(a_session())
        with pytest.raises(SessionNotFound):
            store.update(session)
    finally:
        sql.execute("drop policy for_the_test on sessions")
    assert got(store, session) == session


def test_rows_are_their_authors_and_derived_columns_are_the_servers(remote, sql):
    store = SupabaseSessionStore(remote, BOB)
    session = a_session()
    store.create(session)
    session.add_draft(IRDraft(version=7, ir={"seven": [1.5]}))
    session.current_draft = session.ir_drafts[0]
    store.update(session)
    columns = "user_id::text, current_draft_version, current_ir, revision_count, client"
    row = sql.execute(f"select {columns} from sessions").fetchone()
    assert row is not None
    assert row[:4] == (user_uuid(BOB), 1, session.ir_drafts[0].ir, 1)
    assert row[4]["updated_at"] == session.updated_at
    assert sql.execute("select distinct user_id::text from sync.ledger").fetchall() == [
        (user_uuid(BOB),)
    ]


def test_a_deletion_on_an_older_reading_is_made_again_and_records_what_it_did_not_know(remote, sql):
    other = SupabaseSessionStore(remote, ALICE)
    session = a_session()
    other.create(session)
    between = Between()
    store = SupabaseSessionStore(remote, ALICE, ids=between)
    late = got(other, session)
    late.revisions.append(PromptRevision(content="late", revision_type="manual_edit"))
    between.then = lambda: other.update(late)
    store.delete(session.session_id)
    assert counts(sql)[:2] == (0, 0)
    [(outcome, theirs)] = sql.execute("select outcome, theirs from sync.conflicts").fetchall()
    assert outcome == "deleted"
    assert [row["content"] for row in theirs.values()] == ["late"]


def test_what_the_servers_constraints_refuse_is_named_without_the_value(remote, sql):
    store = SupabaseSessionStore(remote, ALICE)
    sql.execute(
        "alter table session_revisions add constraint for_the_test check (content <> 'secret')"
    )
    try:
        session = a_session()
        session.revisions[0].content = "secret"
        with pytest.raises(InvalidWrite) as raised:
            store.create(session)
    finally:
        sql.execute("alter table session_revisions drop constraint for_the_test")
    assert raised.value.table == "session_revisions"
    assert "23514" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert counts(sql) == (0, 0, 0)
    store.create(session)


def test_a_locked_row_asks_the_caller_to_come_back(remote, sql, fresh_supabase):
    store = SupabaseSessionStore(remote, ALICE)
    session = a_session()
    store.create(session)
    session.finalize()
    with psycopg.connect(fresh_supabase.database_url) as other:
        other.execute("select from sessions for update")
        with pytest.raises(Throttled):
            store.update(session)
    store.update(session)
    assert got(store, session).status == "finalized"


def test_the_buffer_and_the_direct_store_share_a_session(remote, buffered_store, fault_proxy):
    app = buffered_store(SESSION_TABLES)
    buffered = BufferedSessionStore(app.store, ALICE, app.remote, read_budget_s=10.0)
    direct = SupabaseSessionStore(remote, ALICE)
    session = a_session()
    buffered.create(session)
    assert direct.get(session.session_id) is None, "still in the buffer"
    app.drain()
    found = got(direct, session)
    assert found == session
    found.metadata["direct"] = 1
    direct.update(found)
    assert got(buffered, session).metadata == {"direct": 1}
    with outage(fault_proxy):
        offline = got(buffered, session)
        offline.metadata["offline"] = 1
        offline.revisions.append(PromptRevision(content="off", revision_type="manual_edit"))
        buffered.update(offline)
        online = got(direct, session)
        online.revisions.append(PromptRevision(content="on", revision_type="manual_edit"))
        online.metadata["online"] = 1
        direct.update(online)
    app.drain()
    found = got(direct, session)
    assert found.metadata == {"direct": 1, "offline": 1, "online": 1}
    assert {r.content for r in found.revisions} == {"Sort a list", "off", "on"}
    assert got(buffered, session) == found
    assert app.audit().balanced


def test_more_sessions_than_one_call_reads_are_listed_in_order(remote):
    store = SupabaseSessionStore(remote, ALICE)
    made = [PromptSession.create_new(metadata={"n": number}) for number in range(105)]
    for session in made:
        store.create(session)
    assert [s.metadata["n"] for s in store.list_all()] == list(range(104, -1, -1))
    page = store.list_page(limit=200)
    assert (len(page.sessions), page.complete, page.next) == (105, True, None)
