"""What an error reply means: one table, the most specific line wins.

Code first, HTTP status second: Postgres errors arrive under misleading statuses (permanent ones as
500, a read-only database as 405). A code-less error is never definite, because a gateway that lost
the reply to COMMIT answers so although the row is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyUnreadable,
    SyncError,
    Throttled,
)

FailureClass = Literal["outage", "unknown", "transient", "auth", "schema", "split"]

BY_CODE: dict[str, FailureClass] = {
    "PGRST000": "outage", "PGRST001": "outage", "PGRST002": "outage",
    "25006": "outage", "53300": "transient", "PGRST003": "transient",
    "40001": "transient", "40P01": "transient", "55P03": "transient", "57014": "transient",
    "PGRST300": "auth", "PGRST301": "auth", "PGRST302": "auth", "PGRST303": "auth",
    "42501": "auth",
    "PGRST202": "schema", "PGRST203": "schema", "PGRST204": "schema", "PGRST205": "schema",
    "42P01": "schema", "42703": "schema", "42883": "schema",
    "22P05": "split", "22P02": "split", "22003": "split", "21000": "split", "PGRST102": "split",
}  # fmt: skip
"""Whole codes. 53300 is a full pool, not a full disk like its siblings: it passes by itself."""

BY_CODE_PREFIX: dict[str, FailureClass] = {
    "08": "outage", "53": "outage", "57P": "outage", "28": "auth",
}  # fmt: skip

BY_STATUS: dict[int, FailureClass] = {
    401: "auth", 402: "auth", 413: "split", 429: "transient", 503: "outage",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FailedReply:
    """What is known of a reply that isn't a JSON 2xx."""

    status: int
    code: str = ""
    message: str = ""
    retry_after_s: float | None = None


def classify(reply: FailedReply) -> FailureClass:
    """Return the class of an error reply. What isn't listed keeps the data: `unknown`."""
    if reply.code:
        exact = BY_CODE.get(reply.code)
        if exact is not None:
            return exact
        if reply.code == "0A000" and "recovery" in reply.message:
            return "outage"
        for prefix, kind in BY_CODE_PREFIX.items():
            if reply.code.startswith(prefix):
                return kind
    if reply.status == 503 and reply.retry_after_s is not None:
        return "transient"
    return BY_STATUS.get(reply.status, "unknown")


def error_for(reply: FailedReply) -> SyncError:
    """Return the error to raise for an error reply; it names status and code, never the body."""
    told = f"Supabase answered {reply.status}" + (f" ({reply.code})" if reply.code else "")
    kind = classify(reply)
    match kind:
        case "outage":
            return RemoteUnavailable(told, hint="everything is kept and resent")
        case "unknown":
            return ReplyUnreadable(told, hint="the outcome is unknown; the same ids are resent")
        case "transient":
            return Throttled(told, retry_after_s=reply.retry_after_s, hint="will be retried")
        case "auth":
            return NotAuthorized(
                told, hint="check SUPABASE_SECRET_KEY: it must be the secret (service_role) key"
            )
        case "schema":
            return ProtocolMismatch(
                told, hint="run `syncer migrate`; a schema cache reload may be under way"
            )
        case "split":
            return BatchTooLarge(told, hint="smaller batches are tried")
        case _:
            assert_never(kind)
