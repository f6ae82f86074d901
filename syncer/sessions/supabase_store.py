"""Sessions straight to Supabase: no buffer, no copy, an answer only from the server.

A write is one transaction of the same batch RPC that drains buffers: it takes effect under its
author's row-level security, compares and sets on the versions that were read, and is remembered
under its txn_id, so that a lost reply is sent again without a second effect. While Supabase can't
be asked nothing works; BufferedSessionStore is for that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from local_store import InvalidWrite, Op, Row, TransactionIdReused, user_uuid
from local_store.clock import Clock, new_id
from local_store.door import DoorLimits, accept
from local_store.ops import PendingTransaction, WireOp, by_name
from syncer.core.verdict import Verdict
from syncer.errors import OutcomeUnknown, ProtocolMismatch, Refused, Throttled
from syncer.remote import Remote, TableRead
from syncer.sessions.aggregate import SessionRows, assemble, snapshot_of
from syncer.sessions.cursor import after_cursor, cursor_of
from syncer.sessions.direct_log import DirectLog
from syncer.sessions.models import SessionStatus
from syncer.sessions.row_store import RowSessionStore, Traces
from syncer.sessions.server_reads import stretch_of, whole_sessions
from syncer.sessions.store_api import RequestKey, SessionPage
from syncer.sessions.tables import SESSION_TABLES, SESSIONS

NEVER = "0001-01-01T00:00:00+00:00"  # a version that no row ever had
GONE = ("02000", "23503")  # the row, or the parent of a new one, isn't there
LOCKED, TXN_ID_TAKEN, HIDDEN = "55P03", "SYT01", "42501"


class SupabaseSessionStore(RowSessionStore):
    """One user's sessions in Supabase, without a buffer between. Thread-safe.

    What can't be asked or sent raises the remote's SyncError: NotSent and Refused had no effect;
    OutcomeUnknown may have had, and is safe to repeat with the same `request`. Each object that
    writes has a log of its own in audits: keep one per user and process, not one per call.
    """

    def __init__(
        self,
        remote: Remote,
        user_id: str,
        *,
        clock: Clock | None = None,
        ids: Callable[[], str] = new_id,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(user_id, clock, ids)
        self._remote = remote
        self._author = user_uuid(user_id)
        self._tables = by_name(SESSION_TABLES)
        jitter = jitter or random.SystemRandom().random
        self._log = DirectLog(remote, self._clock, ids, jitter)

    def knows(self, request: RequestKey) -> bool:
        """Tell whether the key was used before, for whatever."""
        [verdict] = self._log.ask([self._asks_for(request.txn_id)])
        return verdict.kind != "held"

    # -- what the base asks for -------------------------------------------------------------------

    def _found(self, session_id: str) -> SessionRows | None:
        return next(iter(whole_sessions(self._ask, [session_id])), None)

    def _commit(
        self, ops: Sequence[Op], current: SessionRows | None, request: RequestKey | None
    ) -> bool:
        accepted = accept(ops, self._tables, self._author, DoorLimits())
        rows = [] if current is None else current.all()
        versions = {(table, row["id"]): row["updated_at"] for table, row in rows}
        transaction = self._transaction(
            self._ids() if request is None else request.txn_id,
            accepted.ops,
            [versions.get((op.table, op.id)) for op in accepted.ops],
            digest=accepted.digest,
            children={f"{t}/{i}": version for (t, i), version in versions.items() if t != SESSIONS},
        )
        return _took_effect(self._log.send(transaction), accepted.ops)

    def _traces(self, request: RequestKey, session_id: str) -> Traces:
        known, there = self._log.ask([self._asks_for(request.txn_id), self._looks_for(session_id)])
        return Traces(known=known.kind != "held", was_here=there.kind == "conflict")

    def _list(
        self, status: SessionStatus | None, limit: int | None, cursor: str | None
    ) -> SessionPage:
        found = stretch_of(self._ask, status, limit, after_cursor(cursor), ("id", "created_at"))
        sessions = [
            assemble(rows.session["id"], snapshot_of(rows))
            for rows in whole_sessions(self._ask, [row["id"] for row in found.rows])
            if status in (None, rows.session["status"])
        ]
        return SessionPage(sessions, True, cursor_of(found.rows[-1]) if found.more else None)

    # -- the server -------------------------------------------------------------------------------

    def _ask(self, reads: Sequence[TableRead]) -> list[list[Row]]:
        return self._remote.read(self._author, reads)

    def _transaction(
        self,
        txn_id: str,
        ops: Sequence[WireOp],
        bases: Sequence[str | None],
        *,
        digest: str = "",
        after: tuple[str, ...] = (),
        children: Mapping[str, str | None] | None = None,
    ) -> PendingTransaction:
        """Build a transaction; `children` go along if it deletes the session."""
        ends = [(op.table, op.kind) == (SESSIONS, "delete") for op in ops]
        return PendingTransaction(
            seq=0,  # given by the log
            txn_id=txn_id,
            user_id=self._author,
            digest=digest,
            accepted_at=self._now(),
            ops=tuple(ops),
            bases=tuple(bases),
            chained=(False,) * len(ops),
            after=after,
            size_bytes=0,
            attempts=0,
            position=0,
            log_id="",
            before=(None,) * len(ops),
            children=tuple(children if end else None for end in ends),
        )

    def _asks_for(self, txn_id: str) -> PendingTransaction:
        """Make the question whether a txn_id is in the ledger: it waits for itself, so for ever."""
        return self._transaction(txn_id, (), (), after=(txn_id,))

    def _looks_for(self, session_id: str) -> PendingTransaction:
        """Make the question whether a session is or was there: no row has ever its base."""
        op = WireOp(SESSIONS, "update", session_id, {"status": "active"})
        return self._transaction(self._ids(), (op,), (NEVER,))


def _took_effect(verdict: Verdict, ops: Sequence[WireOp]) -> bool:
    """Tell whether the transaction is applied; False when a row wasn't as it was read."""
    match verdict.kind:
        case "applied" | "duplicate":
            return True
        case "conflict":
            return False
        case "held":
            return _waits_for_nothing(verdict)
        case "rejected":
            return _is_hidden(verdict, ops)
        case "parked":
            raise Refused(
                f"the transaction is parked on the server ({verdict.state})",
                hint="see `syncer dead-letters show`",
            )
        case "fenced":
            raise OutcomeUnknown(
                "the ledger no longer remembers this transaction", hint="read, then repeat"
            )
        case _:  # pragma: no cover - the type checker proves that nothing is left
            assert_never(verdict.kind)


def _waits_for_nothing(verdict: Verdict) -> bool:
    """Return False when the row is gone; raise what else a held verdict means for a caller."""
    if verdict.sqlstate in GONE:
        return False
    if verdict.sqlstate == LOCKED:
        raise Throttled("a row of the session is locked on the server", hint="try again")
    raise ProtocolMismatch(
        f"the server's tables aren't as this version knows them ({verdict.sqlstate})",
        hint="run `syncer migrate`",
    )


def _is_hidden(verdict: Verdict, ops: Sequence[WireOp]) -> bool:
    """Return False when the row is somebody else's; raise what else a refusal means."""
    if verdict.sqlstate == HIDDEN:
        return False
    if verdict.sqlstate == TXN_ID_TAKEN:
        raise TransactionIdReused(verdict.txn_id)
    # Never the server's message: it may quote the value.
    op = ops[verdict.op or 0]
    raise InvalidWrite(op.table, "values", f"were refused by the server ({verdict.sqlstate})")
