"""From a changed session to row changes: compare with the base, merge with what came since.

Three states meet: the base (what this caller read), mine (what the caller made of it) and theirs
(what stands in the local copy now). A field that only one side changed is taken from that side;
one that both changed to different values is a clash. Children that either side appended all stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from local_store import Delete, Insert, Op, Row, Update
from syncer.sessions.aggregate import (
    CURRENT,
    LAST_REQUEST,
    PARTS,
    REQUEST,
    SESSION_VERBATIM,
    Child,
    Fields,
    Part,
    SessionRows,
    Snapshot,
    child_fields_of,
    own_fields,
    same,
    snapshot_of,
)
from syncer.sessions.models import PromptSession, moment_of
from syncer.sessions.tables import DRAFTS, RESOLUTIONS, SESSIONS

NewId = Callable[[str, int], str]
"""Gives the id of the n-th new row of a table."""
Mark = list[str] | None
"""[txn_id, fingerprint] of the request that makes the change."""

_JSON_OBJECTS = ("metadata",)  # merged by key, as the server's rows will be


@dataclass(slots=True)
class Change:
    """What an aggregate's change comes to: ops in order, clashes, and the next base."""

    ops: list[Op] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    snapshot: Snapshot | None = None


def creation(session: PromptSession, new_id: NewId, mark: Mark, now: str) -> Change:
    """Return the inserts of a new session, parent first."""
    ids = {part.table: _new_ids(part, session, 0, new_id) for part in PARTS}
    fields = own_fields(session, ids[DRAFTS], None)
    change = Change()
    row = {"id": session.session_id, **_session_columns(fields, fields, {REQUEST: mark}, now)}
    change.ops.append(Insert(SESSIONS, row))
    children = {}
    for part in PARTS:
        made = [
            Child(row_id, child_fields_of(part, child))
            for row_id, child in zip(ids[part.table], getattr(session, part.attribute), strict=True)
        ]
        children[part.table] = tuple(made)
        change.ops += [_insert(part, session.session_id, child, None, now) for child in made]
    change.snapshot = Snapshot(fields, children, _requests_with(None, mark))
    return change


def difference(
    session: PromptSession, current: SessionRows, new_id: NewId, mark: Mark, now: str
) -> Change:
    """Return what brings the current rows to the caller's session.

    Without a base, an object that the caller made, children are recognised by their identity,
    its own values win and nothing is removed: there is no evidence that anything was.
    """
    theirs = snapshot_of(current)
    base: Snapshot = session._base if session._base is not None else _taken_as_base(session, theirs)
    diff = _Diff(session, base, theirs, current, new_id, now)
    children = {part.table: diff.children(part, mark) for part in PARTS}
    fields = own_fields(session, [child.id for child in children[DRAFTS]], base.fields[CURRENT])
    diff.session_fields(fields, mark)
    requests = _requests_with(base, mark)
    diff.change.snapshot = Snapshot(fields, children, requests, base.stale)
    return diff.change


class _Diff:
    def __init__(
        self,
        session: PromptSession,
        base: Snapshot,
        theirs: Snapshot,
        current: SessionRows,
        new_id: NewId,
        now: str,
    ) -> None:
        self.change = Change()
        self._session = session
        self._base = base
        self._theirs = theirs
        self._current = current
        self._rows = {(table, row["id"]): row for table, row in current.all()}
        self._there = {
            (table, child.id): child.fields
            for table, children in theirs.children.items()
            for child in children
        }
        self._new_id = new_id
        self._now = now

    def session_fields(self, mine: Fields, mark: Mark) -> None:
        changed, clashes = merge(self._base.fields, mine, self._theirs.fields)
        self.change.clashes += clashes
        row, client = self._current.session, {}
        if mark and not any(isinstance(op, Insert) for op in self.change.ops):
            client[LAST_REQUEST] = mark  # no new row carries it
        if changed or client:
            columns = _session_columns(
                changed, {**self._theirs.fields, **changed}, client, self._now, row
            )
            op = Update(SESSIONS, row["id"], columns, expected_version=row.get("_version"))
            self.change.ops.insert(0, op)  # parent first

    def children(self, part: Part, mark: Mark) -> tuple[Child, ...]:
        mine = getattr(self._session, part.attribute)
        base = self._base.children[part.table]
        kept = base[: len(mine)]
        for child in base[len(mine) :]:
            self._remove(part, child)
        result = []
        for position, (was, model) in enumerate(zip(kept, mine, strict=False)):
            child = Child(was.id, child_fields_of(part, model))
            self._compare(part, position, was, child)
            result.append(child)
        ids = _new_ids(part, self._session, len(kept), self._new_id)
        for row_id, model in zip(ids, mine[len(kept) :], strict=True):
            child = Child(row_id, child_fields_of(part, model))
            unmarked = not any(isinstance(op, Insert) for op in self.change.ops)
            op_mark = mark if unmarked else None
            op = _insert(part, self._current.session["id"], child, op_mark, self._now)
            self.change.ops.append(op)
            result.append(child)
        return tuple(result)

    def _compare(self, part: Part, position: int, was: Child, child: Child) -> None:
        row = self._rows.get((part.table, was.id))
        there = self._there.get((part.table, was.id))
        if row is None or there is None:
            if not same(was.fields, child.fields):
                self.change.clashes.append(f"{part.attribute}[{position}]")
            return
        changed, clashes = merge(was.fields, child.fields, there)
        self.change.clashes += [f"{part.attribute}[{position}].{name}" for name in clashes]
        if changed:
            columns = _child_columns(part, changed, {**there, **changed}, row, self._now)
            self.change.ops.append(
                Update(part.table, was.id, columns, expected_version=row.get("_version"))
            )

    def _remove(self, part: Part, was: Child) -> None:
        row = self._rows.get((part.table, was.id))
        if row is None:
            return  # they removed it too
        if not same(was.fields, self._there[part.table, was.id]):
            self.change.clashes.append(part.attribute)
        self.change.ops.append(Delete(part.table, was.id, expected_version=row.get("_version")))


def merge(base: Fields, mine: Fields, theirs: Fields) -> tuple[Fields, list[str]]:
    """Return (fields to set, names that clash) of one row's three states."""
    changed: Fields = {}
    clashes: list[str] = []
    for name, value in mine.items():
        was, there = base.get(name), theirs.get(name)
        if same(value, was) or same(value, there):
            continue
        if same(was, there):
            changed[name] = value
        elif name == "updated_at":
            if _is_later(value, there):
                changed[name] = value
        elif name in _JSON_OBJECTS:
            merged, keys = _merge_keys(was, value, there)
            changed[name] = merged
            clashes += [f"{name}.{key}" for key in keys]
        else:
            clashes.append(name)
    return changed, clashes


def _merge_keys(base: Any, mine: Any, theirs: Any) -> tuple[Any, list[str]]:
    absent = object()
    merged, clashes = dict(theirs), []
    for key in {**base, **mine}:
        was, value, there = (side.get(key, absent) for side in (base, mine, theirs))
        if _same_or_absent(value, was, absent) or _same_or_absent(value, there, absent):
            continue
        if not _same_or_absent(was, there, absent):
            clashes.append(str(key))
        elif value is absent:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged, clashes


def _same_or_absent(one: Any, other: Any, absent: object) -> bool:
    if one is absent or other is absent:
        return one is other
    return same(one, other)


def _is_later(mine: Any, theirs: Any) -> bool:
    """Compare two client timestamps: a stale copy doesn't turn the clock back."""
    ours, other = moment_of(mine), moment_of(theirs)
    return ours is None or other is None or ours > other


def _taken_as_base(session: PromptSession, theirs: Snapshot) -> Snapshot:
    """Line up the current children with those of an object of unknown origin.

    Children that the object has come first and in its order, so that positions match; what it
    lacks is left out of the base and therefore stays.
    """
    children = {}
    for part in PARTS:
        free = list(theirs.children[part.table])
        matched = []
        for model in getattr(session, part.attribute):
            identity = [getattr(model, name) for name in part.identity]
            found = next(
                (c for c in free if [c.fields[name] for name in part.identity] == identity), None
            )
            if found is None:
                break  # what follows is new
            free.remove(found)
            matched.append(found)
        children[part.table] = tuple(matched)
    return Snapshot(theirs.fields, children, theirs.requests, theirs.stale)


def _new_ids(part: Part, session: PromptSession, known: int, new_id: NewId) -> list[str]:
    count = len(getattr(session, part.attribute)) - known
    return [new_id(part.table, n) for n in range(max(0, count))]


def _requests_with(base: Snapshot | None, mark: Mark) -> dict[str, str]:
    known = dict(base.requests) if base is not None else {}
    return {**known, mark[0]: mark[1]} if mark else known


def _insert(part: Part, session_id: str, child: Child, mark: Mark, now: str) -> Insert:
    columns = _child_columns(part, child.fields, child.fields, {}, now)
    if mark:
        columns["client"] = {**columns["client"], REQUEST: mark}
    return Insert(part.table, {"id": child.id, "session_id": session_id, **columns})


def _child_columns(part: Part, changed: Fields, whole: Fields, row: Row, now: str) -> Row:
    columns = {name: changed[name] for name in part.columns if name in changed}
    if part.verbatim in changed:
        columns["client"] = {**(row.get("client") or {}), part.verbatim: changed[part.verbatim]}
    if part.table == RESOLUTIONS and "applied" in changed:
        columns["applied_at"] = now if whole["applied"] else None
    return columns


def _session_columns(
    changed: Fields, whole: Fields, extra: dict[str, Any], now: str, row: Row | None = None
) -> Row:
    columns = {
        name: value
        for name, value in changed.items()
        if name not in SESSION_VERBATIM and name != CURRENT
    }
    before = (row or {}).get("client") or {}
    client = {**before, **{name: changed[name] for name in SESSION_VERBATIM if name in changed}}
    client.update({name: value for name, value in extra.items() if value is not None})
    if "status" in changed:
        columns["finalized_at"] = _finalized_at(whole, now)
    if CURRENT in changed:
        named = isinstance(changed[CURRENT], str)
        columns["current_draft_id"] = changed[CURRENT] if named else None
        client.pop(CURRENT, None)
        if changed[CURRENT] is not None and not named:
            client[CURRENT] = changed[CURRENT]
    if client != before or row is None:
        columns["client"] = client
    return columns


def _finalized_at(whole: Fields, now: str) -> str | None:
    """Return when the session was declared done, by the client's word if it names a moment."""
    if whole["status"] != "finalized":
        return None
    said = moment_of(whole["updated_at"])
    return now if said is None else said.isoformat(timespec="microseconds")
