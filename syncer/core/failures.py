"""What a failed call means: one table, read from the top, the first line that fits wins.

Code first, status second: Postgres errors arrive under misleading statuses (permanent ones as 500,
a read-only database as 405). A code-less error is never definite, because a gateway that lost the
reply to COMMIT answers so although the row is there. What fits no line keeps the data: `unknown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, assert_never

from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SyncError,
    Throttled,
    TookTooLong,
)

FailureClass = Literal["outage", "unknown", "late", "transient", "slow", "auth", "schema", "split"]
Signal = Literal["exception", "code", "prefix", "status", "status_range"]

RANGE_WIDTH = 100  # `status_range` 300 stands for 300–399


@dataclass(frozen=True, slots=True)
class FailedReply:
    """What is known of a reply that isn't a JSON 2xx."""

    status: int
    code: str = ""
    message: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line: the signal, what it must be, perhaps what else must hold, the class, and why.

    `needs`: `retry_after` (the header is there), or a word of the server's or the exception's text.
    """

    signal: Signal
    value: str
    kind: FailureClass
    why: str
    needs: str = ""


TABLE: tuple[Line, ...] = (
    # -- no reply --
    Line("exception", "ConnectError", "auth", "certificates don't fit", "SSL"),
    Line("exception", "ConnectError", "outage", "refused, no route, no such name"),
    Line("exception", "ConnectTimeout", "outage", "nobody took the connection"),
    Line("exception", "PoolTimeout", "outage", "our own connections are all waiting"),
    Line("exception", "TimeoutException", "late", "it may have been done; the reply is missing"),
    Line("exception", "HTTPError", "unknown", "cut while sending or answering, or no HTTP at all"),
    Line("exception", "APIError", "unknown", "the client couldn't read the reply"),
    Line("exception", "ValueError", "unknown", "the body isn't the JSON it says it is"),
    # -- PostgREST --
    Line("code", "PGRST000", "outage", "PostgREST can't reach Postgres"),
    Line("code", "PGRST001", "outage", "PostgREST can't reach Postgres"),
    Line("code", "PGRST002", "outage", "PostgREST can't load the schema"),
    Line("code", "PGRST003", "transient", "PostgREST's pool is exhausted"),
    Line("code", "PGRST300", "auth", "PostgREST has no JWT secret"),
    Line("code", "PGRST301", "auth", "the key isn't accepted"),
    Line("code", "PGRST302", "auth", "anonymous access is off"),
    Line("code", "PGRST303", "auth", "the key's claims aren't accepted"),
    Line("code", "PGRST202", "schema", "the RPC isn't there, or the schema cache is stale"),
    Line("code", "PGRST203", "schema", "the RPC is ambiguous"),
    Line("code", "PGRST204", "schema", "a column isn't in the schema cache"),
    Line("code", "PGRST205", "schema", "a table isn't in the schema cache"),
    Line("code", "PGRST102", "split", "the body as a whole can't be read"),
    # -- Postgres --
    Line("code", "0A000", "outage", "a hot standby answers", "recovery"),
    Line("code", "25006", "outage", "the database is read-only"),
    Line("code", "53300", "transient", "too many connections: passes by itself, unlike its kin"),
    Line("code", "40001", "transient", "serialisation failure"),
    Line("code", "40P01", "transient", "deadlock"),
    Line("code", "55P03", "transient", "a lock wasn't to be had"),
    Line("code", "57014", "slow", "statement timeout: a smaller batch may fit"),
    Line("code", "42501", "auth", "the call itself isn't allowed: the wrong key"),
    Line("code", "42P01", "schema", "a table of the RPC isn't there"),
    Line("code", "42703", "schema", "a column of the RPC isn't there"),
    Line("code", "42883", "schema", "a function of the RPC isn't there"),
    Line("code", "SYP01", "schema", "the RPC speaks another protocol"),
    Line("code", "22P05", "split", "a character that Postgres can't store"),
    Line("code", "22P02", "split", "a value that isn't of its type, outside any transaction"),
    Line("code", "22003", "split", "a number out of range, outside any transaction"),
    Line("code", "21000", "split", "one item spoils the statement"),
    Line("prefix", "08", "outage", "the connection to Postgres broke"),
    Line("prefix", "53", "outage", "disk full, out of memory: a matter of the server"),
    Line("prefix", "57P", "outage", "Postgres is shutting down, starting or cancelled us"),
    Line("prefix", "28", "auth", "the login isn't accepted"),
    # -- gateways --
    Line("status", "401", "auth", "the key isn't accepted; never a reason to drop data"),
    Line("status", "402", "auth", "the project's plan is exhausted"),
    Line("status", "413", "split", "the request is too large"),
    Line("status", "429", "transient", "too many requests"),
    Line("status", "503", "transient", "asked to come back later", "retry_after"),
    Line("status", "503", "outage", "the gateway has no upstream"),
    Line("status_range", "300", "unknown", "a redirect: a POST followed would become a GET"),
    Line("status_range", "200", "unknown", "a login page or a portal: not an answer"),
    Line("status_range", "400", "unknown", "without a code nothing is definite"),
    Line("status_range", "500", "unknown", "gateways (520–530, 540, 544, 546, 556) and all others"),
)  # fmt: skip

PROVES: dict[FailureClass, str] = {
    "outage": "not done",
    "unknown": "nothing",
    "late": "nothing",
    "transient": "not done",
    "slow": "not done",
    "auth": "not done",
    "schema": "not done",
    "split": "not done",
}
"""Whether the batch may have been applied; the ledger makes resending harmless in any case."""


def line_for(reply: FailedReply) -> Line | None:
    """Return the line that an error reply falls under."""
    return next((line for line in TABLE if _fits(line, reply)), None)


def line_for_exception(names: Sequence[str], text: str) -> Line | None:
    """Return the line of an exception, by the names of its class and of its bases."""
    for line in TABLE:
        if line.signal == "exception" and line.value in names and line.needs in text:
            return line
    return None


def _fits(line: Line, reply: FailedReply) -> bool:
    if line.needs == "retry_after" and reply.retry_after_s is None:
        return False
    match line.signal:
        case "exception":
            return False
        case "code":
            needed = "" if line.needs == "retry_after" else line.needs
            return reply.code == line.value and needed in reply.message
        case "prefix":
            return reply.code.startswith(line.value)
        case "status":
            return reply.status == int(line.value)
        case "status_range":
            return 0 <= reply.status - int(line.value) < RANGE_WIDTH
        case _:
            assert_never(line.signal)


def classify(reply: FailedReply) -> FailureClass:
    """Return the class of an error reply."""
    line = line_for(reply)
    return "unknown" if line is None else line.kind


def error_for(reply: FailedReply) -> SyncError:
    """Return the error to raise for an error reply; it names status and code, never the body."""
    told = f"Supabase answered {reply.status}" + (f" ({reply.code})" if reply.code else "")
    return _error(classify(reply), told, reply.retry_after_s)


def error_for_exception(names: Sequence[str], text: str) -> SyncError:
    """Return the error to raise for an exception of the client; only its type is told."""
    line = line_for_exception(names, text)
    kind: FailureClass = "unknown" if line is None else line.kind
    return _error(kind, f"no reply from Supabase ({names[0]})", None)


def _error(kind: FailureClass, told: str, retry_after_s: float | None) -> SyncError:
    match kind:
        case "outage":
            return RemoteUnavailable(told, hint="everything is kept and resent")
        case "unknown":
            return ReplyUnreadable(told, hint="the outcome is unknown; the same ids are resent")
        case "late":
            return ReplyTimedOut(told, hint="the outcome is unknown; the same ids are resent")
        case "transient":
            return Throttled(told, retry_after_s=retry_after_s, hint="will be retried")
        case "slow":
            return TookTooLong(told, retry_after_s=retry_after_s, hint="smaller batches are tried")
        case "auth":
            return NotAuthorized(
                told, hint="check SUPABASE_URL and SUPABASE_SECRET_KEY (the secret key it must be)"
            )
        case "schema":
            return ProtocolMismatch(
                told, hint="run `syncer migrate`; a schema cache reload may be under way"
            )
        case "split":
            return BatchTooLarge(told, hint="smaller batches are tried")
        case _:
            assert_never(kind)


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """Read Retry-After, seconds or an HTTP date; None when it is absent or can't be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def as_markdown() -> str:
    """Return the table as the documentation shows it."""
    rows = ["| signal | class | proves | why |", "|---|---|---|---|"]
    for line in TABLE:
        needs = {"": "", "retry_after": " with Retry-After"}.get(line.needs, f" “{line.needs}”")
        shown = {
            "exception": f"`{line.value}`",
            "code": f"code `{line.value}`",
            "prefix": f"code `{line.value}*`",
            "status": f"status {line.value}",
            "status_range": f"any other {line.value[0]}xx",
        }[line.signal]
        rows.append(f"| {shown}{needs} | {line.kind} | {PROVES[line.kind]} | {line.why} |")
    return "\n".join(rows) + "\n"
