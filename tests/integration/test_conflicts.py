"""Two containers on one row, real Postgres and PostgREST, a folder each; a person at the end.

Where it says `copy` or `segments`, another process delivers first, from a copy of the log or from
what was shipped of it: the outcome is the same, because what is merged is in the log and what was
applied is in the ledger.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Delete, Insert, Row, TableSpec
from local_store.clock import ManualClock, new_id
from syncer import operators
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp
from syncer.testkit.faults import Cut
from tests.integration.one_row import USER, learn, records, revision, row_of, session, update
from tests.integration.segment_delivery import deliver_by_segments

# The engine's own rules, without the sessions' policies: an overlap is left to a person.
TABLES = [replace(spec, policy="merge") for spec in SESSION_TABLES]
STALE = "2026-02-01T00:00:00+00:00"

Make = Callable[..., BufferedApp]


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def pair(buffered_store: Make) -> tuple[BufferedApp, BufferedApp]:
    return buffered_store(TABLES), buffered_store(TABLES)


def deliver(app: BufferedApp, by: str, tmp_path: Path, fresh_supabase: Any) -> None:
    """Let the container deliver, or somebody else in its stead, and then it."""
    if by == "copy":
        app.store.close()
        folder = tmp_path / new_id()
        shutil.copytree(app.folder, folder)
        app.restart()
        other = BufferedApp(
            folder, list(app.store.tables.values()), fresh_supabase.url, fresh_supabase.secret_key
        )
        other.drain()
        other.close()
    if by == "segments":
        deliver_by_segments(app, tmp_path / new_id())
    app.drain()


by_each = pytest.mark.parametrize("by", ["itself", "copy", "segments"])


@by_each
def test_the_overlap_is_one_record_and_the_rest_merges(pair, sql, by, tmp_path, fresh_supabase):
    mine, theirs = pair
    row_id = session(mine)
    learn(theirs, row_id)
    finalized_at = "2026-01-02T00:00:00+00:00"
    update(mine, row_id, finalized_at=finalized_at)
    overlapping = update(mine, row_id, status="finalized")
    update(theirs, row_id, status="abandoned")
    theirs.drain()
    deliver(mine, by, tmp_path, fresh_supabase)
    row = row_of(sql, row_id)
    assert (row["status"], row["finalized_at"][:10]) == ("abandoned", "2026-01-02")
    [record] = records(mine)
    assert (record["txn_id"], record["columns"], record["outcome"]) == (
        overlapping, ["status"], "manual",
    )  # fmt: skip
    assert (record["base"], record["mine"], record["theirs"]) == (
        {"status": "active"}, {"status": "finalized"}, {"status": "abandoned"},
    )  # fmt: skip
    assert mine.store.state(overlapping) == "conflict"
    assert mine.audit().balanced


@by_each
def test_disjoint_columns_and_keys_merge_without_a_word(pair, sql, by, tmp_path, fresh_supabase):
    mine, theirs = pair
    row_id = session(mine)
    learn(theirs, row_id)
    update(mine, row_id, metadata={"x": 1, "y": 0}, status="finalized")
    update(theirs, row_id, metadata={"x": 0, "y": 1, "z": 1})
    theirs.drain()
    deliver(mine, by, tmp_path, fresh_supabase)
    row = row_of(sql, row_id)
    assert (row["status"], row["metadata"]) == ("finalized", {"x": 1, "y": 1, "z": 1})
    assert records(mine) == []
    learn(mine, row_id)
    assert mine.store.get("sessions", row_id, user_id=USER)["metadata"] == row["metadata"]
    assert mine.audit().balanced


def test_own_work_is_never_in_conflict_with_itself(pair, sql, fault_proxy):
    mine, _ = pair
    row_id = session(mine)
    for number in range(5):
        update(mine, row_id, metadata={"n": number})
        mine.store.write([revision(row_id)], user_id=USER)
    mine.flush_once()
    update(mine, row_id, metadata={"n": "after"})
    fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
    mine.flush_once()  # applied, the reply is lost
    sql.execute("update sessions set revision_count = 99 where id = %s", (row_id,))
    sql.execute("alter table sessions disable trigger update_sessions_updated_at")
    sql.execute("update sessions set updated_at = '2031-01-01 00:00:00.100000+00'")
    sql.execute("alter table sessions enable trigger update_sessions_updated_at")
    update(mine, row_id, metadata={"n": "last"})
    mine.drain()
    assert row_of(sql, row_id)["metadata"] == {"n": "last"}
    assert records(mine) == []
    assert operators.dead_letters(mine.remote) == []


def test_containers_with_skewed_clocks_see_no_conflict_where_there_is_none(buffered_store, sql):
    ahead, behind = (
        buffered_store(TABLES, clock=ManualClock(datetime(year, 1, 1, tzinfo=UTC)))
        for year in (2031, 2021)
    )
    row_id = session(ahead)
    for number, app in enumerate((ahead, behind, ahead, behind)):
        learn(app, row_id)
        update(app, row_id, metadata={"n": number})
        app.drain()
    assert row_of(sql, row_id)["metadata"] == {"n": 3}
    assert records(ahead) == []


def test_an_edit_by_sql_from_outside_is_the_other_side_too(pair, sql):
    mine, _ = pair
    row_id = session(mine)
    update(mine, row_id, status="finalized")
    sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    mine.drain()
    [record] = records(mine)
    assert (record["theirs"], record["outcome"]) == ({"status": "abandoned"}, "manual")


def with_policy(buffered_store: Make, **changes: Any) -> BufferedApp:
    tables = [replace(spec, **changes) if spec.name == "sessions" else spec for spec in TABLES]
    return buffered_store(tables)


@pytest.mark.parametrize(
    ("policy", "status", "outcome"),
    [("remote_wins", "abandoned", "remote"), ("local_wins", "finalized", "local")],
)
def test_a_policy_decides_and_its_record_comes_with_the_effect(
    buffered_store, sql, policy, status, outcome
):
    mine = with_policy(buffered_store, policy=policy)
    row_id = session(mine)
    txn_id = update(mine, row_id, status="finalized")
    sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    mine.drain()
    assert row_of(sql, row_id)["status"] == status
    [record] = records(mine)
    assert (record["txn_id"], record["outcome"]) == (txn_id, outcome)
    assert (record["mine"], record["theirs"]) == (
        {"status": "finalized"}, {"status": "abandoned"},
    )  # fmt: skip
    [(same_moment,)] = sql.execute(
        "select l.xmin = c.xmin from sync.ledger l join sync.conflicts c using (txn_id)"
    ).fetchall()
    assert same_moment


def test_twenty_writers_appending_under_faults_keep_every_element(buffered_store, sql, fault_proxy):
    def appended(conflict: Any) -> Row:
        base, mine = conflict.base["metadata"]["list"], conflict.mine["metadata"]["list"]
        there = conflict.theirs["metadata"]["list"]
        return {"metadata": {"list": there + [x for x in mine if x not in base]}}

    apps = [
        with_policy(buffered_store, policy={"metadata": appended}, json_merge=frozenset())
        for _ in range(20)
    ]
    row_id = session(apps[0], metadata={"list": []})
    for app in apps[1:]:
        learn(app, row_id)
    for number, app in enumerate(apps):
        for step in range(2):
            seen = app.store.get("sessions", row_id, user_id=USER)["metadata"]["list"]
            update(app, row_id, metadata={"list": [*seen, f"{number}.{step}"]})
        if number % 3 == 0:
            fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
        app.flush_once()
    for app in apps:
        app.drain()
    found = row_of(sql, row_id)["metadata"]["list"]
    assert sorted(found) == sorted(f"{n}.{step}" for n in range(20) for step in range(2))
    for number in range(20):
        assert found.index(f"{number}.0") < found.index(f"{number}.1")
    assert operators.dead_letters(apps[0].remote) == []


# -- deletes --


def test_an_update_elsewhere_outlives_my_delete_and_is_told(pair, sql):
    mine, theirs = pair
    row_id = session(mine)
    learn(theirs, row_id)
    mine.store.write([Delete("sessions", row_id)], user_id=USER)
    update(theirs, row_id, status="finalized")
    theirs.drain()
    mine.drain()
    assert row_of(sql, row_id)["status"] == "finalized"
    [record] = records(mine)
    assert (record["outcome"], record["columns"]) == ("remote", ["status"])
    assert mine.store.get("sessions", row_id, user_id=USER)["status"] == "finalized"
    assert mine.audit().balanced


@pytest.fixture
def unheard(pair, fault_proxy) -> str:
    """A session whose insert was applied for a container that never got the reply."""
    mine, theirs = pair
    fault_proxy.next(Cut("after"), matching="/rpc/sync_apply_batch")
    row_id = new_id()
    mine.store.write([Insert("sessions", {"id": row_id})], user_id=USER)
    assert mine.flush_once().stopped == "outage"
    learn(theirs, row_id)
    return row_id


@by_each
def test_what_was_put_in_a_column_left_to_the_table_outlives_a_delete_and_is_told(
    pair, sql, unheard, by, tmp_path, fresh_supabase
):
    mine, theirs = pair
    mine.store.write([Delete("sessions", unheard)], user_id=USER)
    update(theirs, unheard, status="finalized")
    theirs.drain()
    deliver(mine, by, tmp_path, fresh_supabase)
    assert row_of(sql, unheard)["status"] == "finalized"
    [record] = records(mine)
    assert (record["outcome"], record["columns"]) == ("remote", ["status"])
    assert (record["base"], record["theirs"]) == ({"status": "active"}, {"status": "finalized"})


@by_each
def test_a_column_left_to_the_table_is_no_conflict_because_another_one_was_changed(
    pair, sql, unheard, by, tmp_path, fresh_supabase
):
    mine, theirs = pair
    update(mine, unheard, status="finalized")
    update(theirs, unheard, metadata={"x": 1})
    theirs.drain()
    deliver(mine, by, tmp_path, fresh_supabase)
    row = row_of(sql, unheard)
    assert (row["status"], row["metadata"]) == ("finalized", {"x": 1})
    assert records(mine) == []


def test_my_update_of_a_row_deleted_elsewhere_is_told(pair, sql):
    mine, theirs = pair
    row_id = session(mine)
    learn(theirs, row_id)
    txn_id = update(mine, row_id, status="finalized")
    mine.store.write([revision(row_id, "kept in the record")], user_id=USER)
    theirs.store.write([Delete("sessions", row_id)], user_id=USER)
    theirs.drain()
    mine.drain()
    assert sql.execute("select count(*) from sessions").fetchone() == (0,)
    told = {record["table"]: record for record in records(mine)}
    assert {record["outcome"] for record in told.values()} == {"deleted"}
    assert told["sessions"]["mine"] == {"status": "finalized"}
    assert told["session_revisions"]["mine"]["content"] == "kept in the record"
    assert mine.store.state(txn_id) == "applied"
    assert mine.store.get("sessions", row_id, user_id=USER) is None
    assert mine.store.select("session_revisions", user_id=USER) == []
    assert mine.audit().balanced


def test_a_delete_takes_children_added_elsewhere_along_and_lists_them(pair, sql):
    mine, theirs = pair
    row_id = session(mine)
    mine.store.write([revision(row_id, "known")], user_id=USER)
    mine.drain()
    learn(theirs, row_id)
    theirs.store.write([revision(row_id, "from elsewhere")], user_id=USER)
    theirs.drain()
    mine.store.write([Delete("sessions", row_id)], user_id=USER)
    assert mine.drain().applied == 1
    [record] = records(mine)
    assert record["outcome"] == "deleted"
    assert [child["content"] for child in record["theirs"].values()] == ["from elsewhere"]
    assert mine.audit().balanced


def test_a_change_taken_back_before_it_was_sent_leaves_the_others_value_and_no_record(pair, sql):
    mine, theirs = pair
    row_id = session(mine)
    learn(theirs, row_id)
    update(mine, row_id, status="finalized")
    update(mine, row_id, status="active")
    update(theirs, row_id, status="abandoned")
    theirs.drain()
    mine.drain()
    assert row_of(sql, row_id)["status"] == "abandoned"
    assert records(mine) == []
    assert mine.audit().balanced


def test_insert_delete_insert_of_one_row_ends_with_the_row(pair, sql):
    mine, _ = pair
    row_id = session(mine)
    mine.store.write([Delete("sessions", row_id)], user_id=USER)
    mine.store.write([Insert("sessions", {"id": row_id, "metadata": {"again": 1}})], user_id=USER)
    mine.drain()
    assert row_of(sql, row_id)["metadata"] == {"again": 1}
    assert records(mine) == []
    assert mine.audit().balanced


# -- a person --


@pytest.mark.parametrize("choice", ["mine", "theirs"])
def test_a_person_decides_after_both_containers_are_gone(
    buffered_store, sql, choice, fresh_supabase
):
    mine, theirs = buffered_store(TABLES), buffered_store(TABLES)
    row_id = session(mine)
    learn(theirs, row_id)
    update(mine, row_id, status="finalized")
    update(mine, row_id, metadata={"x": 1, "y": 0})
    mine.store.write([revision(row_id, "behind it")], user_id=USER)
    update(theirs, row_id, status="abandoned")
    theirs.drain()
    mine.drain()
    mine.drain()
    for app in (mine, theirs):
        app.store.close()
        shutil.rmtree(app.folder)
    laptop = operators.SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key)
    [record] = operators.conflicts(laptop)
    results = operators.resolve(laptop, record["id"], choice)
    assert {result["verdict"] for result in results} == {"applied"}
    row = row_of(sql, row_id)
    assert row["status"] == {"mine": "finalized", "theirs": "abandoned"}[choice]
    assert (row["metadata"], row["revision_count"]) == ({"x": 1, "y": 0}, 1)
    [kept] = operators.conflicts(laptop, undecided=False)
    assert (kept["mine"], kept["theirs"], kept["resolution"]) == (
        {"status": "finalized"}, {"status": "abandoned"}, choice,
    )  # fmt: skip
    laptop.close()


@pytest.mark.parametrize("choice", ["mine", "theirs"])
def test_a_container_that_lives_on_learns_the_decision_and_goes_on_from_it(pair, sql, choice):
    mine, _ = pair
    row_id = session(mine)
    parked = update(mine, row_id, status="finalized")
    sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    mine.drain()
    [record] = records(mine)
    operators.resolve(mine.remote, record["id"], choice)
    update(mine, row_id, metadata={"x": 5, "y": 0})
    mine.store.recheck([parked])
    mine.drain()
    status = {"mine": "finalized", "theirs": "abandoned"}[choice]
    local = mine.store.get("sessions", row_id, user_id=USER)
    assert (mine.store.state(parked), local["status"], local["_pending"]) == (
        "applied", status, False,
    )  # fmt: skip
    row = row_of(sql, row_id)
    assert (row["status"], row["metadata"]) == (status, {"x": 5, "y": 0})
    assert mine.audit().balanced


def test_a_decision_for_them_is_not_undone_by_a_later_edit_that_did_not_know_it(pair, sql):
    mine, _ = pair
    row_id = session(mine)
    parked = update(mine, row_id, status="finalized")
    sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    mine.drain()
    [record] = records(mine)
    operators.resolve(mine.remote, record["id"], "theirs")
    late = update(mine, row_id, status="active")  # made without knowing the decision
    mine.store.recheck([parked])
    mine.drain()
    mine.drain()
    assert row_of(sql, row_id)["status"] == "abandoned"
    assert mine.store.state(late) == "conflict"
    [again] = operators.conflicts(mine.remote)
    assert (again["mine"], again["theirs"]) == ({"status": "active"}, {"status": "abandoned"})


def test_a_registered_spec_can_leave_every_meeting_to_a_person(buffered_store, sql):
    def manual(spec: TableSpec) -> TableSpec:
        return replace(spec, policy="manual")

    mine = buffered_store([manual(spec) for spec in TABLES])
    row_id = session(mine)
    update(mine, row_id, metadata={"mine": 1})
    sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    mine.drain()
    [record] = records(mine)
    assert (record["outcome"], record["columns"]) == ("manual", ["metadata"])
