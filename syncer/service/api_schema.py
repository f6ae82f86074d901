"""What the API's documents look like, for its OpenAPI description. Nothing is checked with these:
a reply is made from the session itself, and a test holds it against this description.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from local_store.ops import Durability
from syncer.service.http_errors import Code
from syncer.sessions.models import (
    HoleResolution,
    IRDraft,
    PromptRevision,
    SessionSource,
    SessionStatus,
)
from syncer.sessions.store_api import SessionState

EXAMPLE_ID = "019a3b52-6f0e-7c11-9d0e-3f1f5a2b7c44"
_EXAMPLE_DRAFT: Any = {
    "version": 1,
    "ir": {"intent": "sort a list", "holes": ["hole_order"]},
    "validation_status": "incomplete",
    "smt_results": [],
    "ambiguities": ["hole_order"],
    "created_at": "2026-01-31T12:00:00.000000+00:00",
    "metadata": {},
}
_EXAMPLE_SYNC: Any = {
    "state": "pending",
    "pending_transactions": 1,
    "durability": "host",
    "stale": False,
}


class SyncDocument(BaseModel):
    """Where a session stands. `synced` only when the server confirmed all of it."""

    state: SessionState
    pending_transactions: int
    durability: Durability
    stale: bool = Field(description="The server may have a fresher version and couldn't be asked.")


class SessionDocument(BaseModel):
    """A session with its history, and where it stands."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "session_id": EXAMPLE_ID,
                "user_id": "github:42",
                "created_at": "2026-01-31T12:00:00.000000+00:00",
                "updated_at": "2026-01-31T12:00:00.000000+00:00",
                "status": "active",
                "source": "prompt",
                "revisions": [
                    {
                        "timestamp": "2026-01-31T12:00:00.000000+00:00",
                        "content": "Sort a list",
                        "revision_type": "initial",
                        "target_hole": None,
                        "metadata": {},
                    }
                ],
                "ir_drafts": [_EXAMPLE_DRAFT],
                "current_draft": _EXAMPLE_DRAFT,
                "pending_resolutions": [],
                "metadata": {},
                "sync": _EXAMPLE_SYNC,
            }
        }
    )

    session_id: str
    user_id: str | None
    created_at: str
    updated_at: str
    status: SessionStatus
    source: SessionSource
    revisions: list[PromptRevision]
    ir_drafts: list[IRDraft]
    current_draft: IRDraft | None
    pending_resolutions: list[HoleResolution]
    metadata: dict[str, Any]
    sync: SyncDocument


class PageDocument(BaseModel):
    """Some sessions, newest first. Unless `complete`, the server may have more of them."""

    sessions: list[SessionDocument]
    complete: bool
    next: str | None = Field(description="The cursor of the next page; null on the last.")


class HistoryDocument(BaseModel):
    """What was said, drafted and answered, each list from the oldest to the newest."""

    session_id: str
    revisions: list[PromptRevision]
    ir_drafts: list[IRDraft]
    pending_resolutions: list[HoleResolution]
    sync: SyncDocument


class FieldDocument(BaseModel):
    """One field of a request, and what is wrong with it."""

    field: str
    reason: str


class ErrorBody(BaseModel):
    """What went wrong, for a program and for a person; never what was sent."""

    code: Code
    message: str
    fields: list[FieldDocument]
    retry_after_s: float | None
    request_id: str | None


class ErrorDocument(BaseModel):
    """The one shape of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "code": "invalid",
                    "message": "prompt: is needed, or an ir",
                    "fields": [{"field": "prompt", "reason": "is needed, or an ir"}],
                    "retry_after_s": None,
                    "request_id": "019a3b52-7000-7a10-8000-000000000001",
                }
            }
        }
    )

    error: ErrorBody


class HealthDocument(BaseModel):
    """How far behind Supabase this process is, and what is wrong."""

    status: Literal["ok", "degraded", "failing"]
    supabase: Literal["up", "down", "off", "unknown"]
    breaker: Literal["closed", "open", "half_open"]
    pending: int | None
    oldest_age_s: float | None
    at_risk_transactions: int | None
    parked: int | None
    acknowledge: str


Responses = dict[int | str, dict[str, Any]]

_DURABILITY = {
    "X-Durability": {
        "description": "What the write survives: host, container or remote.",
        "schema": {"type": "string", "enum": ["host", "container", "remote"]},
    }
}
_ERRORS: dict[int, str] = {
    401: "No access token, or one that isn't valid.",
    403: "The token isn't an operator's.",
    404: "There is no such thing, or it is somebody else's.",
    409: "It changed meanwhile, or the Idempotency-Key was used for something else.",
    413: "The body is over the limit.",
    422: "A field isn't valid; nothing was written.",
    503: "The buffer is full, the server shuts down, or what was asked for is unknown here.",
}


def reads(model: type[BaseModel], *errors: int) -> Responses:
    """Describe a route that reads: its document, and the errors it may answer besides 401."""
    return {200: {"model": model}, **_described(401, 422, 503, *errors)}


def writes(status: int, *errors: int) -> Responses:
    """Describe a route that writes a session and shows it; 204 shows nothing."""
    shown: dict[str, Any] = {"headers": _DURABILITY}
    if status != 204:
        shown["model"] = SessionDocument
    return {status: shown, **_described(401, 409, 413, 422, 503, *errors)}


def operators() -> Responses:
    """Describe the errors of the operators' routes; their documents are those of the commands."""
    return _described(401, 403, 404, 409, 413, 422, 503)


def _described(*statuses: int) -> Responses:
    return {
        status: {"model": ErrorDocument, "description": _ERRORS[status]}
        for status in sorted(set(statuses))
    }
