"""Stored transactions, read back: up-cast to the tables as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from local_store.ops import Row, TableSpec, WireOp


class RecordDamaged(Exception):
    """A stored record fails its checksum. Inside this package: the store puts it in quarantine."""


def encode_schemas(ops: Sequence[WireOp], tables: Mapping[str, TableSpec]) -> str:
    """Return the schema versions that ops are written in, those above 1 only."""
    if all(op.table not in tables or tables[op.table].schema_version == 1 for op in ops):
        return "{}"
    versions = {op.table: tables[op.table].schema_version for op in ops if op.table in tables}
    return orjson.dumps({name: n for name, n in sorted(versions.items()) if n != 1}).decode()


def decode_ops(
    encoded: bytes | str, schemas: bytes | str, tables: Mapping[str, TableSpec]
) -> tuple[WireOp, ...]:
    """Return stored ops, with values as the tables' newest versions have them."""
    known = orjson.loads(schemas)
    return tuple(
        WireOp(
            op["table"],
            op["kind"],
            op["id"],
            _newest(tables.get(op["table"]), known, op["values"]),
        )
        for op in orjson.loads(encoded)
    )


def decode_before(
    encoded: bytes | str,
    ops: Sequence[WireOp],
    schemas: bytes | str,
    tables: Mapping[str, TableSpec],
) -> tuple[Row | None, ...]:
    """Return the values that stored ops replaced, in the same versions as the ops."""
    known = orjson.loads(schemas)
    return tuple(
        None if row is None else _newest(tables.get(op.table), known, row)
        for op, row in zip(ops, orjson.loads(encoded), strict=True)
    )


def _newest(spec: TableSpec | None, known: Mapping[str, int], values: Row) -> Row:
    if spec is None:
        return values
    for version in range(known.get(spec.name, 1), spec.schema_version):
        values = dict(spec.upcasts[version](values))
    return values
