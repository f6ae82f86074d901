"""The HTTP side of the fault proxy, and how a client's connection is answered and ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import h11

from syncer.testkit.faults import (
    Answer,
    DeliverLate,
    Ending,
    Pace,
    Treatment,
)
from syncer.testkit.proxy_control import (
    FaultPlan,
    LogEntry,
    Message,
    head_bytes_max,
    read_bytes,
    read_message,
    render,
)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]
NO_REPLY = {"keep": "closed", "reset": "reset", "close": "closed", "hang": "nothing"}


async def emit(writer: asyncio.StreamWriter, data: bytes, pace: Pace | None) -> None:
    """Send `data`, at once or trickling."""
    step = len(data) if pace is None else pace.chunk_bytes
    for start in range(0, len(data), max(1, step)):
        if start and pace is not None:
            await asyncio.sleep(pace.interval_s)
        writer.write(data[start : start + step])
        await writer.drain()


def set_linger(sock: Any, seconds: int | None) -> None:
    """Choose how closing ends the connection: None with FIN, 0 with RST."""
    value = struct.pack("ii", seconds is not None, seconds or 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)


async def close_in_order(writer: asyncio.StreamWriter) -> None:
    """Close with FIN, after what was written; a connection already reset stays so."""
    if not writer.transport.is_closing():
        set_linger(writer.get_extra_info("socket"), None)
        writer.close()
        await writer.wait_closed()


async def end(ending: Ending, client: Streams) -> None:
    """End the client's connection the way a fault asks for."""
    reader, writer = client
    if ending == "hang":
        while await reader.read(read_bytes):
            pass  # the client may go on sending; nobody listens
    if ending == "reset":
        writer.transport.abort()  # RST: see _welcome
    else:
        await close_in_order(writer)


def outcome(status: int | str | None, ending: Ending, sent: int, total: int) -> str:
    """Say what the client got, for the log."""
    if ending == "keep":
        return str(status)
    gone = NO_REPLY[ending]
    return f"{status}: {sent} of {total} bytes, then {gone}" if sent else gone


class HttpWire:
    """The HTTP side: one request, one treatment."""

    def __init__(self, plan: FaultPlan, connect: Connect) -> None:
        self._plan = plan
        self._connect = connect
        self._held: dict[int, tuple[DeliverLate, list[int], asyncio.Event]] = {}
        self._deliveries: set[asyncio.Task[None]] = set()

    async def serve(self, client: Streams) -> None:
        """Serve the requests of one connection until an end."""
        received, keep = b"", True
        while keep:
            parser = h11.Connection(h11.SERVER, head_bytes_max)
            request = await read_message(client[0], parser, received, client[1])
            if not request.whole:
                return
            received = request.rest
            keep = await self._exchange(request, client) and request.keep_alive

    async def _exchange(self, request: Message, client: Streams) -> bool:
        assert isinstance(request.head, h11.Request)
        method, path = request.head.method.decode(), request.head.target.decode("latin-1")
        entry = self._plan.admit(method, path)
        way = Treatment() if entry.fault is None else entry.fault.treatment
        await asyncio.sleep(way.delay_before_s)
        if way.late is not None:
            delivery = asyncio.create_task(self._deliver(entry.number, request, way.late))
            self._deliveries.add(delivery)  # the loop alone keeps no task alive
            delivery.add_done_callback(self._deliveries.discard)
        try:
            replies = await self._forward(entry.number, request, way)
            await asyncio.sleep(way.delay_after_s)
            return await self._reply(entry, way, replies, client)
        except asyncio.CancelledError:  # the port closed meanwhile
            self._plan.note(entry.number, client_got="reset")
            raise

    async def _forward(self, number: int, request: Message, way: Treatment) -> list[Message]:
        asks = [self._ask(number, request, way.request_bytes_max) for _ in range(way.forward_times)]
        replies = await asyncio.gather(*asks) if way.at_once else [await ask for ask in asks]
        if replies:
            self._passed(number)
        return replies

    async def _ask(self, number: int, request: Message, bytes_max: int | None = None) -> Message:
        """Send the request, or its beginning, on a connection of its own; return the reply."""
        assert isinstance(request.head, h11.Request)
        try:
            reader, writer = await self._connect()
        except OSError:
            self._plan.note(number, upstream_status="unreachable")
            return Message(None, b"")
        part = request.raw[:bytes_max]
        try:
            self._plan.note(number, forwarded=part == request.raw, request_bytes=len(part))
            writer.write(part)
            if bytes_max is not None:
                return Message(None, b"")
            parser = h11.Connection(h11.CLIENT, head_bytes_max)
            parser.send(h11.Request(method=request.head.method, target="/", headers=[("Host", "")]))
            parser.send(h11.EndOfMessage())
            reply = await read_message(reader, parser)
        finally:
            writer.close()  # sends what is written, then FIN
        status = reply.head.status_code if isinstance(reply.head, h11.Response) else None
        self._plan.note(number, upstream_status=status if reply.whole else "cut short")
        return reply

    async def _reply(
        self, entry: LogEntry, way: Treatment, replies: list[Message], client: Streams
    ) -> bool:
        """Give the client what it is to get; return whether the connection goes on."""
        ending, status = way.ending, None
        if isinstance(way.answer, Answer):
            made, status = way.answer, way.answer.status
            body = made.body.encode()
            raw, keep = render(status, body, made.content_type, made.headers), True
            raw = raw[: len(raw) - len(body)] if entry.method == "HEAD" else raw
        elif replies:
            reply = replies[-1] if way.answer == "second" else replies[0]
            raw, keep = reply.raw, reply.keep_alive
            status = reply.head.status_code if isinstance(reply.head, h11.Response) else None
            if not reply.whole:  # upstream broke by itself: the client must not take it for whole
                ending = "reset" if ending == "keep" else ending
        else:
            raw, keep = b"", False
        sent = raw if way.reply_bytes_max is None else raw[: way.reply_bytes_max]
        self._plan.note(entry.number, client_got=outcome(status, ending, len(sent), len(raw)))
        try:
            await emit(client[1], sent, way.pace)
        except ConnectionError:
            self._plan.note(entry.number, client_got="left before the end of the reply")
            raise
        if ending != "keep":
            await end(ending, client)
            return False
        return keep

    async def _deliver(self, number: int, request: Message, late: DeliverLate) -> None:
        due = asyncio.Event()
        self._held[number] = (late, [0], due)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(due.wait(), late.after_s)
        del self._held[number]
        await self._ask(number, request)
        self._passed(number)

    def _passed(self, number: int) -> None:
        """Upstream has answered this request: older ones that waited for it may be due."""
        for held, (late, passed, due) in self._held.items():
            if held < number:
                passed[0] += 1
                if late.after_newer is not None and passed[0] >= late.after_newer:
                    due.set()

    def deliver_held(self) -> None:
        """Forward now everything held back for late delivery."""
        for _, _, due in self._held.values():
            due.set()
