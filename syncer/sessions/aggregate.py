"""Between rows and sessions: which column holds which field, and what a session looked like.

A `Snapshot` is a session taken apart: the fields of the session and of each child, with the
child's row id. Fields that no column can hold verbatim live in the row's `client` object:

    session       created_at, updated_at, user_id; current_draft when it is none of the drafts
    revision      timestamp          draft   created_at          resolution   timestamp

`client.request` names the request that made the row, `client.last_request` the last one that only
changed the session: [txn_id, fingerprint]. That is how a repeated request is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from local_store import Aggregate, Row, Unsettled
from syncer.sessions.models import (
    HoleResolution,
    IRDraft,
    PromptRevision,
    PromptSession,
    moment_of,
)
from syncer.sessions.tables import DRAFTS, RESOLUTIONS, REVISIONS, SESSIONS

Fields = dict[str, Any]
ChildModel = type[PromptRevision] | type[IRDraft] | type[HoleResolution]
_EARLIEST = datetime.min.replace(tzinfo=UTC)

REQUEST, LAST_REQUEST = "request", "last_request"
CURRENT = "current_draft"
"""A session's field in a snapshot: a draft's row id, or the content of a draft kept nowhere else,
or None."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of child: its table, the session's list, and where each field is stored.

    `columns` are columns of the same name, `verbatim` the client's timestamp; `identity` tells
    two children apart when nothing is known about what the caller read.
    """

    table: str
    attribute: str
    model: ChildModel
    columns: tuple[str, ...]
    verbatim: str
    identity: tuple[str, ...]


PARTS = (
    Part(
        REVISIONS,
        "revisions",
        PromptRevision,
        ("content", "revision_type", "target_hole", "metadata"),
        "timestamp",
        ("timestamp", "revision_type", "target_hole"),
    ),
    Part(
        DRAFTS,
        "ir_drafts",
        IRDraft,
        ("version", "ir", "validation_status", "smt_results", "ambiguities", "metadata"),
        "created_at",
        ("version", "created_at"),
    ),
    Part(
        RESOLUTIONS,
        "pending_resolutions",
        HoleResolution,
        ("hole_id", "resolution_text", "resolution_type", "applied", "metadata"),
        "timestamp",
        ("hole_id", "timestamp"),
    ),
)
SESSION_COLUMNS = ("status", "source", "metadata")
SESSION_VERBATIM = ("user_id", "created_at", "updated_at")
_EMPTY: dict[str, Any] = {"metadata": {}, "smt_results": [], "ambiguities": []}


@dataclass(frozen=True, slots=True)
class SessionRows:
    """One session's rows as a store gave them; only local rows carry a `_version`.

    `unsettled` is what of them the server hasn't confirmed, where a buffer gave them.
    """

    session: Row
    children: Mapping[str, Sequence[Row]]
    unsettled: Sequence[Unsettled] = ()

    def all(self) -> list[tuple[str, Row]]:
        """Return (table, row) of every row, the session's first."""
        found = [(SESSIONS, self.session)]
        return found + [(table, row) for table, rows in self.children.items() for row in rows]


@dataclass(frozen=True, slots=True)
class Child:
    """One child's row id and fields."""

    id: str
    fields: Fields


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a session looked like at one moment; `children` by table, in order.

    `requests` maps the txn_id of each keyed request to its fingerprint; `stale` tells that
    fresher rows may exist on the server. `at_hand` are the rows it was taken from, with the store
    that read them: the next change may start from them.
    """

    fields: Fields
    children: dict[str, tuple[Child, ...]]
    requests: dict[str, str] = field(default_factory=dict)
    stale: bool = False
    at_hand: tuple[object, SessionRows] | None = field(default=None, compare=False, repr=False)


def snapshot_of(rows: SessionRows, *, stale: bool = False) -> Snapshot:
    """Take the rows of one session apart into fields."""
    children = {
        part.table: tuple(
            Child(row["id"], _child_fields(part, row)) for row in _in_order(rows, part.table)
        )
        for part in PARTS
    }
    return Snapshot(
        fields=_session_fields(rows.session, {child.id for child in children[DRAFTS]}),
        children=children,
        requests=_requests(rows),
        stale=stale,
    )


def assemble(session_id: str, snapshot: Snapshot) -> PromptSession:
    """Build the session of a snapshot; it shares nothing with it but remembers it as its base.

    Nothing is validated again: the rows passed the door here or the constraints of the server, and
    a value that newer code added must not make a session unreadable.
    """
    fields = _copy(snapshot.fields)
    current = fields.pop(CURRENT)
    lists: dict[str, Any] = {
        part.attribute: [
            part.model.model_construct(**_copy(child.fields))
            for child in snapshot.children[part.table]
        ]
        for part in PARTS
    }
    session = PromptSession.model_construct(session_id=session_id, **fields, **lists)
    if isinstance(current, str):
        position = [child.id for child in snapshot.children[DRAFTS]].index(current)
        session.current_draft = session.ir_drafts[position]
    elif current is not None:
        session.current_draft = IRDraft.model_construct(**current)
    session._base = snapshot
    return session


def rows_of(aggregate: Aggregate) -> SessionRows | None:
    """Return the rows that a buffer gave; None when the session isn't there."""
    children = dict(aggregate.rows or {})
    found = children.pop(SESSIONS, [])
    return SessionRows(found[0], children, aggregate.unsettled) if found else None


def rows_by_session(
    sessions: Sequence[Row], children: Mapping[str, Sequence[Row]]
) -> list[SessionRows]:
    """Group child rows under their sessions, keeping the sessions' order."""
    grouped: dict[str, dict[str, list[Row]]] = {
        row["id"]: {part.table: [] for part in PARTS} for row in sessions
    }
    for table, rows in children.items():
        for row in rows:
            if row["session_id"] in grouped:
                grouped[row["session_id"]][table].append(row)
    return [SessionRows(row, grouped[row["id"]]) for row in sessions]


def own_fields(session: PromptSession, draft_ids: Sequence[str], base_current: Any) -> Fields:
    """Return the session's own fields; `draft_ids` are the row ids of its drafts, in order."""
    fields = {name: getattr(session, name) for name in (*SESSION_COLUMNS, *SESSION_VERBATIM)}
    fields[CURRENT] = _current(session, draft_ids, base_current)
    return fields


def child_fields_of(part: Part, child: Any) -> Fields:
    """Return a child's fields, not copied."""
    return {name: getattr(child, name) for name in (*part.columns, part.verbatim)}


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are the same, where True isn't 1."""
    if one != other:
        return False
    try:
        sort = orjson.OPT_SORT_KEYS
        return orjson.dumps(one, option=sort) == orjson.dumps(other, option=sort)
    except TypeError:
        return False  # not JSON: let the door name it


def copied(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot that shares no mutable value with `snapshot`."""
    return Snapshot(
        fields=_copy(snapshot.fields),
        children={
            table: tuple(Child(child.id, _copy(child.fields)) for child in children)
            for table, children in snapshot.children.items()
        },
        requests=dict(snapshot.requests),
        stale=snapshot.stale,
    )


def acceptance_order(row: Row) -> tuple[datetime, str]:
    """Return the sort key of rows: moment of acceptance, then id.

    The moments are compared as such, because the server's text drops trailing zeros.
    """
    return moment_of(row.get("created_at")) or _EARLIEST, str(row["id"])


def _in_order(rows: SessionRows, table: str) -> list[Row]:
    return sorted(rows.children[table], key=acceptance_order)


def _session_fields(row: Row, draft_ids: set[str]) -> Fields:
    client = row.get("client") or {}
    fields = {name: _column(row, name) for name in SESSION_COLUMNS}
    fields.update({name: client.get(name, row.get(name)) for name in SESSION_VERBATIM})
    current = client.get(CURRENT)
    if current is None and row.get("current_draft_id") in draft_ids:
        current = row["current_draft_id"]
    fields[CURRENT] = current
    return fields


def _child_fields(part: Part, row: Row) -> Fields:
    client = row.get("client") or {}
    fields = {name: _column(row, name) for name in part.columns}
    fields[part.verbatim] = client.get(part.verbatim, row.get("created_at"))
    return fields


def _column(row: Row, name: str) -> Any:
    value = row.get(name)
    return _EMPTY.get(name) if value is None else value


def _requests(rows: SessionRows) -> dict[str, str]:
    found = {}
    for _table, row in rows.all():
        client = row.get("client") or {}
        for mark in (client.get(REQUEST), client.get(LAST_REQUEST)):
            if isinstance(mark, list) and len(mark) == 2:
                found[str(mark[0])] = str(mark[1])
    return found


def _current(session: PromptSession, draft_ids: Sequence[str], base_current: Any) -> Any:
    """Name the current draft: the very object first, then the one it was, then an equal one."""
    current = session.current_draft
    if current is None:
        return None
    pairs = list(zip(draft_ids, session.ir_drafts, strict=True))
    very = [row_id for row_id, draft in pairs if draft is current]
    if very:
        return base_current if base_current in very else very[-1]
    equal = [row_id for row_id, draft in pairs if draft == current]
    if equal:
        return base_current if base_current in equal else equal[-1]
    return current.to_dict()


def _copy(fields: Fields) -> Fields:
    # Through JSON: an order of magnitude faster than copy.deepcopy, and these values are JSON.
    copy: Fields = orjson.loads(orjson.dumps(fields))
    return copy
