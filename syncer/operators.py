"""What a person does with parked work, from any machine that has the project's URL and secret key.

Every function is one or two RPCs; nothing here needs the container that wrote the transaction, nor
its buffer. Effects take place under the author's row-level security, never as the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from local_store.clock import new_id
from local_store.door import canonical_uuid, digest_of
from local_store.ops import Row, WireOp, user_uuid
from syncer.errors import Declined
from syncer.remote import SupabaseRemote

PAGE = 500  # records per call: some hundred KB without their values
RETRIES_PER_CALL = 100  # each with what waits for it: well within the RPC's 20 s
QUOTING = ("22", "P0")  # SQLSTATE classes whose messages name values, or are the project's own

Choice = Literal["mine", "theirs"]


def dead_letters(
    remote: SupabaseRemote,
    *,
    txn_ids: Sequence[str] | None = None,
    log_id: str | None = None,
    user_id: str | None = None,
    full: bool = False,
) -> list[Row]:
    """Return what is parked, in the order of its logs; `full` brings the values, users' data too.

    Without `full` a message that may quote a value is left out (None); its SQLSTATE stays.
    With `txn_ids` also what was superseded. Raises SyncError.
    """
    asked: Row = {"limit": PAGE, "full": full}
    if txn_ids is not None:
        asked["txn_ids"] = [known for known in map(canonical_uuid, txn_ids) if known is not None]
    if log_id is not None:
        asked["log_id"] = _id(log_id, "no_such_log")
    if user_id is not None:
        asked["user_id"] = user_uuid(user_id)
    found: list[Row] = []
    while True:
        page = remote.operate("sync_list_parked_v1", asked)["parked"]
        found += page if full else [_unquoted(letter) for letter in page]
        if len(page) < PAGE:
            return found
        asked |= {"after_log_id": page[-1]["log_id"], "after_seq": page[-1]["seq"]}


def retry(remote: SupabaseRemote, txn_ids: Sequence[str]) -> list[Row]:
    """Try parked transactions again, and what waits for them; returns a verdict for each tried.

    One that isn't parked any more gets the verdict `duplicate` if it was applied meanwhile, else
    `declined` with the reason as its message. Safe to repeat. Raises SyncError; then those before
    it may have been tried.
    """
    chosen = [_id(txn_id, "not_parked") for txn_id in txn_ids]
    results: list[Row] = []
    for start in range(0, len(chosen), RETRIES_PER_CALL):
        asked = {"txn_ids": chosen[start : start + RETRIES_PER_CALL]}
        results += remote.operate("sync_retry_v1", asked)["results"]
    tried = {result["txn_id"] for result in results}
    return results + [_untried(remote, txn_id) for txn_id in chosen if txn_id not in tried]


def _untried(remote: SupabaseRemote, txn_id: str) -> Row:
    reason = _why_not_parked(remote, txn_id)
    verdict = "duplicate" if reason == "already_applied" else "declined"
    message = reason.replace("_", " ")
    return {"txn_id": txn_id, "verdict": verdict, "state": None, "message": message}


def discard(remote: SupabaseRemote, txn_ids: Sequence[str]) -> list[Row]:
    """Give parked transactions up, all or none; what waited for them is tried.

    Raises Declined when one of them is not parked any more.
    """
    chosen = [_id(txn_id, "not_parked") for txn_id in txn_ids]
    results: list[Row] = remote.operate("sync_discard_v1", {"txn_ids": chosen})["results"]
    return results


def edit(
    remote: SupabaseRemote,
    txn_id: str,
    changes: Mapping[str, Any],
    *,
    op: int | None = None,
    ids: Callable[[], str] = new_id,
) -> Row:
    """Replace a parked transaction by one whose op `op` has other values; not tried yet.

    `op` defaults to the one that was refused. Returns the verdict of the new transaction, whose
    txn_id differs. Raises Declined when the old one was applied or isn't parked, or has no op `op`.
    """
    parked = _parked(remote, txn_id)
    ops = [dict(item) for item in parked["item"]["ops"]]
    index = (parked["op"] or 0) if op is None else op
    if not 0 <= index < len(ops):
        raise Declined("no_such_op", hint=f"it has {len(ops)} ops, counted from 0")
    ops[index] = {**ops[index], "values": {**ops[index]["values"], **changes}}
    asked = {"txn_id": parked["txn_id"], "new_txn_id": ids(), "ops": ops, "digest": _digest(ops)}
    results = remote.operate("sync_edit_v1", asked)["results"]
    verdict: Row = results[0]
    return verdict


def conflicts(
    remote: SupabaseRemote,
    *,
    conflict_id: str | None = None,
    user_id: str | None = None,
    undecided: bool = True,
) -> list[Row]:
    """Return conflict records, oldest first; `undecided`: those that wait for a decision only."""
    asked: Row = {"limit": PAGE, "open": undecided and conflict_id is None}
    if conflict_id is not None:
        asked["id"] = _id(conflict_id, "no_such_conflict")
    if user_id is not None:
        asked["user_id"] = user_uuid(user_id)
    found: list[Row] = []
    while True:
        page = remote.operate("sync_list_conflicts_v1", asked)["conflicts"]
        found += page
        if len(page) < PAGE:
            return found
        asked |= {"after_at": page[-1]["recorded_at"], "after_id": page[-1]["id"]}


def resolve(remote: SupabaseRemote, conflict_id: str, choice: Choice) -> list[Row]:
    """Decide a conflict for one side; what waits for it goes on. Returns a verdict for each tried.

    The choice goes for all undecided records of the same transaction. When the row has moved since
    the record was made, the answer is `conflict` and the record shows the newer row.
    Raises Declined when it is decided already.
    """
    asked = {"id": _id(conflict_id, "no_such_conflict"), "choice": choice}
    results: list[Row] = remote.operate("sync_resolve_v1", asked)["results"]
    return results


def resolve_edited(
    remote: SupabaseRemote,
    conflict_id: str,
    row: Mapping[str, Any],
    *,
    ids: Callable[[], str] = new_id,
) -> list[Row]:
    """Decide a conflict with a third version: `row` holds the columns to write.

    The transaction is discarded in favour of a new one that writes them; its ops on other rows stay
    as they were.
    """
    found = conflicts(remote, conflict_id=conflict_id)
    if not found:
        raise Declined("no_such_conflict", hint="check the id with `syncer conflicts list`")
    record = found[0]
    if record["outcome"] != "manual" or record["resolved_at"] is not None:
        raise Declined("already_resolved", hint="see `syncer conflicts show`")
    parked = _parked(remote, record["txn_id"])
    ops = [
        {**item, "kind": "update", "values": dict(row)}
        if (item["table"], item["id"]) == (record["table"], record["row_id"])
        else item
        for item in parked["item"]["ops"]
    ]
    asked = {
        "id": conflict_id,
        "choice": "edited",
        "row": dict(row),
        "new_txn_id": ids(),
        "digest": _digest(ops),
    }
    results: list[Row] = remote.operate("sync_resolve_v1", asked)["results"]
    return results


def _unquoted(letter: Row) -> Row:
    quotes = (letter["sqlstate"] or "").startswith(QUOTING)
    return {**letter, "message": None} if quotes else letter


def _parked(remote: SupabaseRemote, txn_id: str) -> Row:
    """Return a parked transaction with its values; raises Declined with the reason if it isn't."""
    found = dead_letters(remote, txn_ids=[txn_id], full=True)
    if not found:
        reason = _why_not_parked(remote, _id(txn_id, "not_parked"))
        raise Declined(reason, hint="see `syncer dead-letters list`; nothing was changed")
    return found[0]


def _why_not_parked(remote: SupabaseRemote, txn_id: str) -> str:
    """Ask for an edit without content: the server names what stands against it, or refuses it."""
    try:
        remote.operate("sync_edit_v1", {"txn_id": txn_id, "ops": []})
    except Declined as told:
        return told.reason
    raise Declined("not_parked")  # an edit without content can't succeed


def _id(text: str, reason: str) -> str:
    """Return an id as the server spells it; what no id can be is declined like an unknown one."""
    known = canonical_uuid(text)
    if known is None:
        raise Declined(reason, hint=f"{text[:40]!r} is no UUID")
    return known


def _digest(ops: Sequence[Row]) -> str:
    return digest_of([WireOp(op["table"], op["kind"], op["id"], op["values"]) for op in ops])
