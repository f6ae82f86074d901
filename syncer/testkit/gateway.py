"""The gateway in front of PostgREST, as hosted projects have it: /rest/v1, apikey, error shapes.

Run as a process: `python -m syncer.testkit.gateway --port N --rest URL --keys FILE`. It strips the
prefix, asks for the `apikey` header, uses it as the bearer when there is none, and answers as the
hosted gateway does when PostgREST is gone. Bodies up to 20 MB pass whole. It reads messages as the
fault proxy does: a web framework took several times as long as PostgREST with the database behind
it, and a measurement of the product was one of that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
from pathlib import Path
from urllib.parse import urlsplit

import h11

from syncer.testkit.proxy_control import Message, head_bytes_max, read_message, render
from syncer.testkit.proxy_http import Streams

BODY_BYTES_MAX = 20 * 1024 * 1024  # above any batch, below what would hurt a laptop
UPSTREAM_TIMEOUT_S = 60.0  # the hosted gateway's cap
BACKLOG = 128  # clients that connect at once
PREFIX = b"/rest/v1/"
HEALTH = b"/auth/v1/health"
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"content-length",
    b"host",
    b"te",
}
_BODILESS = (204, 304)

Headers = list[tuple[bytes, bytes]]


class Gateway:
    """Passes requests on to one PostgREST, over connections that are kept."""

    def __init__(self, rest_url: str, keys: frozenset[str]) -> None:
        upstream = urlsplit(rest_url)
        self._host, self._port = upstream.hostname, upstream.port
        self._keys = keys
        self._idle: list[Streams] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until its end."""
        received, keep = b"", True
        with contextlib.suppress(ConnectionError):
            while keep:
                parser = h11.Connection(h11.SERVER, head_bytes_max)
                request = await read_message(reader, parser, received, writer)
                if not request.whole or not isinstance(request.head, h11.Request):
                    break
                writer.write(await self._answer(request, request.head))
                await writer.drain()
                received, keep = request.rest, request.keep_alive
        writer.close()

    async def _answer(self, request: Message, head: h11.Request) -> bytes:
        path, _, query = head.target.partition(b"?")
        if path == HEALTH:
            return _document(200, {"name": "local"})
        if not path.startswith(PREFIX):
            return _refusal(404, "no Route matched with those values")
        given = dict(head.headers)
        apikey = given.get(b"apikey")
        if apikey is None:
            return _refusal(401, "No API key found in request")
        if apikey.decode("latin-1") not in self._keys:
            return _refusal(401, "Invalid API key")
        if len(request.body) > BODY_BYTES_MAX:
            return _refusal(413, "Request size limit exceeded")
        passed = [(k, v) for k, v in head.headers if k not in _HOP_BY_HOP]
        if b"authorization" not in given:
            passed.append((b"authorization", b"Bearer " + apikey))
        target = path[len(PREFIX) - 1 :] + (b"?" + query if query else b"")
        passed += [(b"host", b"local"), (b"content-length", b"%d" % len(request.body))]
        asked = _joined(b"%b %b HTTP/1.1" % (head.method, target), passed, request.body)
        try:
            async with asyncio.timeout(UPSTREAM_TIMEOUT_S):
                return await self._ask(asked, head.method)
        except OSError as error:
            if isinstance(error, ConnectionRefusedError):
                return _refusal(503, "name resolution failed")
            return _refusal(502, "An invalid response was received from the upstream server")

    async def _ask(self, asked: bytes, method: bytes) -> bytes:
        """Return what PostgREST answers; raises OSError when it doesn't."""
        reader, writer = await self._connection()
        is_kept = False
        try:
            writer.write(asked)
            parser = h11.Connection(h11.CLIENT, head_bytes_max)
            parser.send(h11.Request(method=method, target="/", headers=[("Host", "")]))
            parser.send(h11.EndOfMessage())
            reply = await read_message(reader, parser)
            if not reply.whole or not isinstance(reply.head, h11.Response):
                raise ConnectionResetError("PostgREST left in the middle of its reply")
            is_kept = reply.keep_alive
        finally:
            if is_kept:
                self._idle.append((reader, writer))
            else:
                writer.close()
        passed = [(k, v) for k, v in reply.head.headers if k not in _HOP_BY_HOP]
        status = reply.head.status_code
        if method != b"HEAD" and status not in _BODILESS:
            passed.append((b"content-length", b"%d" % len(reply.body)))
        return _joined(b"HTTP/1.1 %d %b" % (status, reply.head.reason), passed, reply.body)

    async def _connection(self) -> Streams:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)


def _joined(line: bytes, headers: Headers, body: bytes) -> bytes:
    return b"\r\n".join([line, *(b"%b: %b" % header for header in headers), b"", body])


def _document(status: int, document: object) -> bytes:
    return render(status, json.dumps(document).encode(), "application/json")


def _refusal(status: int, message: str) -> bytes:
    return _document(status, {"message": message})


async def _serve(gateway: Gateway, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_server(gateway.serve, "127.0.0.1", port, backlog=BACKLOG)
    await stop.wait()
    server.close()


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rest", required=True)
    parser.add_argument("--keys", type=Path, required=True)
    options = parser.parse_args()
    keys = frozenset(json.loads(options.keys.read_text()))
    asyncio.run(_serve(Gateway(options.rest, keys), options.port))


if __name__ == "__main__":
    main()
