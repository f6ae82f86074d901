"""What the fault proxy was told to do and what it did, and the HTTP API to tell and to ask.

`FaultPlan` is the one meeting point of the proxy's event loop and of everybody who steers it;
every method takes its lock for microseconds. The control API is a door to it for curl:

    GET /faults      what is in force             PUT /fault    {"fault": {...}, "matching": ""}
    GET /log         what each request met        POST /next    {"fault": {...}, "times": 1}
    DELETE /fault    no more faults               PUT /mix      {"seed": 7, "rate": 0.3}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from http.client import responses
from typing import Any

import h11
from pydantic import TypeAdapter, ValidationError

from syncer.testkit.faults import (
    AnyFault,
    Fault,
    FaultMix,
    InvalidFault,
    Mode,
    Refuse,
    applies,
    canned,
    decide,
    matches,
)

_log = logging.getLogger(__name__)

log_entries_max = 100_000  # about 50 MB: a day's outage in a test, yet no leak in a long one
times_max = 1_000_000
# A head beyond this is an attack or a bug; the hosted gateway stops at 16 KB.
head_bytes_max = 256 * 1024
read_bytes = 64 * 1024  # one socket read; the size of a pipe's buffer


@dataclass(frozen=True)
class LogEntry:
    """One request: what it met, what upstream did about it, what the client got.

    In postgres mode a request is a statement (QUERY, EXECUTE) or a new connection (CONNECT),
    `path` is its SQL, and `upstream_status` is the command tag or "ERROR <sqlstate>".
    """

    number: int
    method: str
    path: str
    fault: Fault | None
    decided_by: str  # "", "next", "set" or "mix seed=… n=…"
    forwarded: int = 0  # how often upstream got it whole
    request_bytes: int = 0  # how much of it upstream got, over all copies
    upstream_status: int | str | None = None  # of the last copy
    client_got: str | None = None  # None: not settled yet

    def as_dict(self) -> dict[str, object]:
        """Return the entry as a JSON document."""
        fault = None if self.fault is None else dump_fault(self.fault)
        return {**self.__dict__, "fault": fault}


@dataclass(frozen=True)
class _Order:
    """A fault ordered for requests that contain `matching`; `times` None means until cleared."""

    fault: Fault
    matching: str
    times: int | None = None

    def meets(self, method: str, path: str) -> bool:
        return matches(self.matching, method, path) and applies(self.fault, method, path)


class FaultPlan:
    """The faults in force and the log. Safe to use from any thread.

    Precedence: `next` orders, oldest first; then the fault `set`; then the mix.
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._changed = threading.Condition()
        self._next: list[_Order] = []
        self._fixed: _Order | None = None
        self._mix: FaultMix | None = None
        self._mix_count = 0
        self._numbers = 0
        self._log: deque[LogEntry] = deque(maxlen=log_entries_max)

    def set(self, fault: Fault | None, matching: str = "") -> None:
        """Put `fault` in force until changed; None lifts the one set before."""
        if fault is not None:
            self._must_exist_here(fault)
            if isinstance(fault, Refuse) and matching:
                raise InvalidFault("refuse closes the port to everybody; it takes no matching")
        with self._changed:
            self._fixed = None if fault is None else _Order(fault, matching)

    def next(self, fault: Fault, times: int = 1, matching: str = "") -> None:
        """Let the next `times` requests whose "METHOD path" contains `matching` meet `fault`."""
        self._must_exist_here(fault)
        if isinstance(fault, Refuse):
            raise InvalidFault("refuse closes the port, it can't meet single requests; use set")
        if not 1 <= times <= times_max:
            raise InvalidFault(f"times must be between 1 and {times_max}, not {times}")
        with self._changed:
            self._next.append(_Order(fault, matching, times))

    def mix(self, mix: FaultMix | None) -> None:
        """Draw faults from `mix`, counting matching requests from 1; None ends it."""
        for fault, _ in () if mix is None else mix.faults:
            self._must_exist_here(fault)
        with self._changed:
            self._mix, self._mix_count = mix, 0

    def clear(self) -> None:
        """Lift every fault; requests held back stay held, the log stays."""
        with self._changed:
            self._next, self._fixed, self._mix = [], None, None

    def _must_exist_here(self, fault: Fault) -> None:
        if self._mode not in fault.wires:
            raise InvalidFault(f"{fault.kind} does not exist in {self._mode} mode")

    @property
    def refusing(self) -> bool:
        """Whether the port must be closed."""
        with self._changed:
            return self._fixed is not None and isinstance(self._fixed.fault, Refuse)

    def admit(self, method: str, path: str) -> LogEntry:
        """Number a request that arrived, decide what it meets and log both."""
        with self._changed:
            fault, decided_by = self._decide(method, path)
            self._numbers += 1
            entry = LogEntry(self._numbers, method, path, fault, decided_by)
            self._log.append(entry)
        if fault is not None:
            _log.info("#%d %s %s meets %r (%s)", entry.number, method, path, fault, decided_by)
        return entry

    def _decide(self, method: str, path: str) -> tuple[Fault | None, str]:
        for index, order in enumerate(self._next):
            if order.meets(method, path):
                left = (order.times or 1) - 1
                self._next[index : index + 1] = [replace(order, times=left)] if left else []
                return order.fault, "next"
        if self._fixed is not None and self._fixed.meets(method, path):
            return self._fixed.fault, "set"
        if self._mix is not None and matches(self._mix.matching, method, path):
            self._mix_count += 1
            fault = decide(self._mix, self._mix_count)
            # A draw that can't meet this request is spent all the same: n counts requests.
            if fault is not None and applies(fault, method, path):
                return fault, f"mix seed={self._mix.seed} n={self._mix_count}"
        return None, ""

    def note(
        self,
        number: int,
        *,
        forwarded: int = 0,
        request_bytes: int = 0,
        upstream_status: int | str | None = None,
        client_got: str | None = None,
    ) -> None:
        """Add to a request's entry: counts are added up, the rest replaces what was there."""
        with self._changed:
            index = number - self._numbers - 1
            if -index > len(self._log):
                return  # dropped beyond log_entries_max
            old = self._log[index]
            self._log[index] = replace(
                old,
                forwarded=old.forwarded + forwarded,
                request_bytes=old.request_bytes + request_bytes,
                upstream_status=old.upstream_status if upstream_status is None else upstream_status,
                client_got=old.client_got if client_got is None else client_got,
            )
            self._changed.notify_all()

    def log(self) -> list[LogEntry]:
        """Return what became of each request so far, oldest first."""
        with self._changed:
            return list(self._log)

    def wait_until(self, holds: Callable[[list[LogEntry]], bool], timeout_s: float) -> bool:
        """Wait until `holds(log)`; return False if it doesn't within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: holds(list(self._log)), timeout_s)

    def in_force(self) -> dict[str, object]:
        """Return the faults in force as a JSON document."""

        def document(order: _Order) -> dict[str, object]:
            return {**order.__dict__, "fault": dump_fault(order.fault)}

        with self._changed:
            mix = self._mix and {**dump_mix(self._mix), "drawn": self._mix_count}
            fixed = self._fixed and document(self._fixed)
            return {"next": [document(order) for order in self._next], "set": fixed, "mix": mix}


_FAULT: TypeAdapter[Fault] = TypeAdapter(AnyFault)
_MIX: TypeAdapter[FaultMix] = TypeAdapter(FaultMix)


def parse_fault(document: object) -> Fault:
    """Return the fault a JSON document describes: {"kind": "cut", "stage": "after"}.

    {"kind": "canned", "name": "429", "after_forwarding": true} names a ready-made reply.
    Raises InvalidFault.
    """
    if isinstance(document, dict) and document.get("kind") == "canned":
        after_forwarding = document.get("after_forwarding", False)
        if set(document) - {"kind", "name", "after_forwarding"} or after_forwarding not in (0, 1):
            raise InvalidFault('canned takes "name" and "after_forwarding": true or false')
        return canned(str(document.get("name")), after_forwarding=bool(after_forwarding))
    try:
        return _FAULT.validate_python(document)
    except ValidationError as error:
        raise InvalidFault(_reasons(error)) from None


def parse_mix(document: object) -> FaultMix:
    """Return the mix a JSON document describes. Raises InvalidFault."""
    try:
        return _MIX.validate_python(document)
    except ValidationError as error:
        raise InvalidFault(_reasons(error)) from None


def dump_fault(fault: Fault) -> dict[str, object]:
    """Return the JSON document of a fault; `parse_fault` reads it back."""
    document: dict[str, object] = _FAULT.dump_python(fault, mode="json")
    return document


def dump_mix(mix: FaultMix) -> dict[str, object]:
    """Return the JSON document of a mix; `parse_mix` reads it back."""
    document: dict[str, object] = _MIX.dump_python(mix, mode="json")
    return document


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'document'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    )


def control(plan: FaultPlan, method: str, path: str, body: bytes) -> tuple[int, object]:
    """Do what a control request asks; return the HTTP status and the JSON document to answer."""
    try:
        match method, path:
            case "GET", "/log":
                return 200, [entry.as_dict() for entry in plan.log()]
            case "GET", "/faults":
                pass
            case "DELETE", "/fault":
                plan.clear()
            case "PUT", "/fault":
                given = _fields(body, fault=dict, matching=str)
                plan.set(parse_fault(given.pop("fault")), **given)
            case "POST", "/next":
                given = _fields(body, fault=dict, times=int, matching=str)
                plan.next(parse_fault(given.pop("fault")), **given)
            case "PUT", "/mix":
                plan.mix(parse_mix(json.loads(body)))
            case _:
                ways = "GET /faults, PUT /fault, POST /next, PUT /mix, DELETE /fault, GET /log"
                return 404, {"error": f"no {method} {path} here; there are {ways}"}
    except InvalidFault as error:
        return 400, {"error": str(error)}
    except ValueError as error:  # JSON's own and UnicodeDecodeError among them
        return 400, {"error": f"the body is not JSON: {error}"}
    return 200, plan.in_force()


def _fields(body: bytes, **known: type) -> dict[str, Any]:
    """Return the body's members after checking their types; "fault" must be there."""
    given = json.loads(body)
    if not isinstance(given, dict) or "fault" not in given:
        raise InvalidFault('the body must be an object with "fault": {"kind": …}')
    for name, value in given.items():
        if name not in known:
            raise InvalidFault(f"unknown member {name!r}; there are {', '.join(known)}")
        if type(value) is not known[name]:
            raise InvalidFault(f"{name} must be of type {known[name].__name__}")
    return given


@dataclass(frozen=True)
class Message:
    """One HTTP message as it came: nothing is re-written on its way through the proxy."""

    head: h11.Request | h11.Response | None  # None: the sender left before a whole head
    raw: bytes
    body: bytes = b""  # without chunk headers
    rest: bytes = b""  # what followed on the connection
    whole: bool = False
    keep_alive: bool = False


async def read_message(
    reader: asyncio.StreamReader,
    parser: h11.Connection,
    received: bytes = b"",
    writer: asyncio.StreamWriter | None = None,
) -> Message:
    """Read one message; `received` came earlier. `parser` only tells where it ends.

    A client that expects "100 Continue" gets it through `writer`.
    """
    raw, body, head = bytearray(received), bytearray(), None
    if received:
        parser.receive_data(received)
    while True:
        event = _next_event(parser)
        if isinstance(event, h11.Request | h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            rest, keep_alive = parser.trailing_data[0], parser.their_state is h11.DONE
            whole = bytes(raw[: len(raw) - len(rest)])
            return Message(head, whole, bytes(body), rest, whole=True, keep_alive=keep_alive)
        elif isinstance(event, h11.ConnectionClosed):
            return Message(head, bytes(raw))
        elif event is h11.NEED_DATA:
            if parser.they_are_waiting_for_100_continue and writer is not None:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                writer.write(parser.send(go_on) or b"")
            data = await _read(reader)
            raw += data
            parser.receive_data(data)


def _next_event(parser: h11.Connection) -> object:
    try:
        return parser.next_event()
    except h11.RemoteProtocolError:  # nonsense, or the end in the middle: no more will come
        return h11.ConnectionClosed()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(read_bytes)
    except ConnectionError:  # a reset ends a message as end of file does
        return b""


def render(
    status: int, body: bytes, content_type: str, headers: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """Return the bytes of a reply with a Content-Length."""
    lines = [
        f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


async def serve_control(
    plan: FaultPlan, changed: Callable[[], Awaitable[None]], port: int
) -> asyncio.Server:
    """Open the control API on 127.0.0.1 (port 0: a free one).

    `changed` is awaited after each request, before its reply.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            parser = h11.Connection(h11.SERVER, head_bytes_max)
            request = await read_message(reader, parser, b"", writer)
            if isinstance(request.head, h11.Request):
                path = request.head.target.decode().partition("?")[0]
                status, document = control(plan, request.head.method.decode(), path, request.body)
                await changed()
                reply = json.dumps(document, indent=1).encode() + b"\n"
                writer.write(render(status, reply, "application/json", (("Connection", "close"),)))
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port)
