"""What the server confirmed, kept so that it can be sent again once a restore made it forget.

An applied transaction remembers the versions it was applied on (`bases`) and those it made
(`versions`), per row. Functions take the open connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import orjson

from local_store.decoding import decode_ops
from local_store.op_log import Applied, narrowing, touch, touched_by
from local_store.ops import Outcome, Selection, TableSpec
from local_store.rows import base_of
from local_store.schema import REPLAYED, SETTLED

REOPENED_AT_ONCE = 500

Versions = Mapping[str, str | None]


def applied(
    connection: sqlite3.Connection, position: int, outcome: Outcome
) -> tuple[Applied, Versions]:
    """Return what to keep of an applied transaction; the rows still have their old bases.

    With it come those of its versions that tell where their rows stand now. One that is replayed
    may not be the last that its rows have seen: taking its version for the row's would make the
    next change of the row meet a conflict with this buffer's own writes.
    """
    ops, schemas, known = connection.execute(
        "SELECT ops, schemas, versions FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    keys = {f"{op.table}/{op.id}": op.kind for op in reversed(decode_ops(ops, schemas, {}))}
    stood = {name: _base(connection, name) for name in {*keys, *outcome.versions}}
    bases = {name: None if kind == "insert" else stood[name] for name, kind in keys.items()}
    kept = Applied(orjson.dumps(bases).decode(), orjson.dumps(dict(outcome.versions)).decode())
    if known is None:  # not a replay
        return kept, outcome.versions
    made: Versions = orjson.loads(known)
    _pass_on(connection, position, made, outcome.versions)
    return kept, {
        name: version
        for name, version in outcome.versions.items()
        if name not in made or made[name] == stood[name]
    }


def _pass_on(
    connection: sqlite3.Connection, position: int, made: Versions, versions: Versions
) -> None:
    """Tell what is replayed next on each row when a restored server gave it another version.

    A version that is the same as then came from a duplicate: what follows keeps its own base, which
    may be a version that another container made in between.
    """
    connection.executemany(
        "UPDATE op_log SET bases = json_patch(bases, ?1) WHERE bases IS NOT NULL AND position ="
        " (SELECT min(position) FROM touches WHERE tbl = ?2 AND id = ?3 AND position > ?4"
        f"  AND stage <> {SETTLED})",
        [
            (orjson.dumps({name: version}).decode(), *name.split("/", 1), position)
            for name, version in versions.items()
            if name not in made or made[name] != version
        ],
    )


def _base(connection: sqlite3.Connection, name: str) -> str | None:
    table, _, row_id = name.partition("/")
    return base_of(connection, (table, row_id))


def meet(connection: sqlite3.Connection, position: int, name: str, version: str | None) -> None:
    """Let an unsettled transaction build on the server's row as it was met there.

    Left at what it was applied on before a restore, it would meet the same row again for ever.
    """
    connection.execute(
        "UPDATE op_log SET bases = json_patch(bases, ?), versions = json_patch(versions, ?)"
        " WHERE position = ? AND parked = 0",
        (
            orjson.dumps({name: version}).decode(),
            orjson.dumps({name: None}).decode(),  # whatever it makes now is where the row stands
            position,
        ),
    )


def reopen(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], selection: Selection
) -> tuple[int, int]:
    """Make applied transactions pending again; returns (how many, their bytes).

    Their rows have them already, so their touches bring nothing a second time.
    """
    narrowed, values = narrowing(selection)
    count, size_total, last = 0, 0, 0
    while True:  # some at a time: the whole history may be larger than the memory
        found = connection.execute(
            "SELECT position, ops, schemas, children, size_bytes FROM op_log l"
            f" WHERE state = 'applied' AND position > ?{narrowed} ORDER BY position LIMIT ?",
            (last, *values, REOPENED_AT_ONCE),
        ).fetchall()
        if not found:
            return count, size_total
        for position, ops, schemas, children, size_bytes in found:
            decoded = decode_ops(ops, schemas, tables)
            keys = touched_by(tables, decoded, orjson.loads(children))
            touch(connection, position, keys, stage=REPLAYED)
            count, size_total, last = count + 1, size_total + size_bytes, position
        connection.executemany(
            "UPDATE op_log SET state = 'pending', settled_at = NULL, attempts = 0, due_at = 0"
            " WHERE position = ?",
            [(position,) for position, *_ in found],
        )
