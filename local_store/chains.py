"""What is pending on a row, rewritten as a whole when the server has another row there.

The caller decides what the rewritten transactions are; here they replace the old ones, and the
server's row becomes what they build on, in one SQLite transaction. Functions take the open
connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import orjson

from local_store import adopting, reopening
from local_store import rows as rows_
from local_store.decoding import RecordDamaged, decode_before, decode_ops, encode_schemas
from local_store.op_log import touch, touched_by, wake_dependants
from local_store.ops import (
    SETTLED,
    Chains,
    Rewritten,
    Row,
    StoredTransaction,
    TableSpec,
    user_uuid,
)
from local_store.schema import PENDING, REPLAYED, intact
from local_store.schema import SETTLED as SETTLED_STAGE
from local_store.views import Key, View, split_name

Tables = Mapping[str, TableSpec]


def load(
    connection: sqlite3.Connection, tables: Tables, keys: Iterable[Key], user_id: str, token: int
) -> Chains:
    """Return every unsettled transaction that touches one of the rows, in order."""
    positions: set[int] = set()
    for key in set(keys):
        positions |= _positions(connection, key)
    found = [_stored(connection, tables, position) for position in sorted(positions)]
    return Chains(token, tuple(item for item in found if item.user_id == user_id))


def rebase(
    connection: sqlite3.Connection,
    tables: Tables,
    chains: Chains,
    rewritten: Sequence[Rewritten],
    rows: Mapping[str, Row | None],
    counter: int,
) -> int | None:
    """Replace transactions and what they build on; returns the change of undelivered bytes.

    None, and nothing is changed, when something else was written to one of the rows, or one of the
    transactions settled or was parked, since `chains` were read.
    """
    keys = [split_name(name) for name in rows]
    if not _is_current(connection, chains, keys):
        return None
    known = {item.txn_id: item for item in chains.transactions}
    affected = set(keys) | {
        below for key in keys for below in rows_.descendants(connection, tables, key)
    }
    for item in rewritten:
        affected |= touched(connection, known[item.txn_id].position)
        affected |= {(op.table, op.id) for op in item.ops}
    before = rows_.views(connection, tables, affected)
    bytes_more = sum(
        _replace(connection, tables, known[item.txn_id].position, item) for item in rewritten
    )
    for name, row in rows.items():
        alone = _left_alone(chains, split_name(name))
        rebuild(connection, tables, split_name(name), row, counter, met=not alone)
        base = None if row is None else str(row[tables[split_name(name)[0]].version])
        for stored in chains.transactions:
            reopening.meet(connection, stored.position, name, base)
            adopting.forget(connection, stored.position, name)
    number(connection, tables, before, counter)
    return bytes_more


def _left_alone(chains: Chains, key: Key) -> bool:
    """Tell whether a merge left alone all that is pending on a row: it is behind parked work."""
    on_it = (t for t in chains.transactions if any((op.table, op.id) == key for op in t.ops))
    return any(t.parked for t in islice(on_it, 1))


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


def _replace(connection: sqlite3.Connection, tables: Tables, position: int, new: Rewritten) -> int:
    """Write one rewritten transaction; returns how many bytes more it has."""
    old_ops, old_schemas, size_bytes, children = connection.execute(
        "SELECT ops, schemas, size_bytes, children FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    old = decode_ops(old_ops, old_schemas, {})
    encoded = orjson.dumps([op.to_json() for op in new.ops])
    known = {
        (op.table, op.id): found
        for op, found in zip(old, orjson.loads(children), strict=True)
        if op.kind == "delete"
    }
    kept = [known.get((op.table, op.id)) if op.kind == "delete" else None for op in new.ops]
    connection.execute(
        "UPDATE op_log SET ops = ?, before = ?, children = ?, records = ?, size_bytes = ?,"
        " schemas = ?, due_at = 0 WHERE position = ?",
        (
            encoded.decode(),
            orjson.dumps(new.before).decode(),
            orjson.dumps(kept).decode(),
            orjson.dumps(new.records).decode(),
            len(encoded),
            encode_schemas(new.ops, tables),
            position,
        ),
    )
    before, after = touched(connection, position), touched_by(tables, new.ops, kept)
    if before - set(after):
        wake_dependants(connection, position)  # they don't wait for this one any more
    connection.execute("DELETE FROM touches WHERE position = ?", (position,))
    touch(connection, position, after)
    return len(encoded) - int(size_bytes)


def rebuild(
    connection: sqlite3.Connection,
    tables: Tables,
    key: Key,
    server_row: Row | None,
    counter: int,
    *,
    met: bool = True,
) -> None:
    """Let what is pending on a row build on the server's row; None: it is gone there.

    The caller numbers the rows afterwards. Without `met` the changes weren't merged with the row.
    """
    spec = tables[key[0]]
    known = rows_.base_view(connection, key)
    seen = rows_.view(connection, tables, key)
    if seen is None and server_row is None:
        return
    if server_row is None:
        owner = seen.user_id if seen else ""
        made = View(owner, None, None, known.version if known else 0)
    else:
        made = View(
            user_uuid(str(server_row[spec.owner])) if seen is None else seen.user_id,
            rows_.own_columns(spec, server_row),
            str(server_row[spec.version]),
            known.version if known else 0,
        )
    rows_.put(connection, tables, key, made, counter)
    if met:
        rows_.note_met(connection, key, made.base)
    # The server's row has what it confirmed; what it confirmed before a restore it may not have.
    connection.execute(
        f"DELETE FROM touches WHERE tbl = ? AND id = ? AND stage = {SETTLED_STAGE}", key
    )
    connection.execute(
        f"UPDATE touches SET stage = {PENDING} WHERE tbl = ? AND id = ? AND stage = {REPLAYED}", key
    )
    left = rows_.view(connection, tables, key)
    if server_row is None and (left is None or left.body is None):
        for child in rows_.descendants(connection, tables, key):
            _forget_if_clean(connection, tables, child, counter)


def _forget_if_clean(
    connection: sqlite3.Connection, tables: Tables, key: Key, counter: int
) -> None:
    """A child of a row that is gone is gone, unless something is still pending on it."""
    seen = rows_.base_view(connection, key)
    if seen is not None and seen.body is not None and not _positions(connection, key):
        rows_.put(connection, tables, key, seen._replace(body=None, base=None), counter)


def number(
    connection: sqlite3.Connection,
    tables: Tables,
    before: Mapping[Key, View | None],
    counter: int,
) -> None:
    """Give rows that a merge changed a version that they never had.

    A version counts the changes of a row, and a merge may take some away: a caller who read the row
    before must not find its number again with other content.
    """
    after = rows_.views(connection, tables, before)
    for key, old in before.items():
        new = after[key]
        if old is None or new is None:
            continue
        least = old.version + (old.body != new.body)
        if new.version != least:
            base = rows_.base_view(connection, key) or View(new.user_id, None, None, 0)
            shifted = base._replace(version=base.version + least - new.version)
            rows_.put(connection, tables, key, shifted, counter)


def learn(
    connection: sqlite3.Connection, tables: Tables, spec: TableSpec, row_id: str, columns: Row
) -> None:
    """Fill columns that a row lacks, and the `before` of changes that are pending on them."""
    key = (spec.name, row_id)
    unknown = rows_.own_columns(spec, columns)
    for position in sorted(_positions(connection, key)):
        unknown = _learn_before(connection, tables, position, key, unknown)
    known = rows_.base_view(connection, key)
    if known is None or known.body is None:
        return
    missing = {name: value for name, value in unknown.items() if name not in known.body}
    if missing:
        connection.execute(
            "UPDATE rows SET body = ? WHERE tbl = ? AND id = ?",
            (orjson.dumps({**missing, **known.body}).decode(), *key),
        )


def give_back(connection: sqlite3.Connection, tables: Tables, position: int) -> None:
    """Keep what only a change tells of that has come to nothing.

    What came behind it and replaced its values replaces what those had replaced. A merge makes one
    record for all that is pending on a row, with the first change, and nobody sees the records of
    one that is never applied: its author's next change up to where a record reaches carries it on.
    Where a person was to decide, the others meet the server's row by themselves.
    """
    records, user_id, encoded, before, schemas = connection.execute(
        "SELECT records, user_id, ops, before, schemas FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    undone: dict[Key, Row] = {}
    ops = decode_ops(encoded, schemas, tables)
    for op, image in zip(ops, orjson.loads(before), strict=True):
        by_key = tables[op.table].json_merge if op.table in tables else ()
        names = () if op.kind != "update" else op.values.keys() & (image or {}).keys() - {*by_key}
        had = {name: image[name] for name in names}
        undone[op.table, op.id] = {**had, **undone.get((op.table, op.id), {})}
    for record in orjson.loads(records):
        key = record["table"], record["id"]
        if record["outcome"] == "manual":
            undone[key] = {**undone.get(key, {}), **(record["base"] or {})}
        else:
            _carry_on(connection, position, user_id, record)
    for key, replaced in undone.items():
        for later in sorted(found for found in _positions(connection, key) if found > position):
            _replaced_again(connection, later, key, replaced)


def _carry_on(connection: sqlite3.Connection, position: int, user_id: str, record: Row) -> None:
    found = connection.execute(
        "SELECT l.position, l.records FROM names n CROSS JOIN op_log l WHERE n.txn_id = ?"
        " AND l.position > ? AND l.position <= n.position AND l.user_id = ?"
        " AND l.state IN ('pending', 'held') AND l.parked = 0 ORDER BY l.position LIMIT 1",
        (record.get("through"), position, user_id),
    ).fetchone()
    if found is None:
        return
    kept: list[Row] = []
    for own in orjson.loads(found[1]):
        if any(own[name] != record[name] for name in ("table", "id", "outcome")):
            kept.append(own)
        else:  # the server keeps one record of a row and an outcome
            record = _joined(record, own)
    connection.execute(
        "UPDATE op_log SET records = ? WHERE position = ?",
        (orjson.dumps([*kept, record]).decode(), found[0]),
    )


def _joined(older: Row, newer: Row) -> Row:
    """Return one record for two of the same row and outcome: mine and theirs as they are last."""
    sides = {side: {**(older[side] or {}), **(newer[side] or {})} for side in ("mine", "theirs")}
    return {
        **newer,
        "columns": sorted({*older["columns"], *newer["columns"]}),
        "base": {**(newer["base"] or {}), **(older["base"] or {})},
        "mine": sides["mine"],
        "theirs": sides["theirs"] or None,
    }


def _replaced_again(connection: sqlite3.Connection, position: int, key: Key, replaced: Row) -> None:
    encoded, before_, schemas = connection.execute(
        "SELECT ops, before, schemas FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    ops, before = decode_ops(encoded, schemas, {}), orjson.loads(before_)
    for op, image in zip(ops, before, strict=True):
        if (op.table, op.id) == key and image is not None:
            names = image if op.kind == "delete" else op.values
            image.update({name: replaced.pop(name) for name in names if name in replaced})
    connection.execute(
        "UPDATE op_log SET before = ? WHERE position = ?", (orjson.dumps(before).decode(), position)
    )


def _learn_before(
    connection: sqlite3.Connection, tables: Tables, position: int, key: Key, unknown: Row
) -> Row:
    """Fill in what a transaction replaced without knowing it; returns what is still unknown."""
    encoded, before_, schemas = connection.execute(
        "SELECT ops, before, schemas FROM op_log WHERE position = ?", (position,)
    ).fetchone()
    ops, before = decode_ops(encoded, schemas, {}), orjson.loads(before_)
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


def _positions(connection: sqlite3.Connection, key: Key) -> set[int]:
    found = connection.execute(
        f"SELECT position FROM touches WHERE tbl = ? AND id = ? AND stage <> {SETTLED_STAGE}", key
    )
    return {position for (position,) in found}


def touched(connection: sqlite3.Connection, position: int) -> set[Key]:
    """Return the rows that a transaction bears on."""
    found = connection.execute("SELECT tbl, id FROM touches WHERE position = ?", (position,))
    return {(table, row_id) for table, row_id in found}


def _stored(connection: sqlite3.Connection, tables: Tables, position: int) -> StoredTransaction:
    found: tuple[Any, ...] = connection.execute(
        "SELECT txn_id, user_id, ops, before, records, parked, schemas,"
        f" {intact()} FROM op_log WHERE position = ?",
        (position,),
    ).fetchone()
    txn_id, user_id, encoded, before, records, parked, schemas, is_intact = found
    if not is_intact:
        raise RecordDamaged
    ops = decode_ops(encoded, schemas, tables)
    return StoredTransaction(
        txn_id,
        position,
        user_id,
        ops,
        decode_before(before, ops, schemas, tables),
        tuple(orjson.loads(records)),
        bool(parked),
    )
