"""The session tables as the server has them; `sessions` first, its children after it.

`client` holds, per row, what the columns can't: the client's own strings (timestamps in any form,
the user id as given) and the mark of the request that made the row. `created_at` is the moment of
acceptance, set by the store and the server; `current_ir` and `current_draft_version` are derived
on the server from the draft that `current_draft_id` names.
"""

from __future__ import annotations

from typing import get_args

from local_store import Column, TableSpec
from syncer.sessions.models import (
    ResolutionType,
    RevisionType,
    SessionSource,
    SessionStatus,
    ValidationStatus,
)
from syncer.sessions.policy import child_rules, session_rules
from syncer.sessions.translate import Fill, SketchTranslator

SESSIONS = "sessions"
REVISIONS = "session_revisions"
DRAFTS = "session_drafts"
RESOLUTIONS = "hole_resolutions"

_TEXT = Column("text", nullable=False)
_JSON = Column("json", nullable=False)
_STAMPS = {"created_at": Column("timestamp"), "updated_at": Column("timestamp")}
_OWN = {"id": Column("uuid", nullable=False), "user_id": Column("uuid", nullable=False)}


def _one_of(literal: object) -> Column:
    return Column("text", nullable=False, enum=get_args(literal))


def _child(name: str, columns: dict[str, Column]) -> TableSpec:
    return TableSpec(
        name,
        policy=child_rules({**columns, "session_id": None, "metadata": None}),
        columns={
            **_OWN,
            "session_id": Column("uuid", nullable=False),
            **columns,
            **_STAMPS,
            "metadata": _JSON,
            "client": _JSON,
        },
        parent=("session_id", SESSIONS),
        server_owned=frozenset(_STAMPS),
        json_merge=frozenset({"metadata", "client"}),
    )


def session_tables(fill: Fill | None = None) -> list[TableSpec]:
    """Return the session tables; `fill` is what works answers into drafts when two meet.

    Give the flusher's process the translator that the API uses, or drafts that are made again on
    another container's would be made by the sketch.
    """
    rules = session_rules(fill or SketchTranslator().fill, DRAFTS, RESOLUTIONS)
    return [
        TableSpec(
            SESSIONS,
            policy=rules,
            columns={
                **_OWN,
                "status": _one_of(SessionStatus),
                "source": _one_of(SessionSource),
                "current_draft_id": Column("uuid"),
                "current_draft_version": Column("int"),
                "current_ir": Column("json"),
                "revision_count": Column("int"),
                "hole_count": Column("int"),
                **_STAMPS,
                "finalized_at": Column("timestamp"),
                "metadata": _JSON,
                "client": _JSON,
            },
            server_owned=frozenset(
                {*_STAMPS, "current_ir", "current_draft_version", "revision_count", "hole_count"}
            ),
            json_merge=frozenset({"metadata", "client"}),
        ),
        _child(
            REVISIONS,
            {
                "content": _TEXT,
                "revision_type": _one_of(RevisionType),
                "target_hole": Column("text"),
            },
        ),
        _child(
            DRAFTS,
            {
                "version": Column("int", nullable=False),
                "ir": _JSON,
                "validation_status": _one_of(ValidationStatus),
                "smt_results": _JSON,
                "ambiguities": Column("text[]", nullable=False),
            },
        ),
        _child(
            RESOLUTIONS,
            {
                "hole_id": _TEXT,
                "resolution_text": _TEXT,
                "resolution_type": _one_of(ResolutionType),
                "applied": Column("bool", nullable=False),
                "applied_at": Column("timestamp"),
            },
        ),
    ]


SESSION_TABLES: list[TableSpec] = session_tables()
