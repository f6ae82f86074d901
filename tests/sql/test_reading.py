"""sync_read_v1: digests, reads of what another read finds, and whose rows they are of."""

from __future__ import annotations

import hashlib
from typing import Any

import psycopg
import pytest

from syncer.remote import keys_of
from tests.sql.conftest import Database, revision


def read(db: Database, user: str, *reads: dict[str, Any]) -> list[Any]:
    return db.call("sync_read_v1", {"user_id": user, "reads": list(reads)})["reads"]


def digest_of(lines: list[str]) -> list[dict[str, str]]:
    return [{"digest": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()}]


def lines_of(rows: list[Any]) -> list[str]:
    return [f"{row['id']} {row['updated_at']}" for row in rows]


def test_a_digest_is_of_the_keys_and_versions_that_the_read_finds(db, user):
    for _ in range(3):
        db.session(user)
    [rows, digest, none] = read(
        db,
        user,
        {"table": "sessions"},
        {"table": "sessions", "digest": True},
        {"table": "sessions", "where": {"status": "abandoned"}, "digest": True},
    )
    assert len(rows) == 3
    assert digest == digest_of(lines_of(rows))
    assert none == digest_of([])


def test_a_read_of_what_another_finds_follows_its_order_its_limit_and_its_place(db, user):
    sessions = [db.session(user) for _ in range(4)]
    for session in sessions:
        db.send(db.transaction(user, revision(session)))
    newest = {"table": "sessions", "order_by": "created_at", "descending": True}
    [all_rows] = read(db, user, newest)
    first = {key: all_rows[0][key] for key in ("created_at", "id")}
    page = {**newest, "limit": 2, "after": first}
    children = {"table": "session_revisions", "where": {"session_id": keys_of(0)}}
    [rows, of_page, digest] = read(db, user, page, children, {**children, "digest": True})
    assert [row["id"] for row in rows] == [row["id"] for row in all_rows[1:3]]
    assert {row["session_id"] for row in of_page} == {row["id"] for row in rows}
    assert digest == digest_of(lines_of(of_page))
    [of_page] = read(db, user, {**page, "digest": True})
    assert of_page == digest_of(lines_of(rows)), "a digest keeps to a limit too"


def test_a_digest_tells_of_nobody_elses_rows(db, user, stranger):
    session = db.session(user)
    db.send(db.transaction(user, revision(session)))
    children = {"table": "session_revisions", "where": {"session_id": keys_of(0)}}
    asked = {"table": "sessions", "where": {"id": session}}
    for answer in read(db, stranger, {**asked, "digest": True}, {**children, "digest": True}):
        assert answer == digest_of([])


def test_a_page_of_a_thousand_has_room_for_the_row_that_tells_of_another(db, user):
    db.query(
        "insert into public.sessions (id, user_id, status, source)"
        " select gen_random_uuid(), %s, 'active', 'prompt' from generate_series(1, 1002)",
        user,
    )
    [default, asked, digest] = read(
        db,
        user,
        {"table": "sessions"},
        {"table": "sessions", "limit": 5_000},
        {"table": "sessions", "limit": None, "digest": True},
    )
    assert (len(default), len(asked)) == (1_000, 1_001)
    with db.owner.transaction():
        db.owner.execute("set local timezone = 'UTC'")
        every = db.query(
            "select id, to_jsonb(updated_at) #>> '{}' as updated_at from public.sessions"
            " where user_id = %s",
            user,
        )
    assert digest == digest_of(lines_of(every))


@pytest.mark.parametrize("number", [0, 1, -1, 7, None])
def test_a_read_can_only_refer_to_one_before_it(db, user, number):
    children = {"table": "session_revisions", "where": {"session_id": {"read": number}}}
    with pytest.raises(psycopg.errors.DatabaseError, match="refers to a read"):
        read(db, user, children)
