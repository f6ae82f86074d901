"""The clients of benchmarks/api.py, in a process of their own: they share no interpreter with the
server, and none with the proxy.

Each client has one connection and makes one call at a time. `paced` clients make theirs at moments
that are fixed beforehand, whatever became of the last call, and a latency counts from that moment:
a call that had to wait behind its client's last one took that long for its user.

    python -m benchmarks.api_clients < order.json
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

from local_store.clock import SystemClock

CLOCK = SystemClock()
OPS = ("create", "resolve", "get", "page of 50", "list of 1000")
FIRST = "first list"  # brings here what changed while this server wasn't asked, and makes documents
LISTED = 1_000  # sessions of each user whose list is read
LISTERS = 2  # those users; every other call of theirs is that list, which changes meanwhile
LISTER = [op for other in OPS[:4] for op in (other, OPS[4])]
LISTS_EVERY = 3  # of the other calls of one client: a list is some megabytes
TIMEOUT_S = 60.0
READ_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Order:
    """What the clients do. `calls`: of each kind, back to back; 0: paced, for `seconds`."""

    host: str
    port: int
    tokens: list[str]
    calls: int = 0
    seconds: float = 0.0
    pace_s: float = 1.0


@dataclass
class Samples:
    """Latencies in ms by op, and calls that weren't answered with 2xx."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection that knows as much of the protocol as these replies need."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._reply: asyncio.Future[tuple[int, bytes]] | None = None
        self._whole = 0  # bytes of the reply, head included, once its head is there
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        self._transport = None
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(ConnectionError("the server hung up"))

    @property
    def is_open(self) -> bool:
        """Tell whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return the reply's status and body."""
        assert self._transport is not None
        self._received, self._whole = bytearray(), 0
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await asyncio.wait_for(self._reply, TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Take in a part of the reply."""
        self._received += data
        if not self._whole:
            head, end, _ = bytes(self._received[:8192]).partition(b"\r\n\r\n")
            if not end:
                return
            fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
            self._whole = len(head) + len(end) + int(fields.get(b"content-length", b"0"))
        if len(self._received) >= self._whole and self._reply is not None:
            status = int(self._received[9:12])
            _, _, body = bytes(self._received).partition(b"\r\n\r\n")
            self._reply.set_result((status, body))


class Client:
    """One user of the API."""

    def __init__(self, order: Order, token: str) -> None:
        self._host, self._port = order.host, order.port
        self._head = (
            f"Host: {order.host}\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: application/json\r\n"
        )
        self._connection: Connection | None = None
        self._made: list[dict[str, Any]] = []

    async def call(self, op: str) -> bool:
        """Make one call of a kind; tells whether it succeeded."""
        if op == "create":
            status, body = await self._ask(
                "POST", "/api/sessions", {"prompt": "Sort a list by ???"}
            )
            if status == 201:
                self._made.append(orjson.loads(body))
        elif op == "resolve":
            session = self._made[-1]
            hole = session["current_draft"]["ambiguities"][0]
            path = f"/api/sessions/{session['session_id']}/holes/{hole}/resolve"
            status, _ = await self._ask("POST", path, {"resolution_text": "by name"})
        elif op == "get":
            path = f"/api/sessions/{self._made[-1]['session_id']}"
            status, _ = await self._ask("GET", path)
        else:
            limit = LISTED if op in ("list of 1000", FIRST) else 50
            status, _ = await self._ask("GET", f"/api/sessions?limit={limit}")
        return 200 <= status < 300

    async def measure(self, op: str, samples: Samples, due: float | None = None) -> None:
        """Make one call and note what it took, from the moment it was due."""
        began = CLOCK.monotonic() if due is None else due
        try:
            ok = await self.call(op)
        except (OSError, TimeoutError, ValueError):
            if self._connection is not None:
                self._connection.close()
            ok = False
        except IndexError:  # there is no session to call
            ok = False
        samples.ms[op].append((CLOCK.monotonic() - began) * 1_000)
        samples.failed[op] += not ok

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        content = b"" if body is None else orjson.dumps(body)
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(content)}\r\n\r\n"
        if self._connection is None or not self._connection.is_open:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(Connection, self._host, self._port)
        return await self._connection.ask(head.encode() + content)


async def one_client(order: Order) -> Samples:
    """Call back to back, the kinds in turn."""
    samples, client = Samples(), Client(order, order.tokens[0])
    await client.measure(FIRST, samples)
    for number in range(order.calls):
        for op in OPS:
            if op != "list of 1000" or number % LISTS_EVERY == 0:
                await client.measure(op, samples)
    return samples


async def paced_clients(order: Order) -> Samples:
    """Let each client make a call per `pace_s`, at its own moment of it."""
    samples, clients = Samples(), [Client(order, token) for token in order.tokens]
    for number, client in enumerate(clients):
        await client.measure("create", Samples())  # its connection, and something to get
        await client.measure(FIRST if number < LISTERS else "page of 50", Samples())
    began = CLOCK.monotonic() + order.pace_s

    async def use(number: int) -> None:
        kinds = LISTER if number < LISTERS else OPS[:4]
        due, turn = began + number / len(clients) * order.pace_s, number
        while due < began + order.seconds:
            await asyncio.sleep(max(0.0, due - CLOCK.monotonic()))
            await clients[number].measure(kinds[turn % len(kinds)], samples, due)
            turn, due = turn + 1, due + order.pace_s

    await asyncio.gather(*(use(number) for number in range(len(clients))))
    return samples


def main() -> None:
    """Do what stdin orders and print the samples as JSON."""
    order = Order(**orjson.loads(sys.stdin.buffer.read()))
    work = one_client(order) if order.calls else paced_clients(order)
    samples = asyncio.run(work)
    sys.stdout.buffer.write(orjson.dumps({"ms": samples.ms, "failed": samples.failed}))


if __name__ == "__main__":
    main()
