"""What is pending on a row, rewritten as a whole when the server has another row there.

The caller decides what the rewritten transactions are; here they replace the old ones together with
the local rows they make, in one SQLite transaction. Functions take the open connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from local_store import reopening
from local_store.door import decode_ops
from local_store.op_log import touch, wake_dependants
from local_store.ops import SETTLED, Chains, Rewritten, Row, StoredTransaction, TableSpec, WireOp

Key = tuple[str, str]


def load(connection: sqlite3.Connection, keys: Iterable[Key], user_id: str, token: int) -> Chains:
    """Return every unsettled transaction that touches one of the rows, in order."""
    positions: set[int] = set()
    for key in set(keys):
        positions |= _positions(connection, key)
    found = [_stored(connection, position) for position in sorted(positions)]
    return Chains(token, tuple(item for item in found if item.user_id == user_id))


def rebase(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    chains: Chains,
    rewritten: Sequence[Rewritten],
    rows: Mapping[str, Row | None],
    counter: int,
) -> int | None:
    """Replace transactions and rebuild rows; returns the change of undelivered bytes.

    None, and nothing is changed, when something else was written to one of the rows, or one of the
    transactions settled or was parked, since `chains` were read.
    """
    keys = [_key(name) for name in rows]
    if not _is_current(connection, chains, keys):
        return None
    known = {item.txn_id: item for item in chains.transactions}
    bytes_more, freed = 0, set[Key]()
    for item in rewritten:
        more, untouched = _replace(connection, tables, known[item.txn_id], item)
        bytes_more += more
        freed |= untouched
    for key in freed - set(keys):
        _restore(connection, key, counter)
    for key in _remade(known, rewritten) - set(keys):
        rebuild(connection, tables, key, None, counter)
    for name, row in rows.items():
        rebuild(connection, tables, _key(name), row, counter)
        base = None if row is None else str(row[tables[_key(name)[0]].version])
        for stored in chains.transactions:
            reopening.meet(connection, stored.position, name, base)
    return bytes_more


def _is_current(connection: sqlite3.Connection, chains: Chains, keys: Sequence[Key]) -> bool:
    known = {item.position for item in chains.transactions}
    if any(_positions(connection, key) - known for key in keys):
        return False
    for item in chains.transactions:
        found = connection.execute(
            "SELECT state, parked FROM op_log WHERE position = ?", (item.position,)
        ).fetchone()
        if found is None or found[0] in SETTLED or bool(found[1]) != item.parked:
            return False
    return True


def _replace(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    old: StoredTransaction,
    new: Rewritten,
) -> tuple[int, set[Key]]:
    """Write one rewritten transaction; returns (bytes more, rows it no longer touches)."""
    size_bytes, children = connection.execute(
        "SELECT size_bytes, children FROM op_log WHERE position = ?", (old.position,)
    ).fetchone()
    encoded = orjson.dumps([op.to_json() for op in new.ops])
    known = {
        (op.table, op.id): found
        for op, found in zip(old.ops, orjson.loads(children), strict=True)
        if op.kind == "delete"
    }
    kept = [known.get((op.table, op.id)) if op.kind == "delete" else None for op in new.ops]
    connection.execute(
        "UPDATE op_log SET ops = ?, before = ?, children = ?, records = ?, size_bytes = ?,"
        " due_at = 0 WHERE position = ?",
        (
            encoded.decode(),
            orjson.dumps(new.before).decode(),
            orjson.dumps(kept).decode(),
            orjson.dumps(new.records).decode(),
            len(encoded),
            old.position,
        ),
    )
    before = {
        (table, id_)
        for table, id_ in connection.execute(
            "SELECT tbl, id FROM touches WHERE position = ?", (old.position,)
        )
    }
    after = {(op.table, op.id) for op in new.ops}
    for op in new.ops:
        if op.kind == "delete":
            after |= before & descendants(connection, tables, (op.table, op.id))
    if before - after:
        wake_dependants(connection, old.position)  # they don't wait for this one any more
    connection.execute("DELETE FROM touches WHERE position = ?", (old.position,))
    touch(connection, old.position, after)
    return len(encoded) - size_bytes, before - after


def _remade(known: Mapping[str, StoredTransaction], rewritten: Sequence[Rewritten]) -> set[Key]:
    """Return the rows whose pending insert was rewritten: what they are is all here."""
    found: set[Key] = set()
    for item in rewritten:
        old = {(op.table, op.id): op for op in known[item.txn_id].ops if op.kind == "insert"}
        found |= {
            (op.table, op.id)
            for op in item.ops
            if op.kind == "insert" and old.get((op.table, op.id)) != op
        }
    return found


def _restore(connection: sqlite3.Connection, key: Key, counter: int) -> bool:
    """Bring back a child that only a vanished delete had marked as deleted.

    One that its author deleted has no version left.
    """
    if any(_ends(connection, position, key) for position in _positions(connection, key)):
        return False
    restored = connection.execute(
        "UPDATE rows SET deleted = 0, version = version + 1, changed_at = ?1"
        " WHERE tbl = ?2 AND id = ?3 AND deleted AND (base IS NOT NULL"
        " OR EXISTS (SELECT 1 FROM touches t WHERE t.tbl = ?2 AND t.id = ?3))",
        (counter, *key),
    )
    return restored.rowcount == 1


def _revive(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], key: Key, counter: int
) -> None:
    """Bring back what hung on a row whose delete came to nothing, and wasn't deleted by itself."""
    for child in _children(connection, tables, key):
        if _restore(connection, child, counter):
            _revive(connection, tables, child, counter)


def _ends(connection: sqlite3.Connection, position: int, key: Key) -> bool:
    """Tell whether a transaction deletes the row, or marks it without an op: by a cascade."""
    ops = [op for op in _ops(connection, position) if (op.table, op.id) == key]
    return not ops or ops[-1].kind == "delete"


def learn(connection: sqlite3.Connection, spec: TableSpec, row_id: str, columns: Row) -> None:
    """Fill columns that a local row lacks, and the `before` of changes that are pending on them."""
    key = (spec.name, row_id)
    found = connection.execute("SELECT body FROM rows WHERE tbl = ? AND id = ?", key).fetchone()
    if found is None:
        return
    own = (spec.key, spec.owner, spec.version)
    body = orjson.loads(found[0])
    unknown = {name: value for name, value in columns.items() if name not in own}
    for position in sorted(_positions(connection, key)):
        unknown = _learn_before(connection, position, key, unknown)
    missing = {name: value for name, value in unknown.items() if name not in body}
    if missing:
        connection.execute(
            "UPDATE rows SET body = ? WHERE tbl = ? AND id = ?",
            (orjson.dumps({**missing, **body}).decode(), *key),
        )


def _learn_before(connection: sqlite3.Connection, position: int, key: Key, unknown: Row) -> Row:
    """Fill in what a transaction replaced without knowing it; returns what is still unknown."""
    ops = _ops(connection, position)
    before = orjson.loads(
        connection.execute("SELECT before FROM op_log WHERE position = ?", (position,)).fetchone()[
            0
        ]
    )
    left, changed = dict(unknown), False
    for op, image in zip(ops, before, strict=True):
        if (op.table, op.id) != key or image is None:
            continue
        for name in set(op.values) if op.kind == "update" else set(left):
            if name in left and name not in image:
                image[name], changed = left[name], True
        left = {name: value for name, value in left.items() if name not in op.values}
    if changed:
        connection.execute(
            "UPDATE op_log SET before = ? WHERE position = ?",
            (orjson.dumps(before).decode(), position),
        )
    return left


def rebuild(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    key: Key,
    server_row: Row | None,
    counter: int,
) -> None:
    """Make a local row anew: the server's columns, then what is still pending on it, in order."""
    spec = tables[key[0]]
    found = connection.execute(
        "SELECT user_id, body, deleted, touched_at FROM rows WHERE tbl = ? AND id = ?", key
    ).fetchone()
    if found is None and server_row is None:
        return
    base = None if server_row is None else str(server_row[spec.version])
    body, deleted, touched_at = _body(connection, spec, key, server_row)
    if deleted and body is None:
        body = orjson.loads(found[1]) if found is not None else {}
    owner = found[0] if found is not None else str((server_row or {})[spec.owner])
    encoded = orjson.dumps(body).decode()
    same = found is not None and (found[1], bool(found[2])) == (encoded, deleted)
    parent_id = (body or {}).get(spec.parent[0]) if spec.parent else None
    shown_at = touched_at or (found[3] if found is not None else base)
    connection.execute(
        "INSERT INTO rows"
        " (tbl, id, user_id, parent_id, body, base, touched_at, changed_at, deleted, version)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 1)"
        " ON CONFLICT (tbl, id) DO UPDATE SET parent_id = ?4, body = ?5, base = ?6,"
        " touched_at = ?7, changed_at = ?8, deleted = ?9, version = version + ?10",
        (*key, owner, parent_id, encoded, base, shown_at or "", counter, deleted, not same),
    )
    if deleted and server_row is None:
        for child in descendants(connection, tables, key):
            _forget_if_clean(connection, child, counter)
    if found is not None and found[2] and not deleted:
        _revive(connection, tables, key, counter)


def _body(
    connection: sqlite3.Connection, spec: TableSpec, key: Key, server_row: Row | None
) -> tuple[Row | None, bool, str | None]:
    """Return (columns, is it deleted, when the last pending change was accepted)."""
    own = (spec.key, spec.owner, spec.version)
    body: Row | None = None
    if server_row is not None:
        body = {column: value for column, value in server_row.items() if column not in own}
    deleted, touched_at = body is None, None
    for position in sorted(_positions(connection, key)):
        ops = [op for op in _ops(connection, position) if (op.table, op.id) == key]
        accepted_at = connection.execute(
            "SELECT accepted_at FROM op_log WHERE position = ?", (position,)
        ).fetchone()[0]
        if not ops and _cascades(connection, position):
            deleted = True
        for op in ops:
            if op.kind == "insert":
                body = dict(op.values)
                if "created_at" in spec.server_owned:
                    body["created_at"] = accepted_at
            elif op.kind == "update" and body is not None:
                body = {**body, **op.values}
            deleted = op.kind == "delete" or body is None
        touched_at = accepted_at
    return body, deleted, touched_at


def _cascades(connection: sqlite3.Connection, position: int) -> bool:
    return any(op.kind == "delete" for op in _ops(connection, position))


def _forget_if_clean(connection: sqlite3.Connection, key: Key, counter: int) -> None:
    """A child of a row that is gone is gone, unless something is still pending on it."""
    if not _positions(connection, key):
        connection.execute(
            "UPDATE rows SET deleted = 1, base = NULL, changed_at = ?, version = version + 1"
            " WHERE tbl = ? AND id = ? AND NOT deleted",
            (counter, *key),
        )


def descendants(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], key: Key
) -> set[Key]:
    """Return all local rows that hang on a row, deleted ones too."""
    found: set[Key] = set()
    level = [key]
    while level:
        below = {child for parent in level for child in _children(connection, tables, parent)}
        level = list(below - found)  # a row that hangs on itself is met once
        found |= below
    return found


def _children(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], key: Key
) -> list[Key]:
    return [
        (child.name, row_id)
        for child in tables.values()
        if child.parent is not None and child.parent[1] == key[0]
        for (row_id,) in connection.execute(
            "SELECT id FROM rows WHERE parent_id = ? AND tbl = ?", (key[1], child.name)
        ).fetchall()
    ]


def _key(name: str) -> Key:
    table, _, row_id = name.partition("/")
    return table, row_id


def _positions(connection: sqlite3.Connection, key: Key) -> set[int]:
    found = connection.execute("SELECT position FROM touches WHERE tbl = ? AND id = ?", key)
    return {position for (position,) in found}


def _ops(connection: sqlite3.Connection, position: int) -> tuple[WireOp, ...]:
    found = connection.execute("SELECT ops FROM op_log WHERE position = ?", (position,)).fetchone()
    return decode_ops(found[0])


def _stored(connection: sqlite3.Connection, position: int) -> StoredTransaction:
    found: tuple[Any, ...] = connection.execute(
        "SELECT txn_id, user_id, ops, before, records, parked FROM op_log WHERE position = ?",
        (position,),
    ).fetchone()
    txn_id, user_id, ops, before, records, parked = found
    return StoredTransaction(
        txn_id,
        position,
        user_id,
        decode_ops(ops),
        tuple(orjson.loads(before)),
        tuple(orjson.loads(records)),
        bool(parked),
    )
