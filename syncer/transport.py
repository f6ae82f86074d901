"""One call to Supabase: the client, its timeouts, and what every way of failing means.

supabase-py's default client speaks HTTP/2, follows redirects and accepts any 2xx body, and each of
the three loses or doubles writes silently. This one is handed an HTTP/1.1 client that never follows
a redirect, whose response hook turns everything but a JSON 2xx into an error of ours.
"""

from __future__ import annotations

import _thread
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import httpx
import postgrest
from supabase import Client, create_client
from supabase.lib.client_options import SyncClientOptions

from local_store.clock import SystemClock
from local_store.ops import Row
from syncer.core.failures import FailedReply, error_for, error_for_exception, retry_after_s
from syncer.errors import (
    Declined,
    ProtocolMismatch,
    ReplyTimedOut,
    ReplyUnreadable,
    SettingsError,
    SyncError,
)

CONNECT_TIMEOUT_S = 5.0
# Above the RPC's own statement_timeout (20 s), so that the server gives up first and says so; below
# the hosted gateway's cap of 60 s.
READ_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 8
IDLE_S = 10.0  # a thread that waits costs nothing but its stack; a quiet process needs none
FETCH_TIMEOUT_S = 3.0  # a small public document; somebody waits for it
DECLINED_CODE = "SYP02"
DECLINED_HINTS = {
    "already_applied": "it took effect; change the row itself instead",
    "already_discarded": "it was given up before; nothing was changed",
    "already_resolved": "somebody decided it before; see `syncer conflicts show`",
    "superseded": "its author deleted the row meanwhile; nothing is left to do",
    "not_parked": "check the id with `syncer dead-letters list`",
    "no_such_conflict": "check the id with `syncer conflicts list`",
    "row_is_gone": "the row was deleted: take theirs, or write a new row",
}


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How many connections are open, how many of them carry a call, and how many there may be."""

    open: int
    busy: int
    limit: int = CONNECTIONS_MAX


class Http(httpx.Client):
    """An HTTP/1.1 client that follows no redirect and can tell how its connections are used."""

    def __init__(self, timeout: httpx.Timeout) -> None:
        limits = httpx.Limits(max_connections=CONNECTIONS_MAX)
        self._wire = httpx.HTTPTransport(http2=False, retries=1, limits=limits)
        super().__init__(transport=self._wire, timeout=timeout, follow_redirects=False)

    def pool_use(self) -> PoolUse:
        """Count the connections at this moment."""
        known = [found for found in self._wire._pool.connections if not found.is_closed()]
        return PoolUse(len(known), sum(not found.is_idle() for found in known))


def build_client(url: str, key: str) -> tuple[Client, Http]:
    """Return a client and what it runs on; raises SettingsError for a malformed URL or key."""
    http = Http(
        httpx.Timeout(
            connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S, read=READ_TIMEOUT_S, pool=5.0
        )
    )
    http.event_hooks = {"response": [_require_json_success]}
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


def execute(client: Client, function: str, params: Row) -> Any:
    """Make one call; every way it can fail becomes a SyncError that names no secret."""
    try:
        return client.rpc(function, params).execute().data
    except SyncError:
        raise
    except (httpx.HTTPError, postgrest.APIError, ValueError) as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        inner = error.__cause__ or error.__context__
        text = "SSL" if isinstance(inner, ssl.SSLError) else str(error)
        raise error_for_exception(names, text) from None


def fetch_public(url: str, *, bytes_max: int, deadline_s: float) -> bytes:
    """Get a small document that needs no key; raises SyncError, also when it is over `bytes_max`.

    Blocks up to `deadline_s`, however slowly the bytes come.
    """
    body: bytes = Call(lambda: _fetch(url, bytes_max), Threads(0)).wait(deadline_s)
    return body


def _fetch(url: str, bytes_max: int) -> bytes:
    # Unpacking a packed body could make a thousand bytes of one, so none is asked for or unpacked.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    try:
        with Http(httpx.Timeout(FETCH_TIMEOUT_S)) as http:
            with http.stream("GET", url, headers=headers) as response:
                if response.status_code == httpx.codes.NOT_FOUND:
                    raise ProtocolMismatch("Supabase has no such document")
                if response.status_code != httpx.codes.OK:
                    raise error_for(FailedReply(response.status_code))
                body = b""
                for part in response.iter_raw():
                    body += part
                    if len(body) > bytes_max:
                        raise ReplyUnreadable(f"the document is over {bytes_max} bytes")
                return body
    except httpx.HTTPError as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        raise error_for_exception(names, str(error)) from None


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
    if body.get("code") == DECLINED_CODE:
        reason = str(body.get("message"))
        raise Declined(reason, hint=DECLINED_HINTS.get(reason, "nothing was changed"))
    raise error_for(
        FailedReply(
            status=response.status_code,
            code=str(body.get("code") or ""),
            message=str(body.get("message") or ""),
            retry_after_s=retry_after_s(response.headers.get("retry-after"), SystemClock().now()),
        )
    )


def _json_object(response: httpx.Response) -> Row:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


class Threads:
    """Threads that make calls. One that is idle is taken again: beside other threads that compute,
    starting one takes half a millisecond. Idle for `idle_s`, it ends.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Callable[[], None]]] = []

    def run(self, work: Callable[[], None]) -> None:
        """Begin `work`, which never raises, in a thread; doesn't wait for it."""
        with self._lock:
            known = self._idle.pop() if self._idle else None
        orders: SimpleQueue[Callable[[], None]] = known or SimpleQueue()
        orders.put(work)
        if known is None:
            # Not threading.Thread: its start() waits for ever when the thread finds no memory to
            # begin (github.com/python/cpython/issues/140746; may go with a release that mends it).
            _thread.start_new_thread(self._serve, (orders,))

    def _serve(self, orders: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            try:
                orders.get(timeout=self._idle_s)()
            except Empty:
                with self._lock:
                    if orders in self._idle:
                        self._idle.remove(orders)
                        return
                continue  # an order is on its way
            with self._lock:
                self._idle.append(orders)


class Call:
    """One call in another thread, with an overall deadline.

    That costs ~30 µs beside a network round trip, and it is the only bound that holds against a
    reply that drips. A call given up goes on to its own end and nobody reads its outcome.
    """

    def __init__(self, call: Callable[[], Any], threads: Threads) -> None:
        self._threads = threads
        self._call = call
        self._done = threading.Event()
        self._outcome: Any = None
        self._failure: BaseException | None = None

    def wait(self, deadline_s: float) -> Any:
        """Run the call and return its outcome; raises ReplyTimedOut when the time is over."""
        self._threads.run(self._run)
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
