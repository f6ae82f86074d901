"""What containers do to one session and what is read of it, for the tests of conflicts."""

from __future__ import annotations

from typing import Any

import psycopg

from local_store import Insert, Row, Update, user_uuid
from local_store.clock import new_id
from syncer import operators
from syncer.remote import TableRead
from syncer.testkit import BufferedApp

USER = "github:42"


def session(app: BufferedApp, **values: Any) -> str:
    row_id = new_id()
    given = {"metadata": {"x": 0, "y": 0}, **values}
    app.store.write([Insert("sessions", {"id": row_id, **given})], user_id=USER)
    app.drain()
    return row_id


def learn(app: BufferedApp, row_id: str, *tables: str) -> None:
    """Read through: take the server's rows into the local copy."""
    as_of = app.store.change_counter()
    wheres = [("sessions", {"id": row_id})] + [(t, {"session_id": row_id}) for t in tables]
    reads = [TableRead(table, where) for table, where in wheres]
    for (table, where), rows in zip(wheres, app.remote.read(user_uuid(USER), reads), strict=True):
        app.store.refresh(table, rows, user_id=USER, as_of=as_of, where=where)


def update(app: BufferedApp, row_id: str, **values: Any) -> str:
    return app.store.write([Update("sessions", row_id, values)], user_id=USER).txn_id


def revision(row_id: str, content: str = "more") -> Insert:
    values = {"session_id": row_id, "content": content, "revision_type": "manual_edit"}
    return Insert("session_revisions", {"id": new_id(), **values})


def row_of(sql: psycopg.Connection[Any], row_id: str) -> Row:
    found = sql.execute("select to_jsonb(s) from sessions s where id = %s", (row_id,)).fetchone()
    assert found is not None
    return found[0]


def records(app: BufferedApp) -> list[Row]:
    return operators.conflicts(app.remote, undecided=False)
