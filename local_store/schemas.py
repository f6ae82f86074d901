"""The versions of the tables' own schemas: older content is up-cast, newer content is refused.

Queued transactions keep the version they were written in and are up-cast whenever they are read;
rows are up-cast once, when newer code opens the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import orjson

from local_store.errors import SchemaTooNew
from local_store.ops import TableSpec


def adopt(connection: sqlite3.Connection, tables: Mapping[str, TableSpec]) -> None:
    """Note the tables' versions; the open transaction writes.

    Raises SchemaTooNew when newer code wrote this file, ValueError when an up-cast is missing.
    """
    known = dict(connection.execute("SELECT tbl, version FROM schemas").fetchall())
    for spec in tables.values():
        found = known.get(spec.name)
        if found == spec.schema_version:
            continue
        if found is not None and found > spec.schema_version:
            raise SchemaTooNew(f"{spec.name} {found}", f"{spec.name} {spec.schema_version}")
        missing = [v for v in range(found or 1, spec.schema_version) if v not in spec.upcasts]
        if missing and found is not None:
            raise ValueError(f"{spec.name}.upcasts: no function for version {missing[0]}")
        if found is not None:
            _upcast_rows(connection, spec, found)
        connection.execute(
            "INSERT INTO schemas VALUES (?1, ?2) ON CONFLICT (tbl) DO UPDATE SET version = ?2",
            (spec.name, spec.schema_version),
        )


def _upcast_rows(connection: sqlite3.Connection, spec: TableSpec, found: int) -> None:
    rows = connection.execute(
        "SELECT rowid, body FROM rows WHERE tbl = ? AND body IS NOT NULL", (spec.name,)
    ).fetchall()
    for rowid, encoded in rows:
        body = orjson.loads(encoded)
        for version in range(found, spec.schema_version):
            body = dict(spec.upcasts[version](body))
        connection.execute(
            "UPDATE rows SET body = ? WHERE rowid = ?", (orjson.dumps(body).decode(), rowid)
        )
