"""The protocol: a batch as JSON, a reply as verdicts. Nothing that doesn't fit is believed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from local_store.ops import PendingTransaction, Row
from syncer.core.batch import Batch
from syncer.core.verdict import PARKED_STATES, VERDICT_KINDS, Verdict
from syncer.errors import ProtocolMismatch, ReplyUnreadable

PROTOCOL = 1
INT_MIN, UINT_MAX = -(2**63), 2**64 - 1  # what the buffer's JSON can hold as an integer
FLOAT_MAX = int(sys.float_info.max)
CHAINED = "chained"
"""The base of an op whose row was changed earlier by the same log and not confirmed yet.

It holds only while both were put on the same ground (`met`): one sent before a merge that its
predecessor went through since is a conflict.
"""


@dataclass(frozen=True, slots=True)
class Park:
    """A transaction handed over to the server until a person or an event frees it.

    `state` says why: refused by the data (`dead`), a conflict that its policy leaves to a person,
    or held behind either. `cause` is the verdict's evidence, `records` the conflict records.
    """

    transaction: PendingTransaction
    state: Literal["dead", "conflict", "held"]
    sqlstate: str | None = None
    op: int | None = None
    message: str | None = None
    blocked_by: str | None = None
    records: tuple[Row, ...] = field(default=())


def encode_parks(log_id: str, acknowledged_seq: int, parks: Sequence[Park]) -> Row:
    """Return the argument of `sync_park_v1`."""
    return {
        "log_id": log_id,
        "acknowledged_seq": acknowledged_seq,
        "parks": [
            {
                "transaction": {
                    **_encode_transaction(park.transaction),
                    "before": list(park.transaction.before),
                },
                "state": park.state,
                "sqlstate": park.sqlstate,
                "op": park.op,
                "message": park.message,
                "blocked_by": park.blocked_by,
                "records": list(park.records),
            }
            for park in parks
        ],
    }


def encode_batch(batch: Batch) -> Row:
    """Return the argument of `sync_apply_batch_v1`."""
    return {
        "protocol": PROTOCOL,
        "log_id": batch.log_id,
        "acknowledged_seq": batch.acknowledged_seq,
        "transactions": [_encode_transaction(item) for item in batch.transactions],
    }


def _encode_transaction(transaction: PendingTransaction) -> Row:
    ops: list[Row] = []
    for op, base, chained, children in zip(
        transaction.ops,
        transaction.bases,
        transaction.chained,
        transaction.children,
        strict=True,
    ):
        encoded = op.to_json()
        if op.kind != "insert":
            encoded["base"] = CHAINED if chained else base
        if children is not None:
            encoded["children"] = dict(children)
        ops.append(encoded)
    return {
        "txn_id": transaction.txn_id,
        "seq": transaction.seq,
        "user_id": transaction.user_id,
        "digest": transaction.digest,
        "accepted_at": transaction.accepted_at,
        "after": list(transaction.after),
        "met": {name: version for name, version in transaction.met.items() if version is not None},
        "replaces": None,
        "records": [record for record in transaction.records if record["outcome"] != "manual"],
        "ops": ops,
    }


def decode_parked(parks: Sequence[Park], reply: object) -> tuple[Verdict, ...]:
    """Return one verdict per transaction handed over; raises ReplyUnreadable otherwise."""
    return _verdicts([park.transaction.txn_id for park in parks], reply)


def decode_verdicts(batch: Batch, reply: object) -> tuple[Verdict, ...]:
    """Return exactly one verdict per transaction sent, in order; raises ReplyUnreadable otherwise.

    A gateway may answer 200 with a login page, an empty body or somebody else's reply. Believing it
    would count transactions as delivered that never were, so anything but a perfect fit means that
    the outcome is unknown and the same ids go out again.
    """
    return _verdicts([transaction.txn_id for transaction in batch.transactions], reply)


def _verdicts(expected: list[str], reply: object) -> tuple[Verdict, ...]:
    items = reply.get("verdicts") if isinstance(reply, Mapping) else None
    if not isinstance(items, list):
        raise ReplyUnreadable("the reply carries no list of verdicts", hint="will be resent")
    found = [item.get("txn_id") if isinstance(item, Mapping) else None for item in items]
    if found != expected:
        raise ReplyUnreadable(
            f"{len(found)} verdicts for {len(expected)} transactions, or not the same ids",
            hint="will be resent",
        )
    return tuple(_decode_verdict(item) for item in items)


def _decode_verdict(item: Mapping[str, Any]) -> Verdict:
    kind = item.get("verdict")
    if kind not in VERDICT_KINDS:
        raise ProtocolMismatch(
            f"the server gave the verdict {str(kind)[:40]!r}, which this version doesn't know",
            hint="update the workers before the migrations; nothing is lost",
        )
    if kind == "parked" and item.get("state") not in PARKED_STATES:
        raise ProtocolMismatch(
            f"the server parked a transaction as {str(item.get('state'))[:40]!r}, which this"
            " version doesn't know",
            hint="update the workers before the migrations; nothing is lost",
        )
    parts = [item.get(name) or {} for name in ("versions", "rows", "met", "defaults")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ReplyUnreadable("a verdict carries malformed versions or rows", hint="will be resent")
    versions, rows, met, defaults = parts
    return Verdict(
        txn_id=item["txn_id"],
        kind=kind,
        state=item.get("state"),
        versions=dict(versions),
        rows=_with_floats(dict(rows)),
        met=dict(met),
        defaults=_with_floats(dict(defaults)),
        blocked_by=item.get("blocked_by"),
        op=item.get("op"),
        sqlstate=item.get("sqlstate"),
        message=item.get("message"),
    )


def decode_reads(reply: object, reads: Sequence[object]) -> list[list[Row]]:
    """Return one list of rows per table read; raises ReplyUnreadable when the reply doesn't fit."""
    items = reply.get("reads") if isinstance(reply, Mapping) else None
    if not isinstance(items, list) or len(items) != len(reads):
        raise ReplyUnreadable("the reply doesn't answer each read", hint="ask again")
    for rows in items:
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ReplyUnreadable("a read's reply isn't a list of rows", hint="ask again")
    return [[_with_floats(dict(row)) for row in rows] for rows in items]


def _with_floats(document: Row) -> Row:
    """Make floats again of integers beyond 64 bits, in place.

    No such integer is ever accepted, but jsonb writes a float as large as 1e23 out as one, and the
    buffer couldn't keep it. A number beyond a float's range, which only SQL can bring, becomes the
    largest float: it must not stop the rows of others.
    """
    stack: list[Any] = [document]
    while stack:
        node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                stack.append(value)
            elif isinstance(value, int) and not INT_MIN <= value <= UINT_MAX:
                node[key] = float(min(max(value, -FLOAT_MAX), FLOAT_MAX))
    return document
