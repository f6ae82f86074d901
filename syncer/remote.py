"""The outside world: what the shipping half asks of a server, and Supabase as that server."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from supabase import Client

from local_store.clock import Clock, SystemClock
from local_store.ops import Row
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.core.wire import (
    Park,
    decode_parked,
    decode_reads,
    decode_verdicts,
    encode_batch,
    encode_parks,
)
from syncer.errors import RemoteUnavailable, ReplyTimedOut, ReplyUnreadable, SyncError
from syncer.settings import Settings
from syncer.transport import Call, Http, PoolUse, Threads, build_client, execute

# httpx's timeouts are per socket read: a dripping reply could hold a call for hours.
CALL_DEADLINE_S = 45.0
TRANSPORT_FAILURES_MAX = 3  # then the client is built anew: its pool may hold dead connections

# Is told the function, how long the call took in seconds, and what went wrong.
OnCall = Callable[[str, float, SyncError | None], None]


@dataclass(frozen=True, slots=True)
class TableRead:
    """One table read under the author's row-level security.

    `where` compares for equality, a list stands for any of its values, `keys_of` for the keys that
    an earlier read of the call finds. Rows come by `order_by`, ties by key, from behind `after`,
    which holds the order column and the key of a row, without those whose keys are in `but`;
    `columns` None means all. With `digest` the answer is one row {digest}: the SHA-256 in hex of
    the sorted lines "key version" of what the read finds, without a limit if that is None.
    """

    table: str
    where: Row
    order_by: str | None = None
    descending: bool = False
    limit: int | None = 1_000  # the RPC returns at most 1,001 rows
    columns: Sequence[str] | None = None
    after: Row | None = None
    but: Sequence[str] = ()
    digest: bool = False


def keys_of(number: int) -> Row:
    """Return what stands in a `where` for the keys that the call's n-th read finds, from 0."""
    return {"read": number}


SeqRange = tuple[str, int, int]
"""A log and its positions from first to last, both included."""
RANGES_PER_CALL = 500  # some ten index lookups of a millisecond each


class Remote(Protocol):
    """What the shipping half needs of a server: the real Supabase or a simulated one."""

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch; one verdict per transaction, in order. Raises SyncError."""
        ...

    def park(
        self, log_id: str, acknowledged_seq: int, parks: Sequence[Park]
    ) -> tuple[Verdict, ...]:
        """Hand transactions over until a person frees them; one verdict each. Raises SyncError."""
        ...

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read tables as `user_id`; one list of rows per read. Raises SyncError."""
        ...

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Return what the server's ledger knows of all logs, or of one with its entries."""
        ...

    def settled(self, ranges: Sequence[SeqRange]) -> list[bool]:
        """Tell of each range of positions whether all are final or parked. Raises SyncError."""
        ...


@dataclass(slots=True)
class _Line:
    """A client, what it runs on, and how many calls are on it."""

    client: Client
    http: Http
    calls: int = 0


class SupabaseRemote:
    """A Supabase project, reached with its secret key. Thread-safe; connects on first use, also in
    a forked child, which has connections of its own.

    `on_call` is told of each call in the thread that made it. A call ends with ReplyTimedOut after
    `deadline_s`, however slowly its reply comes.
    """

    def __init__(
        self,
        url: str,
        secret_key: str,
        *,
        on_call: OnCall = lambda function, took_s, error: None,
        deadline_s: float = CALL_DEADLINE_S,
        clock: Clock | None = None,
    ) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._on_call = on_call
        self._clock = clock or SystemClock()
        self._secret_key = secret_key
        self._start_afresh()
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _start_afresh(own))

    def _start_afresh(self) -> None:
        # In a forked child: on its parent's connections each would read the other's replies, which
        # may be another user's rows. They are let go of here, and stay the parent's.
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._transport_failures = 0
        self._calls: set[Call] = set()
        self._threads = Threads()

    @classmethod
    def from_settings(cls, settings: Settings, **options: Any) -> SupabaseRemote:
        """Build from settings; raises SettingsError naming what is missing."""
        return cls(*settings.require_supabase(), **options)

    def __repr__(self) -> str:
        return f"SupabaseRemote({self._url!r})"  # never the key

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch by `sync_apply_batch_v1`."""
        reply = self._call("sync_apply_batch_v1", {"p_batch": encode_batch(batch)})
        return decode_verdicts(batch, reply)

    def park(
        self, log_id: str, acknowledged_seq: int, parks: Sequence[Park]
    ) -> tuple[Verdict, ...]:
        """Hand transactions over by `sync_park_v1`."""
        reply = self._call("sync_park_v1", {"p": encode_parks(log_id, acknowledged_seq, parks)})
        return decode_parked(parks, reply)

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read tables by `sync_read_v1`, which switches to the user's role."""
        asked = [
            {
                "table": read.table,
                "where": read.where,
                "order_by": read.order_by,
                "descending": read.descending,
                "limit": read.limit,
                "columns": read.columns,
                "after": read.after,
                "but": list(read.but),
                "digest": read.digest,
            }
            for read in reads
        ]
        reply = self._call("sync_read_v1", {"p": {"user_id": user_id, "reads": asked}}, timeout_s)
        return decode_reads(reply, reads)

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Ask `sync_audit_v1`."""
        p: Row = {}
        if log_id is not None:
            p = {"log_id": log_id, "after_seq": after_seq, "limit": limit}
        reply = self._call("sync_audit_v1", {"p": p})
        if not isinstance(reply, dict) or not isinstance(reply.get("logs"), list):
            raise ReplyUnreadable("the audit's reply carries no logs", hint="ask again")
        return reply

    def settled(self, ranges: Sequence[SeqRange]) -> list[bool]:
        """Ask `sync_settled_v1`, at most 500 ranges to a call."""
        found: list[bool] = []
        for start in range(0, len(ranges), RANGES_PER_CALL):
            asked = [list(item) for item in ranges[start : start + RANGES_PER_CALL]]
            reply = self._call("sync_settled_v1", {"p": {"ranges": asked}})
            told = reply.get("settled") if isinstance(reply, dict) else None
            if not isinstance(told, list) or len(told) != len(asked):
                raise ReplyUnreadable("the reply doesn't answer for each range", hint="ask again")
            found += [item is True for item in told]
        return found

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Take or renew a lease for a time, or give it back with 0; tells whether it is held."""
        reply = self.operate("sync_lease_v1", {"name": name, "holder": holder, "seconds": seconds})
        return reply.get("held") is True

    def canary(self) -> list[str]:
        """Return the tables of which a reserved user sees rows that aren't its own: none, if
        row-level security holds.
        """
        visible = self.operate("sync_canary_v1", {}).get("visible")
        if not isinstance(visible, list):
            raise ReplyUnreadable("the canary's reply names no tables", hint="ask again")
        return [str(table) for table in visible]

    def prune(self, retention_s: float) -> int:
        """Let the server forget final transactions older than `retention_s`; returns how many."""
        reply = self._call("sync_prune_v1", {"p": {"retention_s": retention_s}})
        if not isinstance(reply, dict) or not isinstance(reply.get("pruned"), int):
            raise ReplyUnreadable("the reply doesn't say what was pruned", hint="ask again")
        return int(reply["pruned"])

    def doctor(self) -> Row:
        """Return the server's facts that `syncer doctor` judges."""
        reply = self._call("sync_doctor_v1", {"p": {}})
        if not isinstance(reply, dict):
            raise ReplyUnreadable("the doctor's reply is no object", hint="ask again")
        return reply

    def operate(self, function: str, p: Row) -> Row:
        """Call one of the operators' RPCs, such as `sync_retry_v1`; returns its document."""
        reply = self._call(function, {"p": p})
        if not isinstance(reply, dict):
            raise ReplyUnreadable(f"the reply of {function} is no object", hint="ask again")
        return reply

    def pool_use(self) -> PoolUse:
        """Tell how the connections to Supabase are used now."""
        line = self._line
        return PoolUse(0, 0) if line is None else line.http.pool_use()

    def give_up_calls(self) -> None:
        """Let every call under way end now with an unknown outcome, for a shutdown in time."""
        for call in tuple(self._calls):
            call.give_up()

    def close(self) -> None:
        """Let go of the connections; the next call opens new ones.

        They are closed when the last call on them ends: other threads may be in the middle of one.
        """
        with self._lock:
            line, self._line = self._line, None
            is_free = line is not None and line.calls == 0
        if line is not None and is_free:
            line.http.close()

    def _call(self, function: str, params: Row, timeout_s: float | None = None) -> Any:
        deadline_s = self._deadline_s if timeout_s is None else timeout_s
        line = self._enter()
        call = Call(lambda: execute(line.client, function, params), self._threads)
        self._calls.add(call)
        began, error = self._clock.monotonic(), None
        try:
            reply = call.wait(deadline_s)
        except SyncError as failed:
            error = failed
            if isinstance(error, RemoteUnavailable | ReplyTimedOut | ReplyUnreadable):
                self._count_failure()
            raise
        finally:
            self._calls.discard(call)
            self._leave(line)
            self._on_call(function, self._clock.monotonic() - began, error)
        self._transport_failures = 0
        return reply

    def _count_failure(self) -> None:
        self._transport_failures += 1
        if self._transport_failures >= TRANSPORT_FAILURES_MAX:
            self._transport_failures = 0
            self.close()

    def _enter(self) -> _Line:
        with self._lock:
            if self._line is None:
                self._line = _Line(*build_client(self._url, self._secret_key))
            self._line.calls += 1
            return self._line

    def _leave(self, line: _Line) -> None:
        with self._lock:
            line.calls -= 1
            is_last = line is not self._line and line.calls == 0
        if is_last:
            line.http.close()


def _start_afresh(own: weakref.ref[SupabaseRemote]) -> None:
    remote = own()
    if remote is not None:
        remote._start_afresh()
