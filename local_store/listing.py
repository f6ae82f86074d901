"""Everything by which a transaction is found: filled in behind the write, and before any look.

Accepting appends to op_log alone, because each further index that a commit touches is a page more
to write and to sync while callers wait. Names, places, turns and touches follow for a few hundred
transactions at once, in sorted order; they can be made again from op_log, so their own commit
needs no sync.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import orjson

from local_store.decoding import RecordDamaged, decode_ops
from local_store.op_log import touched_by
from local_store.ops import TableSpec
from local_store.schema import intact

Touch = tuple[str, str, int, str | None]  # table, id, position, the parent it is given

LISTED_AT_ONCE = 256  # behind a write: about 2 ms
LISTED_BYTES_MAX = 4 * 1024 * 1024  # of ops: what is remembered of the tail stays small
_NEW = "position > (SELECT listed FROM totals)"
_TOUCH = (
    "INSERT OR IGNORE INTO touches (tbl, id, position, parent_id)"
    " SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(?)"
)
_FOLLOW = (
    f"INSERT INTO names SELECT txn_id, position FROM op_log WHERE {_NEW} ORDER BY txn_id",
    f"INSERT INTO places SELECT log, seq, position FROM op_log WHERE {_NEW}",
    f"INSERT INTO turns SELECT log, user_id, position, due_at FROM op_log WHERE {_NEW}"
    " AND state IN ('pending', 'held') AND parked = 0 ORDER BY log, user_id, position",
    "UPDATE totals SET listed = (SELECT coalesce(max(position), listed) FROM op_log)",
)


def unlisted(connection: sqlite3.Connection) -> int:
    """Return how many transactions at the end of the log can't be found yet."""
    last, listed = connection.execute(
        "SELECT max(position), (SELECT listed FROM totals) FROM op_log"
    ).fetchone()
    if not isinstance(listed, int):  # nothing, or text, where a number was: damage like any other
        raise RecordDamaged
    return max(0, (last or 0) - int(listed))


def list_new(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    touches: Sequence[Touch] | None = None,
) -> None:
    """Make all that was accepted findable; `touches` are those of the new ones, where known."""
    if touches is None:
        touches = _touches(connection, tables)
    connection.execute(_TOUCH, (orjson.dumps(sorted(touches, key=_key)).decode(),))
    for statement in _FOLLOW:
        connection.execute(statement)


def _key(touch: Touch) -> tuple[str, str, int]:
    return touch[:3]


def _touches(connection: sqlite3.Connection, tables: Mapping[str, TableSpec]) -> list[Touch]:
    """Read from the log which rows the new transactions change."""
    found: list[Touch] = []
    for position, ops, schemas, children, is_intact in connection.execute(
        f"SELECT position, ops, schemas, children, {intact()} FROM op_log WHERE {_NEW}"
    ):
        if not is_intact:
            raise RecordDamaged
        keys = touched_by(tables, decode_ops(ops, schemas, {}), orjson.loads(children))
        found += [(*key, position, parent_id) for key, parent_id in keys.items()]
    return found
