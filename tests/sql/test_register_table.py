"""A user's own table joins the sync by one call; the refusals have a file of their own."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.sql.conftest import delete, insert, new, update
from tests.sql.own_tables import REGISTER_NOTES, REGISTER_PROJECTS, Sandbox, sandbox

MINE = "using (user_id = (select auth.uid()))"
PARENT = {"p_parent_column": "project_id", "p_parent": "public.projects"}


@pytest.fixture
def db(local_supabase) -> Iterator[Sandbox]:
    with sandbox(local_supabase.database_url) as made:
        yield made


@pytest.fixture
def registered(db) -> Sandbox:
    db.run(REGISTER_PROJECTS)
    db.run(REGISTER_NOTES)
    return db


def add_project(db: Sandbox, user: str, **values) -> str:
    row_id = new()
    [verdict] = db.send(
        db.transaction(user, insert("projects", row_id, **{"name": "Atlas", **values}))
    )
    assert verdict["verdict"] == "applied", verdict
    return row_id


def add_note(db: Sandbox, user: str, project: str, row_id: str | None = None) -> str:
    row_id = row_id or new()
    note = insert("notes", row_id, project_id=project, body="text")
    [verdict] = db.send(db.transaction(user, note))
    assert verdict["verdict"] == "applied", verdict
    return row_id


def position(db: Sandbox, name: str) -> int:
    return db.one("select position from sync.tables where name = %s", name)


# -- what it does --


def test_registration_tells_what_it_took(db):
    told = db.register("public.projects")
    last = db.one("select max(position) from sync.tables where name <> 'projects'")
    assert told == {
        "table": "projects",
        "registered": True,
        "position": last + 1,
        "key": "id",
        "key_type": "uuid",
        "owner": "user_id",
        "version": "updated_at",
        "parent": None,
        "server_owned": [],
        "warnings": [],
    }
    told = db.register("public.notes", **PARENT)
    assert (told["parent"], told["position"], told["key_type"]) == ("projects", last + 2, "text")
    assert told["warnings"] == []


def test_registered_tables_are_written_as_their_author(registered, user, stranger):
    note = add_note(registered, user, add_project(registered, user))
    mine = registered.as_user(user, "select body from public.notes where id = %s", note)
    assert mine == [{"body": "text"}]
    assert registered.as_user(stranger, "select 1 from public.notes") == []


def test_a_text_key_may_hold_a_slash(registered, user):
    note = add_note(registered, user, add_project(registered, user), "2026/01/31")
    base = registered.version("notes", note)
    [verdict] = registered.send(registered.transaction(user, delete("notes", note, base)))
    assert verdict["verdict"] == "applied"
    [verdict] = registered.send(registered.transaction(user, update("notes", note, base, body="x")))
    assert (verdict["verdict"], verdict["rows"]) == ("conflict", {f"notes/{note}": None})


def test_registering_again_changes_nothing(registered):
    before = registered.query("select * from sync.tables order by position")
    registered.run(REGISTER_NOTES)
    registered.run(REGISTER_PROJECTS)
    assert registered.query("select * from sync.tables order by position") == before
    triggers = "select count(*) from pg_trigger where tgrelid = 'public.notes'::regclass"
    assert registered.one(triggers + " and not tgisinternal") == 2


def test_registering_with_other_arguments_changes_the_registration(db, user):
    db.run("alter table public.projects add moved_at timestamptz")
    db.run(REGISTER_PROJECTS)
    told = db.register("public.projects", p_version="moved_at")
    assert told["version"] == "moved_at"
    before = db.one("select position from sync.tables where name = 'projects'")
    project = add_project(db, user)
    assert db.one("select moved_at is not null from projects where id = %s", project)
    assert position(db, "projects") == before


def test_children_move_behind_a_parent_that_was_registered_later(db):
    db.run("alter table public.notes drop constraint notes_project")
    db.register("public.notes")
    db.run("create table public.tags (like public.notes including all)")
    db.run("alter table public.tags enable row level security")
    db.run(f"create policy own on public.tags for all to authenticated {MINE}")
    db.run("alter table public.tags add note_id text references public.notes (id)")
    db.register("public.tags", p_parent_column="note_id", p_parent="public.notes")
    db.run(REGISTER_PROJECTS)
    assert position(db, "notes") < position(db, "tags") < position(db, "projects")
    db.run("alter table public.notes add foreign key (project_id) references public.projects (id)")
    db.run(REGISTER_NOTES)
    assert position(db, "projects") < position(db, "notes") < position(db, "tags")


def test_anon_and_public_lose_their_grants_and_nobody_may_truncate(db):
    db.run("grant all on public.projects to anon, authenticated")
    db.run("grant select on public.projects to public")
    db.run(REGISTER_PROJECTS)
    may = "select has_table_privilege(%s, 'public.projects', %s)"
    for verb in ("select", "insert", "update", "delete"):
        assert not db.one(may, "anon", verb)
        assert db.one(may, "authenticated", verb)
        assert db.one(may, "service_role", verb)
    assert not db.one(may, "authenticated", "truncate")


def test_a_serial_column_can_be_filled_by_the_author(db, user):
    db.run("alter table public.projects add number serial")
    db.run(REGISTER_PROJECTS)
    project = add_project(db, user)
    assert db.one("select number from public.projects where id = %s", project) == 1


def test_a_value_for_a_generated_column_is_refused_alone(db, user):
    db.run("alter table public.projects add shout text generated always as (upper(name)) stored")
    db.run("alter table public.projects add number int generated always as identity")
    assert db.register("public.projects")["server_owned"] == ["number", "shout"]
    bad = db.transaction(user, insert("projects", new(), name="a", shout="B"))
    good = db.transaction(user, insert("projects", new(), name="a"))
    assert [v["verdict"] for v in db.send(bad, good)] == ["rejected", "applied"]


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
@pytest.mark.parametrize("function", ["sync_register_table", "sync_unregister_table"])
def test_no_api_role_may_register_or_unregister(db, role, function):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.as_role(role, None, f"select public.{function}('public.projects')")


# -- the version --


def test_the_version_moves_twice_in_one_transaction_despite_a_naive_trigger(db, user):
    db.run(
        "create function public.touch() returns trigger language plpgsql set search_path = ''"
        " as $$ begin new.updated_at := now(); return new; end $$;"
        "create trigger touch before update on public.projects"
        " for each row execute function public.touch();"
    )
    db.run(REGISTER_PROJECTS)
    project = add_project(db, user)
    versions = [db.version("projects", project)]
    for name in ("b", "c"):
        db.query("update public.projects set name = %s where id = %s", name, project)
        versions.append(db.version("projects", project))
    assert versions == sorted(set(versions))
    db.query("update public.projects set name = name where id = %s", project)
    assert db.version("projects", project) == versions[-1]


def test_a_version_ahead_of_the_clock_still_moves(registered, user):
    project = add_project(registered, user)
    registered.run("alter table public.projects disable trigger zz_sync_version")
    registered.query("update public.projects set updated_at = '2999-01-01'")
    registered.run("alter table public.projects enable trigger zz_sync_version")
    registered.query("update public.projects set name = 'b' where id = %s", project)
    moved = "select updated_at = '2999-01-01 00:00:00.000001Z' from public.projects where id = %s"
    assert registered.one(moved, project)


def test_the_version_moves_when_only_the_way_a_number_is_written_changes(registered, user):
    project = add_project(registered, user, settings={"a": 1})
    before = registered.version("projects", project)
    registered.query("update public.projects set settings = '{\"a\": 1.0}' where id = %s", project)
    assert registered.version("projects", project) > before


def test_a_generated_column_does_not_move_the_version(db, user):
    db.run("alter table public.projects add shout text generated always as (upper(name)) stored")
    db.run(REGISTER_PROJECTS)
    project = add_project(db, user)
    before = db.version("projects", project)
    db.query("update public.projects set name = name where id = %s", project)
    assert db.version("projects", project) == before


def test_nobody_can_choose_the_version(registered, user):
    project = add_project(registered, user)
    before = registered.version("projects", project)
    registered.as_user(user, "update public.projects set updated_at = '2000-01-01'")
    assert registered.version("projects", project) == before
    registered.as_user(
        user, "insert into public.projects (name, updated_at) values ('b', '2000-01-01')"
    )
    assert registered.one("select min(updated_at) > '2020-01-01' from public.projects")


def test_a_stale_base_of_a_registered_table_conflicts(registered, user):
    project = add_project(registered, user)
    base = registered.version("projects", project)
    registered.as_user(user, "update public.projects set name = 'theirs'")
    mine = update("projects", project, base, name="mine")
    [verdict] = registered.send(registered.transaction(user, mine))
    assert verdict["verdict"] == "conflict"
    assert verdict["rows"][f"projects/{project}"]["name"] == "theirs"


# -- tombstones --


@pytest.mark.parametrize("how", ["by hand", "by the batch"])
def test_a_deleted_row_and_what_went_with_it_are_remembered(registered, user, how):
    project = add_project(registered, user)
    note = add_note(registered, user, project)
    if how == "by hand":
        registered.query("delete from public.projects where id = %s", project)
    else:
        base = registered.version("projects", project)
        registered.send(registered.transaction(user, delete("projects", project, base)))
    found = registered.query(
        "select table_name, row_id, user_id::text from sync.tombstones where user_id = %s"
        " order by 1",
        user,
    )
    assert [tuple(row.values()) for row in found] == [
        ("notes", note, user),
        ("projects", project, user),
    ]


def test_a_schema_of_its_own_works_once_the_api_may_use_it(db, user):
    db.run("create schema app; grant usage on schema app to authenticated, service_role")
    db.run("alter table public.projects set schema app")
    db.register("app.projects")
    project = add_project(db, user)
    assert db.one("select count(*) from app.projects where id = %s", project) == 1


# -- what is only warned of --

WARNED = {
    "no ON DELETE CASCADE": "alter table public.notes drop constraint notes_project,"
    " add foreign key (project_id, user_id) references public.projects (id, user_id)",
    "doesn't bind the owner": "alter table public.notes drop constraint notes_project,"
    " add foreign key (project_id) references public.projects (id) on delete cascade",
    "no index on user_id": "drop index public.notes_of_user",
    "no index on project_id": "drop index public.notes_of_project",
    "auth.uid() once per row": "alter policy notes_select on public.notes"
    " using (user_id = auth.uid())",
    "after zz_sync_version": "create function public.late() returns trigger language plpgsql"
    " set search_path = '' as $$ begin return new; end $$;"
    "create trigger zzz before update on public.notes for each row execute function public.late()",
}


@pytest.mark.parametrize("warning", WARNED)
def test_what_could_be_better_is_warned_of(db, warning):
    db.run(REGISTER_PROJECTS)
    db.run(WARNED[warning])
    [told] = db.register("public.notes", **PARENT)["warnings"]
    assert warning in told


# -- and back --


def test_unregistering_keeps_the_rows_and_holds_what_comes_later(registered, user):
    note = add_note(registered, user, add_project(registered, user))
    told = registered.one("select public.sync_unregister_table('public.notes')")
    assert told == {"table": "notes", "registered": False}
    assert registered.one("select count(*) from public.notes where id = %s", note) == 1
    triggers = "select count(*) from pg_trigger where tgrelid = 'public.notes'::regclass"
    assert registered.one(triggers + " and not tgisinternal") == 0
    assert registered.one("select to_regprocedure('sync.move_version_notes()')") is None
    [verdict] = registered.send(
        registered.transaction(user, insert("notes", new(), project_id=new()))
    )
    assert (verdict["verdict"], verdict["sqlstate"]) == ("held", "42P01")
    told = registered.one("select public.sync_unregister_table('public.notes')")
    assert told == {"table": "notes", "registered": False}


@pytest.mark.parametrize("table", ["public.projects", "public.sessions"])
def test_a_parent_of_registered_tables_and_the_session_tables_stay(registered, table):
    with pytest.raises(psycopg.DatabaseError) as caught:
        registered.one("select public.sync_unregister_table(%s)", table)
    assert caught.value.diag.sqlstate == "42P16"
