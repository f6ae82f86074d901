"""The schema keeps users apart and derives by itself what clients must not forge."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.types.json import Jsonb

from syncer.migrate import load_migrations
from tests.sql.conftest import new

TABLES = ("sessions", "session_revisions", "session_drafts", "hole_resolutions")
VIEWS = ("session_summary", "active_sessions_by_user")


def make_session(db, user: str) -> str:
    return db.as_user(user, "insert into sessions (user_id) values (%s) returning id", user)[0][
        "id"
    ].__str__()


def add_revision(db, user: str, session: str) -> None:
    db.as_user(
        user,
        "insert into session_revisions (session_id, content, revision_type)"
        " values (%s, 'c', 'initial')",
        session,
    )


# -- who may do what --


@pytest.mark.parametrize("table", TABLES)
def test_each_table_has_a_policy_for_each_verb_in_initplan_form(db, table):
    found = db.query(
        "select cmd, roles, qual, with_check from pg_policies"
        " where schemaname = 'public' and tablename = %s",
        table,
    )
    assert {row["cmd"] for row in found} == {"SELECT", "INSERT", "UPDATE", "DELETE"}
    for row in found:
        assert row["roles"] == ["authenticated"]
        for expression in (row["qual"], row["with_check"]):
            if expression is not None:
                assert "( SELECT auth.uid() AS uid)" in expression
    assert db.one("select relrowsecurity from pg_class where oid = %s::regclass", table)


@pytest.mark.parametrize("name", [*TABLES, *VIEWS])
def test_anon_is_granted_nothing(db, name):
    granted = "select has_table_privilege('anon', %s, %s)"
    assert not any(db.one(granted, name, verb) for verb in ("select", "insert", "update", "delete"))


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
def test_the_api_roles_are_granted_what_they_need(db, role):
    granted = "select has_table_privilege(%s, %s, 'select, insert, update, delete')"
    assert all(db.one(granted, role, table) for table in TABLES)
    assert all(db.one("select has_table_privilege(%s, %s, 'select')", role, v) for v in VIEWS)


def test_no_api_role_but_service_role_gets_into_the_sync_schema(db):
    for role in ("anon", "authenticated"):
        assert not db.one("select has_schema_privilege(%s, 'sync', 'usage')", role)
    assert db.one("select has_schema_privilege('service_role', 'sync', 'usage')")


def test_every_function_has_a_fixed_search_path(db):
    open_ones = db.query(
        "select p.oid::regprocedure::text as name from pg_proc p"
        " join pg_namespace n on n.oid = p.pronamespace"
        " where n.nspname in ('public', 'sync', 'private') and not exists ("
        "   select from unnest(p.proconfig) c where c like 'search_path=%%')"
    )
    assert open_ones == []


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_only_service_role_may_execute_the_rpcs(db, role):
    found = db.query(
        "select p.oid::regprocedure::text as name,"
        " has_function_privilege(%s, p.oid, 'execute') as allowed,"
        " has_function_privilege('service_role', p.oid, 'execute') as needed"
        " from pg_proc p where p.pronamespace = 'public'::regnamespace"
        " and p.proname ~ '^sync_.*_v[0-9]+$'",
        role,
    )
    assert len(found) >= 4
    assert [row["name"] for row in found if row["allowed"] or not row["needed"]] == []


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize(
    "function", ["sync_apply_batch_v1", "sync_read_v1", "sync_audit_v1", "sync_apply_batch_text_v1"]
)
def test_a_client_that_calls_an_rpc_through_postgrest_is_refused(local_supabase, role, function):
    import httpx

    key = local_supabase.anon_key if role == "anon" else local_supabase.user_token(new())
    headers = {"apikey": local_supabase.anon_key, "Authorization": f"Bearer {key}"}
    argument = {"p_batch" if function == "sync_apply_batch_v1" else "p": {"protocol": 1}}
    kind = "application/json"
    if function.endswith("text_v1"):
        kind = "text/plain"
    reply = httpx.post(
        f"{local_supabase.url}/rest/v1/rpc/{function}",
        headers={**headers, "Content-Type": kind},
        content=str(argument).replace("'", '"'),
    )
    assert reply.status_code in (401, 403, 404)
    assert reply.json()["code"] in ("42501", "PGRST202")


def test_even_with_the_grant_the_guard_refuses_other_roles(db):
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="service_role"):
        db.query("select public.sync_apply_batch_v1('{}')")  # the owner isn't service_role either


@pytest.mark.parametrize("table", TABLES[1:])
def test_a_stranger_sees_and_changes_nothing(db, user, stranger, table):
    session = make_session(db, user)
    add_revision(db, user, session)
    for statement in (
        f"select * from {table}",
        f"update {table} set metadata = '{{}}' where true returning 1 as x",
        f"delete from {table} where true returning 1 as x",
        "select * from sessions",
        "update sessions set status = 'abandoned' where true returning 1 as x",
        "delete from sessions where true returning 1 as x",
    ):
        assert db.as_user(stranger, statement) == []
    assert len(db.as_user(user, "select * from session_revisions")) == 1


def test_a_user_can_not_write_as_somebody_else(db, user, stranger):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.as_user(stranger, "insert into sessions (user_id) values (%s)", user)


def test_a_child_can_not_hang_on_a_strangers_session_even_for_service_role(db, user, stranger):
    session = make_session(db, user)
    for act in (
        lambda s, *v: db.as_user(stranger, s, *v),
        lambda s, *v: db.as_role("service_role", None, s, *v),
    ):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            act(
                "insert into session_revisions (session_id, user_id, content, revision_type)"
                " values (%s, %s, 'c', 'initial')",
                session,
                stranger,
            )


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_shows_nobody_elses_rows(db, user, stranger, view):
    make_session(db, user)
    assert len(db.as_user(user, f"select * from {view}")) == 1
    assert db.as_user(stranger, f"select * from {view}") == []
    options = db.one("select reloptions::text from pg_class where oid = %s::regclass", view)
    assert "security_invoker=true" in options


# -- stamps --


def test_child_inserts_counters_and_no_op_updates_do_not_move_the_token(db, user):
    session = make_session(db, user)
    before = db.version("sessions", session)
    add_revision(db, user, session)
    db.as_user(user, "update sessions set status = status where id = %s", session)
    db.as_user(user, "delete from session_revisions where session_id = %s", session)
    assert db.version("sessions", session) == before


def test_two_updates_in_one_transaction_get_growing_tokens(db, user):
    session = make_session(db, user)
    with db.owner.transaction():
        seen = [
            db.one(
                "update sessions set metadata = %s where id = %s returning updated_at",
                Jsonb({"n": n}),
                session,
            )
            for n in range(5)
        ]
    assert seen == sorted(set(seen))


def test_a_token_grows_even_when_the_clock_stepped_back(db, user):
    session = make_session(db, user)
    # Only the owner, with triggers off, can put a stamp into the future.
    with db.owner.transaction():
        db.owner.execute("set local session_replication_role = replica")
        db.owner.execute("update sessions set updated_at = '2999-01-01' where id = %s", (session,))
    db.as_user(user, "update sessions set status = 'abandoned' where id = %s", session)
    assert db.version("sessions", session) == "2999-01-01T00:00:00.000001+00:00"


def test_stamps_counters_and_derived_columns_can_not_be_forged(db, user):
    columns = "user_id, created_at, updated_at, revision_count, hole_count, current_ir"
    db.as_user(
        user,
        f"insert into sessions ({columns}, current_draft_version)"
        " values (%s, '2001-01-01', '2001-01-01', 99, 99, '{\"a\": 1}', 7)",
        user,
    )
    db.as_user(
        user,
        "update sessions set created_at = '2001-01-01', updated_at = '2001-01-01',"
        " revision_count = 99, hole_count = 99, current_ir = '{}', current_draft_version = 7"
        " where true",
    )
    [row] = db.as_user(user, "select * from sessions")
    assert row["created_at"].year > 2001
    assert row["updated_at"].year > 2001
    derived = ("revision_count", "hole_count", "current_ir", "current_draft_version")
    assert [row[name] for name in derived] == [0, 0, None, 0]


def test_an_owner_can_not_be_changed(db, user, stranger):
    session = make_session(db, user)
    db.as_role(
        "service_role", None, "update sessions set user_id = %s where id = %s", stranger, session
    )
    assert str(db.one("select user_id from sessions where id = %s", session)) == user


# -- counters --


def test_counters_equal_recounts_after_concurrent_inserts_and_deletes(db, local_supabase, user):
    session = make_session(db, user)

    def work(number: int) -> None:
        with psycopg.connect(local_supabase.database_url, autocommit=True) as connection:
            for turn in range(10):
                connection.execute(
                    "insert into session_revisions (session_id, user_id, content, revision_type)"
                    " select %s, %s, 'c', 'initial' from generate_series(1, 3)",
                    (session, user),
                )
                connection.execute(
                    "insert into hole_resolutions (session_id, user_id, hole_id, resolution_text,"
                    " resolution_type) values (%s, %s, %s, 't', 'clarify_intent')",
                    (session, user, f"{number}/{turn}"),
                )
                if turn % 2:
                    connection.execute(
                        "delete from session_revisions where id in (select id from"
                        " session_revisions where session_id = %s limit 1 for update skip locked)",
                        (session,),
                    )
                    connection.execute(
                        "update hole_resolutions set applied = true where hole_id = %s",
                        (f"{number}/{turn}",),
                    )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    [row] = db.query(
        "select revision_count, hole_count,"
        " (select count(*) from session_revisions where session_id = s.id) as revisions,"
        " (select count(*) from hole_resolutions where session_id = s.id and not applied) as holes"
        " from sessions s where id = %s",
        session,
    )
    assert (row["revision_count"], row["hole_count"]) == (row["revisions"], row["holes"])
    assert row["holes"] == 20


def test_a_child_that_moves_takes_its_count_along(db, user):
    first, second = make_session(db, user), make_session(db, user)
    add_revision(db, user, first)
    db.as_user(user, "update session_revisions set session_id = %s where true", second)
    counts = {str(r["id"]): r["revision_count"] for r in db.as_user(user, "select * from sessions")}
    assert counts == {first: 0, second: 1}


# -- the current draft --

DRAFT = (
    "insert into session_drafts (id, session_id, version, ir, validation_status)"
    " values (%s, %s, %s, %s, 'pending')"
)


def current(db, session: str) -> tuple:
    [row] = db.query(
        "select current_ir, current_draft_version from sessions where id = %s", session
    )
    return row["current_ir"], row["current_draft_version"]


def test_the_current_draft_is_derived_whichever_row_comes_first(db, user):
    draft, other = new(), new()
    session = make_session(db, user)
    db.as_user(user, "update sessions set current_draft_id = %s where id = %s", draft, session)
    assert current(db, session) == (None, 0)
    db.as_user(user, DRAFT, draft, session, 1, Jsonb({"v": 1}))
    assert current(db, session) == ({"v": 1}, 1)
    db.as_user(user, DRAFT, other, session, 2, Jsonb({"v": 2}))
    assert current(db, session) == ({"v": 1}, 1)
    db.as_user(user, "update sessions set current_draft_id = %s where id = %s", other, session)
    assert current(db, session) == ({"v": 2}, 2)
    db.as_user(user, "update sessions set current_draft_id = %s where id = %s", draft, session)
    assert current(db, session) == ({"v": 1}, 1)


def test_deriving_the_current_draft_does_not_move_the_token(db, user):
    draft, session = new(), make_session(db, user)
    db.as_user(user, "update sessions set current_draft_id = %s where id = %s", draft, session)
    before = db.version("sessions", session)
    db.as_user(user, DRAFT, draft, session, 1, Jsonb({"v": 1}))
    assert current(db, session) == ({"v": 1}, 1)
    assert db.version("sessions", session) == before


def test_a_strangers_draft_is_never_derived(db, user, stranger):
    theirs, draft = make_session(db, stranger), new()
    db.as_user(stranger, DRAFT, draft, theirs, 1, Jsonb({"secret": 1}))
    mine = make_session(db, user)
    db.as_user(user, "update sessions set current_draft_id = %s where id = %s", draft, mine)
    assert current(db, mine) == (None, 0)


def test_the_same_draft_version_may_come_twice(db, user):
    session = make_session(db, user)
    for _ in range(2):
        db.as_user(user, DRAFT, new(), session, 1, Jsonb({}))
    assert len(db.as_user(user, "select 1 as x from session_drafts")) == 2


def test_deleting_a_session_takes_its_children_along(db, user):
    session = make_session(db, user)
    add_revision(db, user, session)
    db.as_user(user, "delete from sessions where id = %s", session)
    assert db.query("select 1 from session_revisions where session_id = %s", session) == []


def test_a_function_of_somebody_else_under_our_name_is_not_replaced(db):
    [triggers] = [item for item in load_migrations() if item.name.startswith("006_")]
    with db.owner.transaction(force_rollback=True):
        db.query(
            "create or replace function public.update_updated_at_column() returns trigger"
            " language plpgsql as $$ begin new.updated_at := now(); return new; end $$"
        )
        with pytest.raises(psycopg.Error, match="is not ours"):
            db.owner.execute(triggers.sql.encode())
