"""A real HTTP server that counts what reaches it, and a raw client that sees what comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from dataclasses import dataclass

from syncer.testkit.fault_proxy import FaultProxy

patience_s = 5.0  # a deadline for what must happen; nothing waits that long when it works

silence_s = 0.3  # how long "no answer" is watched


@dataclass(frozen=True)
class Received:
    """What upstream got on one connection for one request."""

    path: str
    body: bytes
    whole: bool
    connection: int


class Upstream:
    """A real HTTP server that remembers every request it got, whole or cut short.

    It answers {"n": …} with its count; /chunked in chunks, /together once two are there,
    /big with 3,000 bytes, /dies with half a reply and RST.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self._arrived = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._together = asyncio.Barrier(2)
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(patience_s)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def stop(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(patience_s)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection, got = self.connections, b""
        try:
            got = head = await reader.readuntil(b"\r\n\r\n")
            path = head.split()[1].decode()
            fields = head.decode().lower()
            if "transfer-encoding: chunked" in fields:
                body = await reader.readuntil(b"0\r\n\r\n")
            else:
                length = int(fields.partition("content-length:")[2].split()[0])
                body = await reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            if got + error.partial:
                self._remember(Received("", got + error.partial, False, connection))
        else:
            await self._answer(path, writer, self._remember(Received(path, body, True, connection)))
        writer.close()

    def _remember(self, received: Received) -> int:
        with self._arrived:
            self.received.append(received)
            self._arrived.notify_all()
            return len(self.received)

    async def _answer(self, path: str, writer: asyncio.StreamWriter, n: int) -> None:
        body = json.dumps({"n": n}).encode()
        if path == "/together":
            await self._together.wait()
        if path == "/big":
            body = b"x" * 3_000
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        if path == "/chunked":
            chunks = b"1\r\n" + body[:1] + b"\r\n%x\r\n" % (len(body) - 1) + body[1:]
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"\r\n0\r\n\r\n")
        elif path == "/dies":
            writer.write(head + b"Content-Length: 100\r\n\r\nhalf")
        else:
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def wait_for(self, count: int) -> list[Received]:
        """Return what arrived once there are `count` requests."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self.received) >= count, patience_s)
            return list(self.received)

    @property
    def paths(self) -> list[str]:
        return [received.path for received in self.received]


@dataclass(frozen=True)
class Seen:
    """What a client saw: the bytes, and whether whole, or ended by RST, FIN or silence."""

    data: bytes
    end: str
    reads: int

    @property
    def status(self) -> int:
        return int(self.data.split()[1])

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]


def ask(proxy: FaultProxy, path: str = "/rows", *, wait_s: float = patience_s) -> Seen:
    """POST on a bare socket, which alone can tell RST from FIN."""
    body = json.dumps({"row": path}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    data, reads = b"", 0
    with socket.create_connection(("127.0.0.1", proxy.port), wait_s) as sock:
        sock.sendall(head.encode() + body)
        while not _is_whole(data):
            try:
                part = sock.recv(65_536)
            except ConnectionResetError:
                return Seen(data, "rst", reads)
            except TimeoutError:
                return Seen(data, "silence", reads)
            if not part:
                return Seen(data, "fin", reads)
            data, reads = data + part, reads + 1
    return Seen(data, "whole", reads)


def _is_whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].split()
    return bool(found) and (len(body) == int(length[0]) if length else body.endswith(b"0\r\n\r\n"))
