"""Every error of the API in one shape, the framework's own included.

    {"error": {"code", "message", "fields": [{"field", "reason"}], "retry_after_s", "request_id"}}

A message never repeats what a client sent nor what Supabase answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from local_store import (
    BufferFull,
    CommitUnknown,
    InvalidWrite,
    LocalStoreError,
    StoreClosed,
    TransactionIdReused,
)
from syncer.errors import SyncError, Throttled
from syncer.sessions import (
    ConcurrentModificationError,
    DraftNotFound,
    IdempotencyMismatch,
    InvalidCursor,
    SessionNotFound,
)

Code = Literal[
    "unauthorized",
    "forbidden",
    "not_found",
    "invalid",
    "conflict",
    "idempotency_mismatch",
    "too_large",
    "buffer_full",
    "shutting_down",
    "unavailable",
]
RETRY_SOON_S = 1.0  # a restart, or a lost race
RETRY_LATER_S = 5.0  # about one breaker interval: sooner, nothing has changed

_BY_STATUS: dict[int, Code] = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    413: "too_large",
}
# What a client calls the values that end up in these columns.
_REQUEST_FIELDS = {"content": "prompt", "target_hole": "hole_id"}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """One error as the client gets it; `fields` are (field, reason)."""

    status: int
    code: Code
    message: str
    fields: Sequence[tuple[str, str]] = ()
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, request_id: str | None) -> Response:
        """Return the response; text that isn't valid UTF-8 is mended, never a second error."""
        document = {
            "error": {
                "code": self.code,
                "message": _clean(self.message),
                "fields": [{"field": _clean(name), "reason": _clean(r)} for name, r in self.fields],
                "retry_after_s": self.retry_after_s,
                "request_id": request_id,
            }
        }
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        body = orjson.dumps(document)
        return Response(body, self.status, headers, media_type="application/json")


class ApiError(Exception):
    """An error that a route states itself."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.message)
        self.reply = reply


def invalid(name: str, reason: str) -> ApiError:
    """Return a 422 that names one field."""
    return ApiError(ErrorReply(422, "invalid", f"{name}: {reason}", [(name, reason)]))


def reply_to(error: Exception) -> ErrorReply:
    """Translate an error into what the client is told."""
    if isinstance(error, ApiError):
        return error.reply
    if isinstance(error, LocalStoreError):
        return _reply_to_store_error(error)
    if isinstance(error, SyncError):
        asked_s = error.retry_after_s if isinstance(error, Throttled) else None
        message = "Supabase can't be asked now, so this is unknown here"
        return ErrorReply(503, "unavailable", message, retry_after_s=asked_s or RETRY_LATER_S)
    if isinstance(error, RequestValidationError):
        return _reply_to_validation(error)
    if isinstance(error, HTTPException):
        return _reply_to_http(error)
    return _reply_to_session_error(error)


def install(app: FastAPI) -> None:
    """Answer every known error of the routes in the one shape."""
    known: tuple[type[Exception], ...] = (
        ApiError,
        LocalStoreError,
        SyncError,
        RequestValidationError,
        HTTPException,
        SessionNotFound,
        DraftNotFound,
        InvalidCursor,
        IdempotencyMismatch,
        ConcurrentModificationError,
    )
    for kind in known:
        app.add_exception_handler(kind, _handle)


def request_id_of(scope: Mapping[str, Any]) -> str | None:
    """Return the request's id, if the middleware that gives it has run."""
    found: str | None = scope.get("state", {}).get("request_id")
    return found


async def _handle(request: Request, error: Exception) -> Response:
    return reply_to(error).response(request_id_of(request.scope))


def _reply_to_store_error(error: LocalStoreError) -> ErrorReply:
    if isinstance(error, InvalidWrite):
        name = _REQUEST_FIELDS.get(error.column, error.column)
        return ErrorReply(422, "invalid", f"{name}: {error.reason}", [(name, error.reason)])
    if isinstance(error, BufferFull):
        message = "the local buffer is full; nothing was written"
        return ErrorReply(503, "buffer_full", message, retry_after_s=error.retry_after_s)
    if isinstance(error, StoreClosed):
        message = "this server is shutting down; nothing was written"
        return ErrorReply(503, "shutting_down", message, retry_after_s=RETRY_SOON_S)
    if isinstance(error, TransactionIdReused):
        return _reply_to_session_error(IdempotencyMismatch())
    if isinstance(error, CommitUnknown):
        message = "the write may have happened; repeat it with the same Idempotency-Key"
        return ErrorReply(503, "unavailable", message, retry_after_s=RETRY_SOON_S)
    message = "the local buffer can't take this now"
    return ErrorReply(503, "unavailable", message, retry_after_s=RETRY_LATER_S)


def _reply_to_session_error(error: Exception) -> ErrorReply:
    if isinstance(error, SessionNotFound):
        return ErrorReply(404, "not_found", "there is no such session")
    if isinstance(error, DraftNotFound):
        reason = "no draft of this version"
        return ErrorReply(422, "invalid", f"version: {reason}", [("version", reason)])
    if isinstance(error, InvalidCursor):
        return ErrorReply(422, "invalid", f"cursor: {error}", [("cursor", str(error))])
    if isinstance(error, IdempotencyMismatch):
        return ErrorReply(409, "idempotency_mismatch", str(error))
    if isinstance(error, ConcurrentModificationError):
        fields = [(name, "changed meanwhile") for name in error.fields]
        message = "the session changed meanwhile; read it again"
        return ErrorReply(409, "conflict", message, fields, retry_after_s=RETRY_SOON_S)
    message = "something went wrong here; the write may or may not have happened"
    return ErrorReply(500, "unavailable", message)


def _reply_to_validation(error: RequestValidationError) -> ErrorReply:
    found = []
    for item in error.errors():
        where = [str(part) for part in item["loc"] if part not in ("body", "query", "path")]
        is_json = item["type"] == "json_invalid"
        found.append(("body" if is_json or not where else ".".join(where), _reason(item)))
    message = "; ".join(f"{name}: {reason}" for name, reason in found[:3])
    return ErrorReply(422, "invalid", message, found)


def _reason(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "no such field"
    if item["type"] == "json_invalid":
        return "isn't valid JSON"
    return str(item["msg"]).removeprefix("Value error, ")


def _reply_to_http(error: HTTPException) -> ErrorReply:
    headers = dict(error.headers or {})
    if error.status_code == 400:  # the framework's word for a body it can't parse
        return ErrorReply(422, "invalid", "the body can't be read", [("body", "can't be read")])
    code: Code = "invalid" if error.status_code < 500 else "unavailable"
    code = _BY_STATUS.get(error.status_code, code)
    return ErrorReply(error.status_code, code, str(error.detail), headers=headers)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
