"""How two containers' changes of one session come together; no ordinary call needs a person.

Both made a new draft: mine is made again on theirs, by working my answers into their IR, so that
what both of them answered is answered. Both declared the session done: the first to reach the
server stands. Metadata merge by key, mine over theirs with a record. Clients' own strings merge
without a word.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Mapping
from typing import Any

from local_store.ops import Policy, Resolution, Row, RowConflict, WireOp
from syncer.sessions.models import draft_of, moment_of
from syncer.sessions.translate import IR, Fill

Rules = dict[str, Any]
UPDATED_AT = "updated_at"

LOCAL: Policy = "local_wins"
REMOTE: Policy = "remote_wins"


def session_rules(fill: Fill, drafts: str, resolutions: str) -> Rules:
    """Return the policies of the session table's columns.

    `fill` works an answer into an IR; it may be a coroutine function, and must not change its
    arguments. `drafts` and `resolutions` name the tables of the children that go with a new draft.
    """

    def current_draft(conflict: RowConflict) -> Resolution:
        return _on_their_draft(conflict, fill, drafts, resolutions)

    return {
        "status": their_end,
        "source": REMOTE,
        "finalized_at": silently_theirs,
        "current_draft_id": current_draft,
        "metadata": LOCAL,
        "client": silently_by_key,
    }


def child_rules(columns: Mapping[str, Any]) -> Rules:
    """Return the policies of a child's columns: the later word stands, with a record."""
    rules: Rules = dict.fromkeys(columns, LOCAL)
    rules |= {"applied_at": silently_theirs, "client": silently_by_key}
    return rules


def their_end(conflict: RowConflict) -> Resolution:
    """Let the first end that reached the server stand, the stamp that goes with it included.

    Mine alone would otherwise put a moment of finalizing on a session that they abandoned.
    """
    for index, op in enumerate(conflict.siblings):
        is_mine = (op.table, op.id, op.kind) == (conflict.table, conflict.id, "update")
        if is_mine and "finalized_at" in op.values:
            stamp = {"finalized_at": conflict.theirs.get("finalized_at")}
            return Resolution({}, siblings={index: stamp})
    return Resolution({})


def silently_theirs(conflict: RowConflict) -> Resolution:
    """Keep theirs without a record: for a stamp that says when the same thing was done."""
    return Resolution({name: conflict.theirs[name] for name in conflict.columns}, surfaced=False)


def silently_by_key(conflict: RowConflict) -> Resolution:
    """Merge a `client` object by key without a record; of two moments the later one stays."""
    merged = {}
    for name in conflict.columns:
        base, mine = conflict.base.get(name) or {}, conflict.mine.get(name) or {}
        merged[name] = _by_key(base, mine, conflict.theirs.get(name) or {})
    return Resolution(merged, surfaced=False)


def _by_key(base: Row, mine: Row, theirs: Row) -> Row:
    merged = dict(theirs)
    for key in {**base, **mine}:
        if mine.get(key) == base.get(key):
            continue
        if key == UPDATED_AT and not _is_later(mine.get(key), theirs.get(key)):
            continue
        if key in mine:
            merged[key] = mine[key]
        else:
            merged.pop(key, None)
    return merged


def _is_later(mine: Any, theirs: Any) -> bool:
    ours, other = moment_of(mine), moment_of(theirs)
    return ours is None or other is None or ours > other


def _on_their_draft(conflict: RowConflict, fill: Fill, drafts: str, resolutions: str) -> Resolution:
    """Make my draft again on the one that is current there."""
    draft_id = conflict.mine["current_draft_id"]
    values = {"current_draft_id": draft_id}
    index = _draft_index(conflict, drafts, draft_id)
    if index is None:
        return Resolution(values)
    answers = [
        op.values
        for op in conflict.siblings
        if op.table == resolutions and op.kind == "insert" and op.values.get("applied")
    ]
    theirs = conflict.theirs.get("current_ir")
    if not answers or not isinstance(theirs, dict):
        # A rollback, or a draft of the caller's own: the later word.
        mine = conflict.siblings[index].values
        return Resolution(values, derived=_derived(mine["ir"], mine["version"]))
    ir = _filled(theirs, answers, fill)
    draft = draft_of(ir, int(conflict.theirs.get("current_draft_version") or 0) + 1)
    remade = {
        "ir": ir,
        "version": draft.version,
        "validation_status": draft.validation_status,
        "ambiguities": draft.ambiguities,
    }
    return Resolution(values, {index: remade}, _derived(ir, draft.version))


def _draft_index(conflict: RowConflict, drafts: str, draft_id: str | None) -> int | None:
    for index, op in enumerate(conflict.siblings):
        if _makes(op, drafts, draft_id):
            return index
    return None


def _makes(op: WireOp, table: str, row_id: str | None) -> bool:
    return (op.table, op.kind, op.id) == (table, "insert", row_id)


def _derived(ir: IR, version: int) -> Row:
    """What the server will derive from the draft; the next change of the chain builds on it."""
    return {"current_ir": ir, "current_draft_version": version}


def _filled(ir: IR, answers: list[Row], fill: Fill) -> IR:
    filled = copy.deepcopy(ir)
    for answer in answers:
        made = fill(filled, answer["hole_id"], answer["resolution_text"], answer["resolution_type"])
        filled = asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made
    return filled


async def _awaited(made: Any) -> IR:
    found: IR = await made
    return found
