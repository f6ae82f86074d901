"""A table that can't work in the sync is refused, with field and remedy, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.sql.own_tables import REGISTER_NOTES, REGISTER_PROJECTS, Sandbox, sandbox

MINE = "using (user_id = (select auth.uid()))"
PARENT = {"p_parent_column": "project_id", "p_parent": "public.projects"}


@pytest.fixture
def db(local_supabase) -> Iterator[Sandbox]:
    with sandbox(local_supabase.database_url) as made:
        yield made


# what spoils it, table, arguments, SQLSTATE, field
REFUSED = {
    "no table": ("", None, {}, "22023", "p_table"),
    "a view": ("create view public.v as select 1 as id", "public.v", {}, "42P16", "p_table"),
    "a partitioned table": (
        "create table public.p (id uuid) partition by hash (id)",
        "public.p",
        {},
        "42P16",
        "p_table",
    ),
    "a partition": (
        "create table public.p (id uuid) partition by list (id);"
        "create table public.q partition of public.p default",
        "public.q",
        {},
        "42P16",
        "p_table",
    ),
    "an unlogged table": (
        "alter table public.notes set unlogged",
        "public.notes",
        {},
        "42P16",
        "p_table",
    ),
    "a table of the sync": ("", "sync.ledger", {}, "42P16", "p_table"),
    "a session table": ("", "public.sessions", {}, "42P16", "p_table"),
    "a name with a slash": (
        'alter table public.notes rename to "a/b"',
        'public."a/b"',
        {},
        "42P16",
        "p_table",
    ),
    "a name registered from another schema": (
        REGISTER_PROJECTS + "; create schema app;"
        "grant usage on schema app to authenticated, service_role;"
        "create table app.projects (like public.projects including all)",
        "app.projects",
        {},
        "42P16",
        "p_table",
    ),
    "a schema closed to the API": (
        "create schema app; alter table public.projects set schema app",
        "app.projects",
        {},
        "42P16",
        "p_table",
    ),
    "no such key": ("", "public.projects", {"p_key": "nr"}, "22023", "p_key"),
    "a key that isn't unique": ("", "public.projects", {"p_key": "name"}, "42P16", "p_key"),
    "a composite key": (
        "alter table public.notes drop constraint notes_pkey, add primary key (id, user_id)",
        "public.notes",
        {},
        "42P16",
        "p_key",
    ),
    "a nullable unique key": (
        "alter table public.projects add k text unique",
        "public.projects",
        {"p_key": "k"},
        "42P16",
        "p_key",
    ),
    "a key unique only in part": (
        "alter table public.projects add k text not null;"
        "create unique index on public.projects (k) where name > 'm'",
        "public.projects",
        {"p_key": "k"},
        "42P16",
        "p_key",
    ),
    "a number as key": (
        "alter table public.projects add k bigint not null unique",
        "public.projects",
        {"p_key": "k"},
        "42P16",
        "p_key",
    ),
    "no owner": ("", "public.projects", {"p_owner": "who"}, "42P16", "p_owner"),
    "an owner that isn't a uuid": ("", "public.projects", {"p_owner": "name"}, "42P16", "p_owner"),
    "no version": ("", "public.projects", {"p_version": "v"}, "42P16", "p_version"),
    "a version without a zone": (
        "alter table public.projects alter updated_at type timestamp",
        "public.projects",
        {},
        "42P16",
        "p_version",
    ),
    "row-level security off": (
        "alter table public.projects disable row level security",
        "public.projects",
        {},
        "42P16",
        "row-level security",
    ),
    "a verb without policy": (
        "drop policy notes_update on public.notes",
        "public.notes",
        {},
        "42P16",
        "policies",
    ),
    "a verb allowed to others only": (
        "drop policy notes_update on public.notes;"
        f"create policy other on public.notes for update to anon {MINE}",
        "public.notes",
        {},
        "42P16",
        "policies",
    ),
    "a verb restricted but never allowed": (
        "drop policy notes_update on public.notes;"
        f"create policy less on public.notes as restrictive for update to authenticated {MINE}",
        "public.notes",
        {},
        "42P16",
        "policies",
    ),
    "column grants": (
        "grant update (name) on public.projects to authenticated",
        "public.projects",
        {},
        "42P16",
        "column grants",
    ),
    "a parent without its column": (
        REGISTER_PROJECTS,
        "public.notes",
        {"p_parent": "public.projects"},
        "22023",
        "p_parent",
    ),
    "a parent that isn't registered": ("", "public.notes", PARENT, "42P16", "p_parent"),
    "a parent column that isn't there": (
        REGISTER_PROJECTS,
        "public.notes",
        {**PARENT, "p_parent_column": "nr"},
        "22023",
        "p_parent_column",
    ),
    "a parent without a foreign key": (
        REGISTER_PROJECTS + "; alter table public.notes drop constraint notes_project",
        "public.notes",
        PARENT,
        "42P16",
        "p_parent_column",
    ),
    "a foreign key to something else than the key": (
        "alter table public.projects add code uuid unique, add twin text not null unique;"
        "select public.sync_register_table('public.projects', p_key => 'twin')",
        "public.notes",
        PARENT,
        "42P16",
        "p_parent_column",
    ),
    "itself as parent": (
        REGISTER_PROJECTS + "; alter table public.projects add up uuid references public.projects",
        "public.projects",
        {"p_parent_column": "up", "p_parent": "public.projects"},
        "42P16",
        "p_parent",
    ),
    "a circle of parents": (
        f"{REGISTER_PROJECTS}; {REGISTER_NOTES};"
        "alter table public.projects add note_id text references public.notes",
        "public.projects",
        {"p_parent_column": "note_id", "p_parent": "public.notes"},
        "42P16",
        "p_parent",
    ),
    "another key under registered children": (
        f"{REGISTER_PROJECTS}; {REGISTER_NOTES};"
        "alter table public.projects add twin text not null unique",
        "public.projects",
        {"p_key": "twin"},
        "42P16",
        "p_key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_field_and_remedy(db, case):
    script, table, arguments, sqlstate, field = REFUSED[case]
    if script:
        db.run(script)
    before = db.query("select * from sync.tables order by position")
    with pytest.raises(psycopg.DatabaseError) as caught:
        db.register(table, **arguments)
    diagnosis = caught.value.diag
    assert (diagnosis.sqlstate, diagnosis.column_name) == (sqlstate, field)
    assert field in diagnosis.message_primary
    assert diagnosis.message_hint
    assert db.query("select * from sync.tables order by position") == before


def test_a_refused_table_is_left_as_it_was(db):
    db.run("grant select on public.notes to anon")
    with pytest.raises(psycopg.DatabaseError):
        db.register("public.notes", **PARENT)
    assert db.one("select has_table_privilege('anon', 'public.notes', 'select')")
    triggers = "select count(*) from pg_trigger where tgrelid = 'public.notes'::regclass"
    assert db.one(triggers + " and not tgisinternal") == 0
