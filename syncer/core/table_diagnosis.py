"""What the facts of a registered table mean for delivery.

A table that was sound when it was registered can be spoilt later by any migration of its owner: a
dropped policy, a disabled trigger, a renamed column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from syncer.core.diagnosis import Check, Facts, failed, passed

VERBS = ("select", "insert", "update", "delete")


def judge_table(table: Facts) -> list[Check]:
    """Judge one registered table; its checks are named `table.<name>.…`."""
    target = f"{table['schema_name']}.{table['name']}"
    label = f"table.{table['name']}"
    if not table["there"]:
        remedy = (
            "run `syncer migrate`"
            if table["built_in"]
            else f"make it again, or: delete from sync.tables where name = '{table['name']}'"
        )
        return [failed(f"{label}.exists", f"{target} is registered and doesn't exist", remedy)]
    checks = [passed(f"{label}.exists", f"{target} exists")]
    for judge in _JUDGES:
        for check in judge(table, target):
            checks.append(replace(check, name=f"{label}.{check.name}"))
    return checks


def again(table: Facts, migration: str) -> str:
    """Return what puts a table's triggers and grants back."""
    if table["built_in"]:
        return f"apply migrations/{migration} once more with psql; it is re-runnable"
    given = {
        "p_key": table["key_column"],
        "p_owner": table["owner_column"],
        "p_version": table["version_column"],
        "p_parent_column": table["parent_column"],
        "p_parent": table["parent_name"] and f"{table['schema_name']}.{table['parent_name']}",
    }
    return register_call(f"{table['schema_name']}.{table['name']}", given)


def register_call(target: str, given: Mapping[str, str | None]) -> str:
    """Return the SQL statement that registers a table."""
    arguments = "".join(f", {name} => '{value}'" for name, value in given.items() if value)
    return f"select public.sync_register_table('{target}'{arguments})"


def _identity(table: Facts, target: str) -> Iterator[Check]:
    named = [table["key_column"], table["owner_column"], table["version_column"]]
    named += [table["parent_column"]] if table["parent_column"] else []
    missing = [column for column in named if column not in table["columns"]]
    if missing:
        yield failed(
            "identity",
            f"{target} lost {', '.join(missing)}, which its registration names",
            "put the column back, or register the table again with its new name",
        )
    elif not table["key_unique"]:
        yield failed(
            "identity",
            f"{table['key_column']} alone is no longer unique and not null",
            f"alter table {target} add primary key ({table['key_column']})",
        )
    else:
        yield passed("identity", f"rows are named by {table['key_column']}")


def _row_security(table: Facts, target: str) -> Iterator[Check]:
    if table["row_security"]:
        yield passed("row_security", "row-level security is on")
    else:
        yield failed(
            "row_security",
            f"row-level security is off: every user reads and writes every row of {target}",
            f"alter table {target} enable row level security",
        )


def _policies(table: Facts, target: str) -> Iterator[Check]:
    missing, slow = table["verbs_without_policy"], table["slow_policies"]
    mine = f"{table['owner_column']} = (select auth.uid())"
    if missing:
        yield failed(
            "policies",
            f"no policy lets authenticated {', '.join(missing)}: such writes are refused",
            f"create policy … on {target} for … to authenticated using ({mine})"
            f" with check ({mine})",
        )
    if slow:
        yield failed(
            "policies",
            "auth.uid() is evaluated once per row in: " + ", ".join(slow),
            f"write the policies as: {mine}",
            "warning",
        )
    if not (missing or slow):
        yield passed("policies", "each verb has a policy for authenticated")


def _grants(table: Facts, target: str) -> Iterator[Check]:
    lacking = {
        role: [verb for verb in VERBS if verb not in table["granted"][role]]
        for role in ("authenticated", "service_role")
    }
    if any(lacking.values()):
        told = "; ".join(f"{role} lacks {', '.join(v)}" for role, v in lacking.items() if v)
        yield failed(
            "grants",
            told,
            f"grant {', '.join(VERBS)} on {target} to authenticated, service_role",
        )
    else:
        yield passed("grants", "the API's roles have what delivery needs")


def _anon(table: Facts, target: str) -> Iterator[Check]:
    verbs = table["granted"]["anon"]
    if not verbs:
        yield passed("anon", "anon is granted nothing")
        return
    yield failed(
        "anon",
        f"anon may {', '.join(verbs)}; only the policies stand between",
        f"revoke all on {target} from public, anon",
        "warning" if verbs == ["select"] else "error",
    )


def _triggers(table: Facts, target: str) -> Iterator[Check]:
    if table["version_moves"]:
        yield passed("version", f"a trigger moves {table['version_column']} with each change")
    else:
        yield failed(
            "version",
            f"no enabled trigger moves {table['version_column']}: conflicts go unnoticed",
            again(table, "006_create_triggers.sql"),
        )
    if table["deletes_remembered"]:
        yield passed("tombstones", "a trigger remembers deleted rows")
    else:
        yield failed(
            "tombstones",
            "no enabled trigger remembers deleted rows: later updates of them wait in vain",
            again(table, "008_create_sync_ledger.sql"),
        )


def _parent(table: Facts, target: str) -> Iterator[Check]:
    if not table["parent_name"]:
        return
    link, column = table["parent_link"], table["parent_column"]
    if link is None:
        yield failed(
            "parent",
            f"{column} has no foreign key to {table['parent_name']}: orphans are accepted",
            f"alter table {target} add foreign key ({column}) references … on delete cascade",
        )
    elif not link["cascades"]:
        yield failed(
            "parent",
            f"the foreign key on {column} doesn't cascade: deletes of parents wait",
            f"make the foreign key of {target} ({column}) again, with on delete cascade",
            "warning",
        )
    elif not link["binds_owner"]:
        yield failed(
            "parent",
            f"the foreign key on {column} lets a row hang on somebody else's parent",
            f"reference key and owner of {table['parent_name']} together",
            "warning",
        )
    else:
        yield passed("parent", f"{column} follows {table['parent_name']}")


def _indexes(table: Facts, target: str) -> Iterator[Check]:
    wanted = [table["owner_column"]] if not table["owner_indexed"] else []
    wanted += (
        [table["parent_column"]] if table["parent_name"] and not table["parent_indexed"] else []
    )
    if not wanted:
        yield passed("indexes", "owner and parent are indexed")
        return
    yield failed(
        "indexes",
        f"no index begins with {', '.join(wanted)}: policies and cascades read the whole table",
        "; ".join(f"create index on {target} ({column})" for column in wanted),
        "warning",
    )


_JUDGES = (_identity, _row_security, _policies, _grants, _anon, _triggers, _parent, _indexes)
