"""What a reader sees of a row: the server's row as it is known, and what is pending on it.

Nothing is merged while a write is accepted. A view is made when somebody looks: by a reader, by the
next write to the row, or by a merge. Values only; the same steps fold a row for good once the
server confirmed what was pending on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from local_store.ops import Row, TableSpec, WireOp

Key = tuple[str, str]
Children = Sequence[Mapping[str, str | None] | None]


def split_name(name: str) -> Key:
    """Return the table and the id of a `table/id`."""
    table, _, row_id = name.partition("/")
    return table, row_id


class View(NamedTuple):
    """A row as its author sees it; `body` is None where there is none, or none any more.

    `base` is the server's version it builds on. `version` grows with each change. `touched_at` is
    when the last pending change was accepted, None for a clean row.
    """

    user_id: str
    body: Row | None
    base: str | None
    version: int
    touched_at: str | None = None

    def parent_id(self, spec: TableSpec) -> str | None:
        """Return the id of the row this one hangs on."""
        return (self.body or {}).get(spec.parent[0]) if spec.parent else None


@dataclass(frozen=True, slots=True)
class Patch:
    """A transaction as it bears on rows: its ops, and the children that its deletes take along."""

    position: int
    user_id: str
    accepted_at: str
    ops: tuple[WireOp, ...]
    children: Children


def inserted(spec: TableSpec, view: View | None, op: WireOp, author: str, at: str) -> View:
    """Return the row that an insert makes."""
    body = dict(op.values)
    if "created_at" in spec.server_owned:
        body["created_at"] = at  # the moment of acceptance; the server stores the same
    if view is None:
        return View(author, body, None, 1, at)
    return View(author, body, view.base, view.version + 1, at)


def updated(view: View, op: WireOp, at: str) -> View:
    """Return the row with an update in it; one that isn't there stays so."""
    body = None if view.body is None else {**view.body, **op.values}
    return View(view.user_id, body, view.base, view.version + 1, at)


def deleted(view: View, at: str) -> View:
    """Return what is left of a row after its end."""
    return View(view.user_id, None, view.base, view.version + 1, at)


def patched(spec: TableSpec | None, view: View | None, key: Key, patch: Patch) -> View | None:
    """Return the row with one transaction in it."""
    name = f"{key[0]}/{key[1]}"
    for op, children in zip(patch.ops, patch.children, strict=True):
        if (op.table, op.id) == key:
            if op.kind == "insert" and spec is not None:
                view = inserted(spec, view, op, patch.user_id, patch.accepted_at)
            elif view is not None and op.kind == "update":
                view = updated(view, op, patch.accepted_at)
            elif view is not None and op.kind == "delete":
                view = deleted(view, patch.accepted_at)
        elif view is not None and children and name in children:
            view = deleted(view, patch.accepted_at)
    return view


def folded(
    spec: TableSpec | None, view: View | None, key: Key, patches: Iterable[Patch]
) -> View | None:
    """Return the row with all that is pending in it, oldest first."""
    for patch in patches:
        view = patched(spec, view, key, patch)
    return view
