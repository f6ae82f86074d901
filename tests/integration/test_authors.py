"""Authors whose token ran out or who are gone by the time their writes are delivered: P1, P4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert, Update, user_uuid
from local_store.clock import ManualClock, SystemClock, new_id
from syncer import operators
from syncer.service.auth import LEEWAY_S
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp, outage, wait_until
from tests.integration.watched import USER, watched

OTHER = "github:43"


@pytest.fixture
def sql(fresh_supabase: Any) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def test_what_was_accepted_is_delivered_as_its_author_after_the_token_ran_out(
    fresh_supabase: Any, fault_proxy: Any, tmp_path: Path, sql: psycopg.Connection[Any]
):
    with watched(tmp_path, fresh_supabase, fault_proxy) as api, outage(fault_proxy):
        ends = int(SystemClock().now().timestamp() - LEEWAY_S) + 3  # good for three seconds
        token = fresh_supabase.user_token(USER, exp=ends)
        headers = {"Authorization": f"Bearer {token}"}
        made = api.client.post("/api/sessions", json={"prompt": "x"}, headers=headers)
        assert made.status_code == 201
        api.flush()
        listed = "/api/sessions"
        wait_until(lambda: api.client.get(listed, headers=headers).status_code == 401)
        fault_proxy.clear()
        api.clock.advance(86_400.0)
        assert api.flush().applied == 1
    found = sql.execute("select id::text, user_id::text from sessions").fetchall()
    assert found == [(made.json()["session_id"], user_uuid(USER))]


@pytest.fixture
def with_users(sql: psycopg.Connection[Any]) -> Iterator[None]:
    """Sessions belong to auth.users, as a hosted project may have it."""
    for user in (USER, OTHER):
        sql.execute("insert into auth.users (id) values (%s)", (user_uuid(user),))
    sql.execute(
        "alter table sessions add constraint owned foreign key (user_id)"
        " references auth.users (id) on delete cascade"
    )
    yield
    sql.execute("alter table sessions drop constraint owned")
    sql.execute("truncate auth.users")


def test_the_writes_of_an_author_who_was_deleted_wait_then_ask_a_person_and_delay_nobody(
    buffered_store: Callable[..., BufferedApp], sql: psycopg.Connection[Any], with_users: None
):
    clock = ManualClock()
    app = buffered_store(SESSION_TABLES, clock=clock)
    old = new_id()
    app.store.write([Insert("sessions", {"id": old})], user_id=USER)
    app.drain()
    edit = app.store.write([Update("sessions", old, {"metadata": {"n": 1}})], user_id=USER)
    made = app.store.write([Insert("sessions", {})], user_id=USER)
    theirs = app.store.write([Insert("sessions", {})], user_id=OTHER)
    sql.execute("delete from auth.users where id = %s", (user_uuid(USER),))
    assert app.flush_once().rejected == 0
    app.flush_once()  # what was merged
    states = [app.store.state(receipt.txn_id) for receipt in (edit, made, theirs)]
    assert states == ["applied", "held", "applied"]  # the edit came to nothing: its row is gone
    [record] = operators.conflicts(app.remote, undecided=False)
    assert (record["outcome"], record["mine"]) == ("deleted", {"metadata": {"n": 1}})
    clock.advance(2 * 3_600.0)
    app.drain()
    [letter] = operators.dead_letters(app.remote)
    assert (letter["txn_id"], letter["sqlstate"]) == (made.txn_id, "23503")
    assert app.audit().balanced
