"""A remote that has spoken before its process forks: each side has its own connections: P4, P10."""

from __future__ import annotations

import os
from typing import Any

import psycopg
import pytest

from local_store import user_uuid
from syncer.remote import SupabaseRemote, TableRead
from tests.integration.dying import ended, in_child

USERS = ("github:42", "github:43")
CALLS = 40


@pytest.fixture
def remote(fresh_supabase: Any) -> Any:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as sql:
        for user in USERS:
            sql.execute("insert into sessions (user_id) values (%s)", (user_uuid(user),))
    made = SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key, deadline_s=5.0)
    yield made
    made.close()


def read_own(remote: SupabaseRemote, user: str) -> None:
    """Read again and again as one user; only that one's row may come."""
    for _ in range(CALLS):
        [rows] = remote.read(user_uuid(user), [TableRead("sessions", {})])
        assert [row["user_id"] for row in rows] == [user_uuid(user)]


def test_parent_and_child_go_on_with_one_remote_and_never_hear_each_others_replies(remote: Any):
    read_own(remote, USERS[0])  # a connection is open, and a thread waits for the next call
    go_on, let_go = os.pipe()

    def child() -> None:
        os.read(go_on, 1)
        read_own(remote, USERS[1])

    pid = in_child(child)
    os.write(let_go, b"x")
    read_own(remote, USERS[0])
    assert ended(pid) == 0
    os.close(go_on)
    os.close(let_go)
    read_own(remote, USERS[0])
