"""The outside world: the one module that speaks to Supabase.

supabase-py's default client speaks HTTP/2, follows redirects and accepts any 2xx body, and each of
the three loses or doubles writes silently. This one is handed an HTTP/1.1 client that never follows
a redirect, whose response hook turns everything but a JSON 2xx into an error of ours.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import postgrest
from supabase import Client, create_client
from supabase.lib.client_options import SyncClientOptions

from local_store.ops import Row
from syncer.core.batch import Batch
from syncer.core.failures import FailedReply, error_for
from syncer.core.verdict import Verdict
from syncer.core.wire import decode_reads, decode_verdicts, encode_batch
from syncer.errors import (
    NotAuthorized,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SettingsError,
    SyncError,
)
from syncer.settings import Settings

CONNECT_TIMEOUT_S = 5.0
# Above the RPC's own statement_timeout (20 s), so that the server gives up first and says so; below
# the hosted gateway's cap of 60 s.
READ_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 10.0
# httpx's timeouts are per socket read: a dripping reply could hold a call for hours.
CALL_DEADLINE_S = 45.0
CONNECTIONS_MAX = 8
TRANSPORT_FAILURES_MAX = 3  # then the client is built anew: its pool may hold dead connections


@dataclass(frozen=True, slots=True)
class TableRead:
    """One table read under the author's row-level security; `where` compares for equality."""

    table: str
    where: Row
    order_by: str | None = None
    descending: bool = False
    limit: int = 1_000  # the hosted max_rows; the RPC caps it there too


class Remote(Protocol):
    """What the shipping half needs of a server: the real Supabase or a simulated one."""

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch; one verdict per transaction, in order. Raises SyncError."""
        ...

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read tables as `user_id`; one list of rows per read. Raises SyncError."""
        ...

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Return what the server's ledger knows of all logs, or of one with its entries."""
        ...


class SupabaseRemote:
    """A Supabase project, reached with its secret key. Thread-safe; connects on first use."""

    def __init__(self, url: str, secret_key: str) -> None:
        self._url = url
        self._secret_key = secret_key
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._http: httpx.Client | None = None
        self._transport_failures = 0
        self._calls: set[_Call] = set()

    @classmethod
    def from_settings(cls, settings: Settings) -> SupabaseRemote:
        """Build from settings; raises SettingsError naming what is missing."""
        return cls(*settings.require_supabase())

    def __repr__(self) -> str:
        return f"SupabaseRemote({self._url!r})"  # never the key

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch by `sync_apply_batch_v1`."""
        reply = self._call("sync_apply_batch_v1", {"p_batch": encode_batch(batch)})
        return decode_verdicts(batch, reply)

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

    def give_up_calls(self) -> None:
        """Let every call under way end now with an unknown outcome, for a shutdown in time."""
        for call in tuple(self._calls):
            call.give_up()

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        with self._lock:
            http, self._client, self._http = self._http, None, None
        if http is not None:
            http.close()

    def _call(self, function: str, params: Row, timeout_s: float | None = None) -> Any:
        deadline_s = CALL_DEADLINE_S if timeout_s is None else timeout_s
        client = self._connected()
        call = _Call(lambda: _execute(client, function, params))
        self._calls.add(call)
        try:
            reply = call.wait(deadline_s)
        except SyncError as error:
            if isinstance(error, RemoteUnavailable | ReplyTimedOut | ReplyUnreadable):
                self._count_failure()
            raise
        finally:
            self._calls.discard(call)
        self._transport_failures = 0
        return reply

    def _count_failure(self) -> None:
        self._transport_failures += 1
        if self._transport_failures >= TRANSPORT_FAILURES_MAX:
            self._transport_failures = 0
            self.close()

    def _connected(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client, self._http = _build_client(self._url, self._secret_key)
            return self._client


def _build_client(url: str, key: str) -> tuple[Client, httpx.Client]:
    limits = httpx.Limits(max_connections=CONNECTIONS_MAX)
    http = httpx.Client(
        transport=httpx.HTTPTransport(http2=False, retries=1, limits=limits),
        timeout=httpx.Timeout(
            connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S, read=READ_TIMEOUT_S, pool=5.0
        ),
        follow_redirects=False,
        event_hooks={"response": [_require_json_success]},
    )
    options = SyncClientOptions(
        httpx_client=http,
        auto_refresh_token=False,
        persist_session=False,
        postgrest_client_retry=False,
    )
    try:
        return create_client(url, key, options=options), http
    except Exception as error:
        http.close()
        # supabase-py checks only the form of URL and key here, and says which of them it disliked.
        setting = "SUPABASE_URL" if "url" in str(error).lower() else "SUPABASE_SECRET_KEY"
        raise SettingsError(
            setting, "isn't accepted by supabase-py", hint="copy it again from the project"
        ) from None


def _execute(client: Client, function: str, params: Row) -> Any:
    """Make one call; every way it can fail becomes a SyncError that names no secret."""
    try:
        return client.rpc(function, params).execute().data
    except SyncError:
        raise
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        if isinstance(error.__cause__ or error.__context__, ssl.SSLError) or "SSL" in str(error):
            raise NotAuthorized(
                "the TLS connection to Supabase failed", hint="check SUPABASE_URL and certificates"
            ) from None
        raise RemoteUnavailable(
            f"Supabase can't be reached ({type(error).__name__})", hint="everything is kept"
        ) from None
    except httpx.TimeoutException as error:
        raise ReplyTimedOut(
            f"no reply from Supabase in time ({type(error).__name__})",
            hint="the outcome is unknown; the same ids are resent",
        ) from None
    except (httpx.HTTPError, postgrest.APIError, ValueError) as error:
        raise ReplyUnreadable(
            f"no usable reply from Supabase ({type(error).__name__})",
            hint="the outcome is unknown; the same ids are resent",
        ) from None


def _require_json_success(response: httpx.Response) -> None:
    """Raise our error for everything but a JSON 2xx, while status and headers are still at hand."""
    response.read()
    is_json = "json" in response.headers.get("content-type", "")
    if response.is_success and is_json:
        return
    if response.is_success:
        raise ReplyUnreadable(
            f"Supabase answered {response.status_code} without JSON",
            hint="a gateway or captive portal may stand between; the same ids are resent",
        )
    body = _json_object(response) if is_json else {}
    raise error_for(
        FailedReply(
            status=response.status_code,
            code=str(body.get("code") or ""),
            message=str(body.get("message") or ""),
            retry_after_s=_retry_after_s(response.headers.get("retry-after")),
        )
    )


def _json_object(response: httpx.Response) -> Row:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _retry_after_s(header: str | None) -> float | None:
    """Read Retry-After in seconds; an HTTP date counts as `asked, but for how long is unknown`."""
    if header is None:
        return None
    try:
        return float(header)
    except ValueError:
        return 0.0


class _Call:
    """One call in a thread of its own, with an overall deadline.

    A thread per call costs ~50 µs beside a network round trip, and it is the only bound that holds
    against a reply that drips. A call given up goes on to its own end and nobody reads its outcome.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._done = threading.Event()
        self._outcome: Any = None
        self._failure: BaseException | None = None

    def wait(self, deadline_s: float) -> Any:
        """Run the call and return its outcome; raises ReplyTimedOut when the time is over."""
        threading.Thread(target=self._run, name="syncer-call", daemon=True).start()
        if not self._done.wait(deadline_s):
            self.give_up()
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def give_up(self) -> None:
        """Let the waiting thread go on, with an unknown outcome."""
        self._failure = ReplyTimedOut(
            "no complete reply in time", hint="the outcome is unknown; the same ids are resent"
        )
        self._done.set()

    def _run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._done.set()
