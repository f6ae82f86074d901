"""What operators do over HTTP: what waits, what is parked, what two sides wanted, the proof.

The same as the commands do. Every route asks for an operator's token before it reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
import structlog
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathValue
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from local_store import LocalStore, Row
from syncer import operators
from syncer.audit import audit
from syncer.errors import BatchTooLarge, Declined, RemoteUnavailable
from syncer.remote import SupabaseRemote
from syncer.service import api_schema
from syncer.service.auth import OperatorRoute
from syncer.service.health import SyncState
from syncer.service.http_errors import ApiError, ErrorReply, invalid

T = TypeVar("T")

ID_CHARS_MAX = 64  # a UUID in any of its spellings
COLUMNS_MAX = 200
_ABSENT = ("not_parked", "no_such_conflict", "no_such_log")

log = structlog.get_logger("syncer.desk")

Id = Annotated[str, PathValue(min_length=1, max_length=ID_CHARS_MAX)]
Filter = Annotated[str | None, Query(min_length=1, max_length=255)]


def _carried(columns: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON or Postgres can't carry: it would spoil the call instead of being named."""
    try:
        encoded = orjson.dumps(columns)
    except TypeError:
        raise ValueError("isn't JSON that can be stored") from None
    if rb"\u0000" in encoded or orjson.loads(encoded) != columns:
        raise ValueError("holds NUL, NaN or Infinity, which can't be stored")
    return columns


Columns = Annotated[
    dict[str, Any], Field(min_length=1, max_length=COLUMNS_MAX), AfterValidator(_carried)
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Edit(_Body):
    """Other values for one op of a parked transaction; `op` defaults to the refused one."""

    changes: Columns
    op: Annotated[int, Field(ge=0, strict=True)] | None = None


class Decision(_Body):
    """Whose side a conflict is decided for, or a third version of the row's columns."""

    take: Literal["mine", "theirs"] | None = None
    row: Columns | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Decision:
        if (self.take is None) == (self.row is None):
            raise ValueError("give either take or row")
        return self


class Desk:
    """Where operators' requests are carried out: this process's buffer, and Supabase."""

    def __init__(self, store: LocalStore, sync: SyncState, remote: SupabaseRemote | None) -> None:
        self._store = store
        self._sync = sync
        self._remote = remote

    @property
    def remote(self) -> SupabaseRemote:
        """Supabase; raises RemoteUnavailable when this process has none."""
        if self._remote is None:
            raise RemoteUnavailable("this process doesn't speak to Supabase")
        return self._remote

    def status(self) -> dict[str, Any]:
        """Tell what waits in this buffer, and whether Supabase answers."""
        return {
            "supabase": self._sync.supabase,
            "breaker": self._sync.breaker,
            "refused": self._sync.refused,
            "error": self._sync.error,
            "logs": self._store.logs(),
        }

    def audit(self) -> dict[str, Any]:
        """Account for every acknowledged transaction; the other buffers' by the server alone."""
        return audit(self.remote, self._store).to_json()

    def retry(self, txn_id: str) -> list[Row]:
        """Try a parked transaction again; raises Declined when it isn't parked any more."""
        results = operators.retry(self.remote, [txn_id])
        if results[0]["verdict"] == "declined":
            raise Declined(str(results[0]["message"]).replace(" ", "_"))
        return results

    def letter(self, txn_id: str) -> Row:
        """Return a parked transaction with its values."""
        return _only(operators.dead_letters(self.remote, txn_ids=[txn_id], full=True))

    def conflict(self, conflict_id: str) -> Row:
        """Return a conflict record with its values."""
        return _only(operators.conflicts(self.remote, conflict_id=conflict_id))

    def resolve(self, conflict_id: str, decision: Decision) -> list[Row]:
        """Decide a conflict."""
        if decision.take is not None:
            return operators.resolve(self.remote, conflict_id, decision.take)
        return operators.resolve_edited(self.remote, conflict_id, decision.row or {})


class Operator:
    """One operator's request."""

    def __init__(self, request: Request) -> None:
        self._off_loop = request.app.state.off_loop_desk
        self._user_id: str | None = request.state.user_id
        self.desk: Desk = request.app.state.desk

    async def ask(self, look: Callable[[], Row]) -> Response:
        """Look something up off the event loop."""
        found = await self._declinable(look)
        return Response(orjson.dumps(found), media_type="application/json")

    async def act(self, action: str, target: str, call: Callable[[], Any]) -> Response:
        """Change something off the event loop; who did what to which id is logged."""
        results = await self._declinable(call)
        log.info("operated", action=action, target=target, operator=self._user_id or "service")
        return Response(orjson.dumps({"results": results}), media_type="application/json")

    async def _declinable(self, call: Callable[[], T]) -> T:
        try:
            found: T = await self._off_loop(call)
        except Declined as declined:
            raise _told(declined) from None
        except BatchTooLarge:
            raise invalid("body", "Supabase can't take this as a whole") from None
        return found


router = APIRouter(
    prefix="/api/sync",
    responses=api_schema.operators(),
    route_class=OperatorRoute,
    tags=["operators"],
    dependencies=[Depends(HTTPBearer(auto_error=False, description="Operator's access token"))],
)


async def _operator(request: Request) -> Operator:
    return Operator(request)


Who = Annotated[Operator, Depends(_operator)]


@router.get("/status")
async def status(who: Who) -> Response:
    """Show what waits in this process's buffer."""
    return await who.ask(who.desk.status)


@router.get("/audit")
async def show_audit(who: Who) -> Response:
    """Account for every acknowledged transaction; `balanced` says whether it adds up."""
    return await who.ask(who.desk.audit)


@router.get("/dead-letters")
async def list_letters(who: Who, log: Filter = None, user: Filter = None) -> Response:
    """List what is parked, without users' values."""
    return await who.ask(
        lambda: {"dead_letters": operators.dead_letters(who.desk.remote, log_id=log, user_id=user)}
    )


@router.get("/dead-letters/{txn_id}")
async def show_letter(txn_id: Id, who: Who) -> Response:
    """Show a parked transaction with its values."""
    return await who.ask(lambda: who.desk.letter(txn_id))


@router.post("/dead-letters/{txn_id}/retry")
async def retry(txn_id: Id, who: Who) -> Response:
    """Try it again as its author, then what waits behind it."""
    return await who.act("retry", txn_id, lambda: who.desk.retry(txn_id))


@router.post("/dead-letters/{txn_id}/edit")
async def edit(txn_id: Id, body: Edit, who: Who) -> Response:
    """Replace it by a transaction with other values, which is then to be retried."""
    return await who.act(
        "edit",
        txn_id,
        lambda: [operators.edit(who.desk.remote, txn_id, body.changes, op=body.op)],
    )


@router.post("/dead-letters/{txn_id}/discard")
async def discard(txn_id: Id, who: Who) -> Response:
    """Give it up for good."""
    return await who.act("discard", txn_id, lambda: operators.discard(who.desk.remote, [txn_id]))


@router.get("/conflicts")
async def list_conflicts(
    who: Who, user: Filter = None, undecided: Annotated[bool, Query(alias="open")] = False
) -> Response:
    """List conflict records; with `open=true` those that wait for a decision."""
    return await who.ask(
        lambda: {
            "conflicts": operators.conflicts(who.desk.remote, user_id=user, undecided=undecided)
        }
    )


@router.get("/conflicts/{conflict_id}")
async def show_conflict(conflict_id: Id, who: Who) -> Response:
    """Show a record: base, mine, theirs, what was done."""
    return await who.ask(lambda: who.desk.conflict(conflict_id))


@router.post("/conflicts/{conflict_id}/resolve")
async def resolve(conflict_id: Id, body: Decision, who: Who) -> Response:
    """Decide a conflict; what waits for it goes on."""
    return await who.act("resolve", conflict_id, lambda: who.desk.resolve(conflict_id, body))


def _only(found: Sequence[Row]) -> Row:
    if not found:
        raise ApiError(ErrorReply(404, "not_found", "there is nothing with this id"))
    return found[0]


def _told(declined: Declined) -> ApiError:
    if declined.reason in _ABSENT:
        return ApiError(ErrorReply(404, "not_found", f"{declined.message}; nothing was changed"))
    if declined.reason == "no_such_op":
        reason = "there is no such op"
        return ApiError(ErrorReply(422, "invalid", f"op: {reason}", [("op", reason)]))
    return ApiError(ErrorReply(409, "conflict", f"{declined.message}; nothing was changed"))
