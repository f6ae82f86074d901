"""Each of the doctor's server checks fails for its real cause, and passes on a sound server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from local_store import Column
from local_store.ops import Row, TableSpec
from syncer.core.diagnosis import CLIENT_FUNCTIONS, Check
from syncer.doctor import DoctorReport, examine
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from tests.sql.own_tables import REGISTER_NOTES, REGISTER_PROJECTS, SPECS, Sandbox, sandbox

MINE = "user_id = (select auth.uid())"


@pytest.fixture
def db(local_supabase) -> Iterator[Sandbox]:
    with sandbox(local_supabase.database_url) as made:
        made.run(REGISTER_PROJECTS)
        made.run(REGISTER_NOTES)
        yield made


class Asked:
    """Answers the doctor from inside the sandbox's transaction, as service_role."""

    def __init__(self, db: Sandbox) -> None:
        self._db = db

    def doctor(self) -> Row:
        return self._db.call("sync_doctor_v1", {})


def report(db: Sandbox, specs: list[TableSpec] | None = None) -> DoctorReport:
    specs = [*SESSION_TABLES, *SPECS] if specs is None else specs
    return examine(Settings(), Path("/nonexistent/buffer"), specs, remote=Asked(db), environ={})


def failures(db: Sandbox, specs: list[TableSpec] | None = None) -> dict[str, Check]:
    found = {check.name: check for check in report(db, specs).checks if not check.ok}
    return {name: check for name, check in found.items() if name != "folder"}


def test_a_sound_server_passes_every_check(db):
    checks = {check.name: check for check in report(db).checks}
    assert failures(db) == {}
    wanted = {
        "server.reachable",
        "server.functions",
        "server.exposure",
        "server.migrations",
        "server.views",
        "clock",
        "spec.notes.columns",
    }
    wanted |= {
        f"table.{table}.{name}"
        for table in ("sessions", "notes")
        for name in ("exists", "identity", "row_security", "policies", "grants", "anon")
    }
    wanted |= {f"table.notes.{name}" for name in ("version", "tombstones", "parent", "indexes")}
    assert wanted <= set(checks)
    assert all(
        check.severity == "info" and not check.remedy for check in checks.values() if check.ok
    )


SPOILT = {
    "a function is gone": (
        "drop function public.sync_park_v1(jsonb)",
        "server.functions",
        "error",
    ),
    "a function is not granted": (
        "revoke execute on function public.sync_read_v1(jsonb) from service_role",
        "server.functions",
        "error",
    ),
    "a function is open to users": (
        "grant execute on function public.sync_apply_batch_v1(jsonb) to authenticated",
        "server.exposure",
        "error",
    ),
    "a migration is missing": (
        "delete from sync.schema_migrations where name like '010%'",
        "server.migrations",
        "error",
    ),
    "a migration changed": (
        "update sync.schema_migrations set sha256 = 'x' where name like '010%'",
        "server.migrations",
        "warning",
    ),
    "the server is newer": (
        "insert into sync.schema_migrations (name, sha256) values ('999_new', 'x')",
        "server.migrations",
        "warning",
    ),
    "migrations were applied by hand": (
        "drop table sync.schema_migrations",
        "server.migrations",
        "warning",
    ),
    "a view shows all rows": (
        "create view public.open_notes as select * from public.notes;"
        "grant select on public.open_notes to authenticated",
        "server.views",
        "error",
    ),
    "a view upon a view shows all rows": (
        "create view public.inner_notes with (security_invoker = on)"
        " as select * from public.notes;"
        "create view public.open_notes as select * from public.inner_notes;"
        "grant select on public.open_notes to anon",
        "server.views",
        "error",
    ),
    "a materialised view shows all rows": (
        "create materialized view public.open_notes as select * from public.notes;"
        "grant select on public.open_notes to authenticated",
        "server.views",
        "error",
    ),
    "the table is gone": ("drop table public.notes", "table.notes.exists", "error"),
    "the key is no longer unique": (
        "alter table public.notes drop constraint notes_pkey",
        "table.notes.identity",
        "error",
    ),
    "row-level security is off": (
        "alter table public.notes disable row level security",
        "table.notes.row_security",
        "error",
    ),
    "a policy is gone": (
        "drop policy notes_update on public.notes",
        "table.notes.policies",
        "error",
    ),
    "a policy of the session tables is gone": (
        "drop policy sessions_insert on public.sessions",
        "table.sessions.policies",
        "error",
    ),
    "a policy is slow": (
        "alter policy notes_select on public.notes using (user_id = auth.uid())",
        "table.notes.policies",
        "warning",
    ),
    "a grant to users is gone": (
        "revoke insert on public.notes from authenticated",
        "table.notes.grants",
        "error",
    ),
    "a grant to the worker is gone": (
        "revoke select on public.notes from service_role",
        "table.notes.grants",
        "error",
    ),
    "anon may write": ("grant insert on public.notes to anon", "table.notes.anon", "error"),
    "everybody may truncate": (
        "grant truncate on public.notes to public",
        "table.notes.anon",
        "error",
    ),
    "anon may read": ("grant select on public.notes to anon", "table.notes.anon", "warning"),
    "the version's trigger is disabled": (
        "alter table public.notes disable trigger zz_sync_version",
        "table.notes.version",
        "error",
    ),
    "the version's trigger of the session tables is gone": (
        "drop trigger update_drafts_updated_at on public.session_drafts",
        "table.session_drafts.version",
        "error",
    ),
    "the version's trigger sees updates only": (
        "create or replace trigger zz_sync_version before update on public.notes"
        " for each row execute function sync.move_version_notes()",
        "table.notes.version",
        "error",
    ),
    "the tombstones' trigger is gone": (
        "drop trigger sync_remember_deleted on public.notes",
        "table.notes.tombstones",
        "error",
    ),
    "the tombstones' trigger remembers another name": (
        "create or replace trigger sync_remember_deleted after delete on public.notes"
        " referencing old table as old_rows for each statement"
        " execute function sync.remember_deleted('other', 'id', 'user_id')",
        "table.notes.tombstones",
        "error",
    ),
    "the foreign key is gone": (
        "alter table public.notes drop constraint notes_project",
        "table.notes.parent",
        "error",
    ),
    "the foreign key doesn't cascade": (
        "alter table public.notes drop constraint notes_project,"
        " add foreign key (project_id, user_id) references public.projects (id, user_id)",
        "table.notes.parent",
        "warning",
    ),
    "the foreign key doesn't bind the owner": (
        "alter table public.notes drop constraint notes_project,"
        " add foreign key (project_id) references public.projects (id) on delete cascade",
        "table.notes.parent",
        "warning",
    ),
    "the owner's index is gone": (
        "drop index public.notes_of_user",
        "table.notes.indexes",
        "warning",
    ),
    "the parent's index is gone": (
        "drop index public.notes_of_project",
        "table.notes.indexes",
        "warning",
    ),
    "a table isn't registered": (
        "select public.sync_unregister_table('public.notes')",
        "spec.notes.registered",
        "error",
    ),
    "a column is gone": ("alter table public.notes drop body", "spec.notes.columns", "error"),
    "a column has another type": (
        "alter table public.notes alter body type bytea using null",
        "spec.notes.types",
        "error",
    ),
    "a column must be filled now": (
        "alter table public.notes add due date not null",
        "spec.notes.required",
        "warning",
    ),
    "a column became the server's": (
        "update sync.tables set server_owned = '{body}' where name = 'notes'",
        "spec.notes.server_owned",
        "error",
    ),
}


@pytest.mark.parametrize("cause", SPOILT)
def test_each_check_fails_for_its_cause_alone(db, cause):
    script, name, severity = SPOILT[cause]
    db.run(script)
    found = failures(db)
    assert set(found) == {name}
    assert found[name].severity == severity
    assert found[name].remedy
    assert report(db).ok == (severity != "error")


REMEDIED = {
    cause: SPOILT[cause]
    for cause in (
        "a function is open to users",
        "row-level security is off",
        "a grant to users is gone",
        "a grant to the worker is gone",
        "anon may write",
        "everybody may truncate",
        "the version's trigger is disabled",
        "the tombstones' trigger is gone",
        "the tombstones' trigger remembers another name",
        "the key is no longer unique",
        "the owner's index is gone",
        "a table isn't registered",
    )
}


@pytest.mark.parametrize("cause", REMEDIED)
def test_a_remedy_that_is_a_statement_mends_it(db, cause):
    script, name, _ = REMEDIED[cause]
    db.run(script)
    db.run(failures(db)[name].remedy)
    assert failures(db) == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"key": "nr", "columns": {**SPECS[1].columns, "nr": Column("text")}}, "key"),
        ({"owner": "author"}, "owner"),
        ({"version": "changed"}, "version"),
        ({"parent": None}, "parent"),
    ],
)
def test_a_spec_that_means_other_columns_than_the_registration_is_found(db, change, name):
    db.run("alter table public.notes add nr text")
    db.run("alter table public.notes add author uuid, add changed timestamptz")
    spec = replace(SPECS[1], **change)
    found = failures(db, [*SESSION_TABLES, SPECS[0], spec])
    assert f"spec.notes.{name}" in found
    assert found[f"spec.notes.{name}"].severity == "error"


def test_a_renamed_column_is_found_in_the_registration_and_in_the_spec(db):
    db.run("alter table public.notes rename user_id to author")
    found = failures(db)
    assert found["table.notes.identity"].severity == "error"
    assert found["spec.notes.columns"].severity == "error"


def test_registered_tables_without_a_spec_are_a_warning(db):
    found = failures(db, SPECS)
    assert set(found) == {"spec.others"}
    assert found["spec.others"].severity == "warning"
    assert "session_drafts" in found["spec.others"].detail


def test_the_column_types_that_a_spec_may_name_are_all_known(db):
    db.run(
        "create type public.mood as enum ('good');"
        "create domain public.short as text check (length(value) < 9);"
        "alter table public.notes add a int, add b real, add c boolean, add d jsonb,"
        " add e text[], add f public.mood, add g public.short, add h varchar(10)"
    )
    types = {"a": "int", "b": "float", "c": "bool", "d": "json", "e": "text[]"}
    types |= {"f": "text", "g": "text", "h": "text"}
    columns = {**SPECS[1].columns, **{name: Column(kind) for name, kind in types.items()}}
    assert failures(db, [*SESSION_TABLES, SPECS[0], replace(SPECS[1], columns=columns)]) == {}


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_nobody_else_may_ask(db, role):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.as_role(role, None, "select public.sync_doctor_v1('{}')")


def test_the_guard_refuses_even_the_owner(db):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.one("select public.sync_doctor_v1('{}')")


def test_what_the_client_may_call_is_on_the_server(db):
    exposed = Asked(db).doctor()["functions"]
    assert all(exposed[name]["service_role"] for name in CLIENT_FUNCTIONS)
