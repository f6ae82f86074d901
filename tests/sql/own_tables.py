"""Tables of a user's own, in a database transaction that is rolled back after the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from local_store import Column, TableSpec
from local_store.ops import Row
from tests.sql.conftest import Database

PROJECTS = """
create table public.projects (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null default auth.uid(),
  name text not null,
  settings jsonb,
  updated_at timestamptz not null default now(),
  unique (id, user_id)
);
create index projects_of_user on public.projects (user_id);
alter table public.projects enable row level security;
create policy own_projects on public.projects for all to authenticated
  using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
"""
NOTES = """
create table public.notes (
  id text primary key,
  user_id uuid not null default auth.uid(),
  project_id uuid not null,
  body text,
  updated_at timestamptz,
  constraint notes_project foreign key (project_id, user_id)
    references public.projects (id, user_id) on delete cascade
);
create index notes_of_user on public.notes (user_id);
create index notes_of_project on public.notes (project_id);
alter table public.notes enable row level security;
create policy notes_select on public.notes for select to authenticated
  using (user_id = (select auth.uid()));
create policy notes_insert on public.notes for insert to authenticated
  with check (user_id = (select auth.uid()));
create policy notes_update on public.notes for update to authenticated
  using (user_id = (select auth.uid()));
create policy notes_delete on public.notes for delete to public
  using (user_id = (select auth.uid()));
"""
REGISTER_PROJECTS = "select public.sync_register_table('public.projects')"
REGISTER_NOTES = (
    "select public.sync_register_table('public.notes',"
    " p_parent_column => 'project_id', p_parent => 'public.projects')"
)

_STAMPED = {"user_id": Column("uuid"), "updated_at": Column("timestamp")}
SPECS = [
    TableSpec(
        "projects",
        {
            **_STAMPED,
            "id": Column("uuid"),
            "name": Column("text", nullable=False),
            "settings": Column("json"),
        },
    ),
    TableSpec(
        "notes",
        {
            **_STAMPED,
            "id": Column("text"),
            "project_id": Column("uuid", nullable=False),
            "body": Column("text"),
        },
        parent=("project_id", "projects"),
    ),
]


class Sandbox(Database):
    """A Database whose statements all run in one transaction; roles are left after each."""

    def as_role(self, role: str, user: str | None, statement: str, *values: Any) -> list[Row]:
        with self.owner.transaction():
            self._become(role, json.dumps({"sub": user, "role": role}))
            cursor = self.owner.execute(statement, values)
            rows = cursor.fetchall() if cursor.description else []
            self._become("none", "")
            return rows

    def _become(self, role: str, claims: str) -> None:
        # Released savepoints keep what was set in them, so the way back must be explicit.
        self.owner.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, claims),
        )

    def run(self, script: str) -> None:
        """Run statements without parameters."""
        with self.owner.transaction():
            self.owner.execute(script)

    def register(self, table: str, **arguments: Any) -> Row:
        given = "".join(f", {name} => %s" for name in arguments)
        statement = f"select public.sync_register_table(%s{given})"
        with self.owner.transaction():
            return self.one(statement, table, *arguments.values())


@contextmanager
def sandbox(database_url: str) -> Iterator[Sandbox]:
    """Open a sandbox with both tables in it, not yet registered."""
    made = Sandbox(database_url)
    try:
        with made.owner.transaction(force_rollback=True):
            made.run(PROJECTS + NOTES)
            yield made
    finally:
        made.close()
