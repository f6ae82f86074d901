"""A connection to the local Supabase that can act as each of its roles."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from local_store.door import digest_of
from local_store.ops import Row, WireOp

NOW = "2026-01-01T00:00:00.000000+00:00"


class Database:
    """Speaks to Postgres as owner, as a user, as anon, or as the worker calling the RPCs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.owner = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self.log_id = new()
        self._seq = 0

    def close(self) -> None:
        self.owner.close()

    def query(self, statement: str, *values: Any) -> list[Row]:
        cursor = self.owner.execute(statement, values)
        return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *values: Any) -> Any:
        [row] = self.query(statement, *values)
        [value] = row.values()
        return value

    def as_role(self, role: str, user: str | None, statement: str, *values: Any) -> list[Row]:
        with self.owner.transaction():
            self.owner.execute("select set_config('role', %s, true)", (role,))
            self.owner.execute(
                "select set_config('request.jwt.claims', %s, true)",
                (json.dumps({"sub": user, "role": role}),),
            )
            cursor = self.owner.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def as_user(self, user: str, statement: str, *values: Any) -> list[Row]:
        return self.as_role("authenticated", user, statement, *values)

    def transaction(self, user: str, *ops: Row, **changes: Any) -> Row:
        self._seq += 1
        wire = [WireOp(op["table"], op["kind"], op["id"], op.get("values", {})) for op in ops]
        return {
            "txn_id": new(),
            "seq": self._seq,
            "user_id": user,
            "digest": digest_of(wire),
            "accepted_at": NOW,
            "after": [],
            "replaces": None,
            "ops": list(ops),
            **changes,
        }

    def send(self, *transactions: Row, log_id: str | None = None) -> list[Row]:
        batch = {
            "protocol": 1,
            "log_id": log_id or self.log_id,
            "acknowledged_seq": self._seq,
            "transactions": list(transactions),
        }
        return self.call("sync_apply_batch_v1", batch)["verdicts"]

    def call(self, function: str, argument: Row) -> Row:
        statement = f"select public.{function}(%s) as reply"
        [row] = self.as_role("service_role", None, statement, Jsonb(argument))
        return row["reply"]

    def session(self, user: str, **values: Any) -> str:
        row_id = new()
        [verdict] = self.send(self.transaction(user, insert("sessions", row_id, **values)))
        assert verdict["verdict"] == "applied"
        return row_id

    def version(self, table: str, row_id: str) -> str:
        return self.one(
            f"select to_json(updated_at at time zone 'utc') #>> '{{}}' || '+00:00'"
            f" from public.{table} where id = %s",
            row_id,
        )


def new() -> str:
    return str(uuid.uuid4())  # noqa: TID251  a test's ids need no order


def insert(table: str, row_id: str, **values: Any) -> Row:
    return {"table": table, "kind": "insert", "id": row_id, "values": values}


def update(table: str, row_id: str, base: str | None, **values: Any) -> Row:
    return {"table": table, "kind": "update", "id": row_id, "values": values, "base": base}


def delete(table: str, row_id: str, base: str | None) -> Row:
    return {"table": table, "kind": "delete", "id": row_id, "values": {}, "base": base}


def revision(session: str, row_id: str | None = None, **values: Any) -> Row:
    given = {"session_id": session, "content": "text", "revision_type": "initial", **values}
    return insert("session_revisions", row_id or new(), **given)


@pytest.fixture
def db(local_supabase) -> Iterator[Database]:
    made = Database(local_supabase.database_url)
    yield made
    made.close()


@pytest.fixture
def user() -> str:
    return new()


@pytest.fixture
def stranger() -> str:
    return new()
