"""Rows: the server's as they are known here, and the views of them that readers get.

Functions take the open connection; the store owns locks and transactions. Every statement that
returns a row to a caller filters by `user_id`: somebody else's row looks absent.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from local_store.decoding import RecordDamaged, decode_ops
from local_store.ops import HeldRow, Row, TableSpec
from local_store.schema import PENDING, REPLAYED, SETTLED, intact, row_intact
from local_store.views import Key, Patch, View, folded, patched, split_name

Tables = Mapping[str, TableSpec]

_KEYS = "json_each(?1) k CROSS JOIN {0} ON {1}.tbl = k.value ->> 0 AND {1}.id = k.value ->> 1"
GONE = "gone"  # what a merge met where the row had been deleted
IS_TOUCHED = "EXISTS (SELECT 1 FROM touches t WHERE t.tbl = r.tbl AND t.id = r.id)"


# -- reading ------------------------------------------------------------------------------------


def views(
    connection: sqlite3.Connection, tables: Tables, keys: Iterable[Key]
) -> dict[Key, View | None]:
    """Return what can be seen of these rows; None where nothing is known.

    Raises RecordDamaged when a record that bears on them fails its checksum.
    """
    asked = sorted(set(keys))
    found: dict[Key, View | None] = dict.fromkeys(asked)
    if not asked:
        return found
    encoded = orjson.dumps(asked).decode()
    found |= {key: view for key, view in _bases(connection, encoded)}
    for key, patches in _patches(connection, tables, encoded).items():
        if key not in found:  # one index led to it, another one tells of it
            raise RecordDamaged
        found[key] = folded(tables.get(key[0]), found[key], key, patches)
    return found


def view(connection: sqlite3.Connection, tables: Tables, key: Key) -> View | None:
    """Return what can be seen of a row, None when nothing is known of it."""
    return views(connection, tables, [key])[key]


def _bases(connection: sqlite3.Connection, encoded: str) -> list[tuple[Key, View]]:
    found = connection.execute(
        f"SELECT r.tbl, r.id, r.user_id, r.body, r.base, r.version, {row_intact('r.')}"
        f" FROM {_KEYS.format('rows r', 'r')}",
        (encoded,),
    ).fetchall()
    return [((row[0], row[1]), base_row(row[2:])) for row in found]


def base_row(found: tuple[Any, ...]) -> View:
    """Return a row of the server from its columns; raises RecordDamaged when they are damaged."""
    user_id, body, base, version, is_intact = found
    if not is_intact:
        raise RecordDamaged
    return View(user_id, None if body is None else orjson.loads(body), base, version)


def _patches(
    connection: sqlite3.Connection, tables: Tables, encoded: str
) -> dict[Key, list[Patch]]:
    """Return by row what is pending on it; a transaction on many of them is decoded once."""
    bearing = connection.execute(
        f"SELECT t.tbl, t.id, t.position FROM {_KEYS.format('touches t', 't')}"
        f" WHERE t.stage <> {REPLAYED} ORDER BY t.position",
        (encoded,),
    ).fetchall()
    known = {patch.position: patch for patch in patches_at(connection, tables, bearing)}
    found: dict[Key, list[Patch]] = {}
    for table, row_id, position in bearing:
        if position in known:
            found.setdefault((table, row_id), []).append(known[position])
    return found


def patches_at(
    connection: sqlite3.Connection, tables: Tables, bearing: Iterable[tuple[Any, ...]]
) -> list[Patch]:
    """Return the transactions at the positions that stand last in each of `bearing`."""
    asked = sorted({item[-1] for item in bearing})
    if not asked:
        return []
    positions = orjson.dumps(asked).decode()
    found = connection.execute(
        f"SELECT l.position, l.user_id, l.accepted_at, l.ops, l.children, l.schemas, {intact('l.')}"
        " FROM json_each(?) k CROSS JOIN op_log l ON l.position = k.value",
        (positions,),
    )
    patches = []
    for position, user_id, accepted_at, ops, children, schemas, is_intact in found:
        if not is_intact:
            raise RecordDamaged
        decoded = decode_ops(ops, schemas, tables)
        patches.append(Patch(position, user_id, accepted_at, decoded, orjson.loads(children)))
    return patches


def get(
    connection: sqlite3.Connection, tables: Tables, spec: TableSpec, row_id: str, user_id: str
) -> Row | None:
    """Return one row as its author sees it, or None."""
    seen = view(connection, tables, (spec.name, row_id))
    if seen is None or seen.body is None or seen.user_id != user_id:
        return None
    return shown(spec, row_id, seen, bool(pending_among(connection, [(spec.name, row_id)])))


def pending_among(connection: sqlite3.Connection, keys: Iterable[Key]) -> set[Key]:
    """Return those of the rows that have changes which the server hasn't confirmed."""
    found = connection.execute(
        f"SELECT DISTINCT t.tbl, t.id FROM {_KEYS.format('touches t', 't')}"
        f" WHERE t.stage <> {SETTLED}",
        (orjson.dumps(sorted(set(keys))).decode(),),
    )
    return {(table, row_id) for table, row_id in found}


def shown(spec: TableSpec, row_id: str, seen: View, pending: bool) -> Row:
    """Return the row that a caller gets."""
    row: Row = dict.fromkeys(spec.columns)
    row.update(seen.body or {})
    row[spec.key], row[spec.owner] = row_id, seen.user_id
    row[spec.version] = seen.touched_at or seen.base
    row["_version"], row["_pending"] = seen.version, pending
    return row


def held(connection: sqlite3.Connection, tables: Tables, key: Key, user_id: str) -> bool:
    """Tell whether this author's row, or its deletion, is known here."""
    seen = view(connection, tables, key)
    return seen is not None and seen.user_id == user_id


def children(connection: sqlite3.Connection, tables: Tables, key: Key) -> list[Key]:
    """Return the rows that may hang on a row, as far as is known here, deleted ones too."""
    found: list[Key] = []
    for child in tables.values():
        if child.parent is not None and child.parent[1] == key[0]:
            found += [
                (child.name, row_id)
                for (row_id,) in connection.execute(
                    "SELECT id FROM rows WHERE parent_id = ?1 AND tbl = ?2"
                    " UNION SELECT id FROM touches WHERE parent_id = ?1 AND tbl = ?2",
                    (key[1], child.name),
                )
            ]
    return found


def descendants(connection: sqlite3.Connection, tables: Tables, key: Key) -> set[Key]:
    """Return all rows that hang on a row, at any depth."""
    found: set[Key] = set()
    level = [key]
    while level:
        below = {child for parent in level for child in children(connection, tables, parent)}
        level = list(below - found)  # a row that hangs on itself is met once
        found |= below
    return found


# -- the server's rows ----------------------------------------------------------------------------


def base_of(connection: sqlite3.Connection, key: Key) -> str | None:
    """Return the server's version of a row as it is known here."""
    return standing(connection, key)[0]


def standing(connection: sqlite3.Connection, key: Key) -> tuple[str | None, str | None]:
    """Return the server's version of a row as it is known here, and what a merge last met there."""
    found = connection.execute("SELECT base, met FROM rows WHERE tbl = ? AND id = ?", key)
    return found.fetchone() or (None, None)


def note_met(connection: sqlite3.Connection, key: Key, version: str | None) -> None:
    """Mark a row whose pending changes were put on another ground: they are not what was sent.

    A request or a segment that is older than this may still arrive. The mark goes with each change
    and stays with it in the server's ledger, so that an older one can't follow a merged one.
    """
    connection.execute("UPDATE rows SET met = ? WHERE tbl = ? AND id = ?", (version or GONE, *key))


def put(connection: sqlite3.Connection, tables: Tables, key: Key, seen: View, counter: int) -> None:
    """Write a row as the server has it."""
    spec = tables.get(key[0])
    parent_id = seen.parent_id(spec) if spec else None
    if seen.body is None:  # its children are still found by the row they hung on
        found = connection.execute(
            "SELECT parent_id FROM rows WHERE tbl = ? AND id = ?", key
        ).fetchone()
        parent_id = found[0] if found else None
    connection.execute(
        "INSERT INTO rows (tbl, id, user_id, parent_id, body, base, version, changed_at)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"
        " ON CONFLICT (tbl, id) DO UPDATE SET user_id = ?3, parent_id = ?4, body = ?5, base = ?6,"
        "  version = ?7, changed_at = ?8",
        (
            *key,
            seen.user_id,
            parent_id,
            None if seen.body is None else orjson.dumps(seen.body).decode(),
            seen.base,
            seen.version,
            counter,
        ),
    )


def base_view(connection: sqlite3.Connection, key: Key) -> View | None:
    """Return a row as the server is known to have it, without what is pending on it."""
    found = _bases(connection, orjson.dumps([key]).decode())
    return found[0][1] if found else None


def settle(
    connection: sqlite3.Connection,
    tables: Tables,
    position: int,
    counter: int,
) -> None:
    """Fold a confirmed transaction into the rows it changed.

    Where something older is still pending on a row, the fold waits for it: order decides.
    """
    connection.execute(
        f"DELETE FROM touches WHERE position = ? AND stage = {REPLAYED}", (position,)
    )
    keys = connection.execute(
        f"UPDATE touches SET stage = {SETTLED} WHERE position = ? RETURNING tbl, id", (position,)
    ).fetchall()
    for key in keys:
        fold(connection, tables, key, counter)


def drop(connection: sqlite3.Connection, tables: Tables, position: int, counter: int) -> None:
    """Take away what a transaction brought that came to nothing."""
    keys = connection.execute(
        "DELETE FROM touches WHERE position = ? RETURNING tbl, id", (position,)
    ).fetchall()
    for key in keys:
        fold(connection, tables, key, counter)


def note_versions(
    connection: sqlite3.Connection, versions: Mapping[str, str | None], counter: int
) -> None:
    """Remember the versions that a confirmed transaction left; None: the row is gone."""
    if not versions:
        return
    connection.executemany(
        "UPDATE rows SET base = ?1, changed_at = ?2, body = iif(?1 IS NULL, NULL, body)"
        " WHERE tbl = ?3 AND id = ?4",
        [(version, counter, *split_name(name)) for name, version in versions.items()],
    )


def doubt(connection: sqlite3.Connection, key: Key, counter: int) -> None:
    """Forget the version of a row: what is pending on it must meet the server's row."""
    connection.execute(
        "UPDATE rows SET base = NULL, changed_at = ? WHERE tbl = ? AND id = ?", (counter, *key)
    )


def fold(connection: sqlite3.Connection, tables: Tables, key: Key, counter: int) -> None:
    """Fold into a row what is confirmed and has nothing pending before it."""
    bearing = connection.execute(
        "SELECT position, stage FROM touches WHERE tbl = ? AND id = ? ORDER BY position", key
    ).fetchall()
    ready = []
    for position, stage in bearing:
        if stage == PENDING:
            break
        if stage == SETTLED:
            ready.append((position,))
    if not ready:
        return
    seen = base_view(connection, key)
    for patch in patches_at(connection, tables, ready):
        seen = patched(tables.get(key[0]), seen, key, patch)
    if seen is not None:
        base = None if seen.body is None else seen.base
        put(connection, tables, key, seen._replace(base=base), counter)
    connection.executemany(
        "DELETE FROM touches WHERE tbl = ? AND id = ? AND position = ?",
        [(*key, position) for (position,) in ready],
    )


def own_columns(spec: TableSpec, server_row: Row) -> Row:
    """Return a server's row without identity, owner and version."""
    apart = (spec.key, spec.owner, spec.version)
    return {column: value for column, value in server_row.items() if column not in apart}


def clean_rows(
    connection: sqlite3.Connection, tables: Tables, after: int, limit: int
) -> list[tuple[int, HeldRow]]:
    """Return rows without pending changes in storage order, for an audit of their content."""
    found = connection.execute(
        f"SELECT r.rowid, r.tbl, r.id, r.user_id, r.body, r.base, r.version, {row_intact('r.')}"
        f" FROM rows r WHERE r.rowid > ? AND NOT {IS_TOUCHED} ORDER BY r.rowid LIMIT ?",
        (after, limit),
    ).fetchall()
    return [
        (rowid, HeldRow(table, row_id, seen.user_id, seen.body or {}, seen.base, seen.body is None))
        for rowid, table, row_id, *columns in found
        if table in tables
        for seen in [base_row(tuple(columns))]
    ]
