"""What the code says of its tables against what the server has registered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from local_store.ops import TableSpec
from syncer.core.diagnosis import Check, Facts, failed, passed
from syncer.core.table_diagnosis import register_call


def judge_specs(specs: Sequence[TableSpec], tables: Sequence[Facts]) -> list[Check]:
    """Compare the code's table specs with what is registered; checks are named `spec.<name>.…`."""
    registered = {str(table["name"]): table for table in tables}
    checks: list[Check] = []
    for spec in specs:
        table = registered.pop(spec.name, None)
        found = [_unregistered(spec)] if table is None else list(_judge_spec(spec, table))
        checks += [replace(check, name=f"spec.{spec.name}.{check.name}") for check in found]
    if registered:
        checks.append(
            failed(
                "spec.others",
                "registered, but this code has no TableSpec for: " + ", ".join(registered),
                "nothing, if other code writes them; else add a TableSpec, or unregister them",
                "warning",
            )
        )
    return checks


def _unregistered(spec: TableSpec) -> Check:
    given = {
        "p_key": spec.key,
        "p_owner": spec.owner,
        "p_version": spec.version,
        "p_parent_column": spec.parent and spec.parent[0],
        "p_parent": spec.parent and f"public.{spec.parent[1]}",
    }
    return failed(
        "registered",
        f"{spec.name} isn't registered: everything written to it waits",
        register_call(f"public.{spec.name}", given),
    )


def _judge_spec(spec: TableSpec, table: Facts) -> Iterator[Check]:
    if not table["there"]:
        return  # its own check says so
    columns: Mapping[str, Facts] = table["columns"]
    problems = [
        *_roles(spec, table),
        *_columns(spec, table, columns),
        *_required(spec, table, columns),
    ]
    yield from problems
    if not problems:
        yield passed("columns", f"{len(spec.columns)} columns agree with the server")


def _roles(spec: TableSpec, table: Facts) -> Iterator[Check]:
    """Key, owner, version and parent: both sides must mean the same columns."""
    parent = (table["parent_column"], table["parent_name"]) if table["parent_name"] else None
    pairs = [
        ("key", spec.key, table["key_column"]),
        ("owner", spec.owner, table["owner_column"]),
        ("version", spec.version, table["version_column"]),
        ("parent", spec.parent, parent),
    ]
    for role, mine, theirs in pairs:
        if mine != theirs:
            yield failed(
                role,
                f"{role} is {mine} in the TableSpec and {theirs} in the registration",
                f"change the TableSpec, or register {spec.name} again",
            )


def _columns(spec: TableSpec, table: Facts, columns: Mapping[str, Facts]) -> Iterator[Check]:
    missing = sorted(set(spec.columns) - set(columns))
    if missing:
        yield failed(
            "columns",
            f"not on the server: {', '.join(missing)}; writes that set them wait",
            "add the columns, or take them out of the TableSpec",
        )
    writable = [name for name in spec.columns if name in columns and spec.writable(name)]
    told = [
        f"{name} is {spec.columns[name].type} here and {columns[name]['type']} there"
        for name in writable
        if not _fits(spec.columns[name].type, columns[name])
    ]
    if told:
        yield failed("types", "; ".join(told), "make the TableSpec's types those of the server")
    owned = sorted(set(writable) & set(table["server_owned"]))
    if owned:
        yield failed(
            "server_owned",
            f"the server refuses writes to {', '.join(owned)}",
            "list them in the TableSpec's server_owned",
        )


def _required(spec: TableSpec, table: Facts, columns: Mapping[str, Facts]) -> Iterator[Check]:
    """Columns that an insert must fill, but that callers may leave out."""
    filled = {table["key_column"], table["owner_column"], table["version_column"]}
    optional = [
        name
        for name, column in columns.items()
        if name not in filled
        and not (column["nullable"] or column["default"] or column["generated"])
        and (name not in spec.columns or spec.columns[name].nullable)
    ]
    if optional:
        yield failed(
            "required",
            f"not null and without a default there: {', '.join(sorted(optional))}; inserts"
            " without them are refused",
            "give them a default, or declare them with nullable=False and always set them",
            "warning",
        )


_TYPES: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", "character varying", "character", "extensions.citext", "citext"}),
    "int": frozenset({"bigint", "integer", "smallint", "numeric"}),
    "float": frozenset({"double precision", "real", "numeric"}),
    "bool": frozenset({"boolean"}),
    "timestamp": frozenset({"timestamp with time zone"}),
    "uuid": frozenset({"uuid", "text", "character varying"}),
    "json": frozenset({"jsonb", "json"}),
    "text[]": frozenset({"text[]", "character varying[]"}),
}
"""Server types that take every value which passes the door for a column type, bar its length."""


def _fits(mine: str, column: Facts) -> bool:
    return column["type"] in _TYPES[mine] or (mine == "text" and bool(column["enum"]))
