"""A proxy that breaks connections on purpose: put it between an application and its Supabase.

    with FaultProxy.start("127.0.0.1", 54321) as proxy:
        proxy.next(Cut("after"))         # the server commits, the client sees a reset
        ...                              # point the application at proxy.url
        assert proxy.log[-1].forwarded == 1

http mode understands HTTP/1.1 requests; postgres mode the statements of the Postgres wire.
Messages pass byte for byte. Requests and replies are held whole in memory, so neither endless
replies nor upgraded connections (WebSocket) work through it; TLS does not either.
By hand: python -m syncer.testkit.fault_proxy --upstream HOST:PORT --control-port 9000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Self

from syncer.testkit.faults import (
    HTTP_MIX,
    POSTGRES_MIX,
    Fault,
    FaultMix,
    Mode,
)
from syncer.testkit.proxy_control import (
    FaultPlan,
    LogEntry,
    serve_control,
)
from syncer.testkit.proxy_http import (
    Connect,
    HttpWire,
    Streams,
    close_in_order,
    set_linger,
)
from syncer.testkit.proxy_postgres import PostgresSession

backlog_max = 128  # clients that connect at once, as Postgres and nginx allow by default
start_s_max = 10.0  # binding a port takes a millisecond; longer means the thread died


class FaultProxy:
    """A proxy in a thread of its own, on 127.0.0.1. Its methods may be called from any thread.

    `next` orders go before the fault `set`, that one before the mix. Only `set` takes Refuse.
    """

    port: int
    control_port: int | None = None

    def __init__(self, connect: Connect, mode: Mode) -> None:
        self._mode = mode
        self._connect = connect
        self._plan = FaultPlan(mode)
        self._http = HttpWire(self._plan, connect)
        self._connections: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        upstream_host: str,
        upstream_port: int,
        mode: Mode = "http",
        *,
        port: int = 0,
        control_port: int | None = None,
    ) -> Self:
        """Start a proxy to the upstream; port 0 means a free one, control_port None no control API.

        An upstream host that begins with / is the folder of a Postgres unix socket.
        Raises OSError if a port is taken.
        """

        async def connect() -> Streams:
            if upstream_host.startswith("/"):
                path = f"{upstream_host}/.s.PGSQL.{upstream_port}"
                return await asyncio.open_unix_connection(path)
            return await asyncio.open_connection(upstream_host, upstream_port)

        proxy = cls(connect, mode)
        ready: Future[None] = Future()
        work = proxy._main(port, control_port, ready)
        proxy._thread = threading.Thread(target=_run, args=(work, ready), daemon=True)
        proxy._thread.start()
        ready.result(start_s_max)
        return proxy

    def stop(self) -> None:
        """Close the ports, reset every connection, drop what was held back. Twice is harmless."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(start_s_max)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where clients connect: http://… or postgresql://…"""
        return f"{'http' if self._mode == 'http' else 'postgresql'}://127.0.0.1:{self.port}"

    @property
    def log(self) -> list[LogEntry]:
        """What became of each request so far, oldest first; the last 100,000."""
        return self._plan.log()

    def set(self, fault: Fault | None, matching: str = "") -> None:
        """Put `fault` in force until changed; None lifts it. Raises InvalidFault."""
        self._plan.set(fault, matching)
        self._call(self._follow())

    def next(self, fault: Fault, times: int = 1, matching: str = "") -> None:
        """Let the next `times` requests whose "METHOD path" contains `matching` meet `fault`."""
        self._plan.next(fault, times, matching)

    def mix(self, mix: FaultMix | None) -> None:
        """Draw faults from a seeded mix; its seed goes to stderr, so that a failure shows it."""
        self._plan.mix(mix)
        print(f"fault mix: {mix!r}", file=sys.stderr)

    def clear(self) -> None:
        """Lift every fault. Requests held back for late delivery stay held."""
        self._plan.clear()
        self._call(self._follow())

    def deliver_held(self) -> None:
        """Forward now what is held back for late delivery."""
        self._loop.call_soon_threadsafe(self._http.deliver_held)

    def wait_until(
        self, holds: Callable[[list[LogEntry]], bool], timeout_s: float = start_s_max
    ) -> bool:
        """Wait until `holds(log)`; return False if it doesn't within `timeout_s`."""
        return self._plan.wait_until(holds, timeout_s)

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(start_s_max)

    async def _main(self, port: int, control_port: int | None, ready: Future[None]) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        # Bound but never listening: keeps the port ours while the listening socket is closed.
        with _bind(port) as reservation:
            self.port = reservation.getsockname()[1]
            await self._follow()
            control = None
            if control_port is not None:
                control = await serve_control(self._plan, self._follow, control_port)
                self.control_port = control.sockets[0].getsockname()[1]
            ready.set_result(None)
            await self._stopping.wait()
            await self._shut()
            if control is not None:
                control.close()

    async def _follow(self) -> None:
        """Open or close the listening socket, as the plan wants it."""
        if self._plan.refusing:
            await self._shut()
        elif self._listening is None:
            self._listening = _bind(self.port)
            self._listening.listen(backlog_max)
            self._loop.add_reader(self._listening, self._welcome, self._listening)

    async def _shut(self) -> None:
        """Close the listening socket and reset every connection."""
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _welcome(self, listening: socket.socket) -> None:
        """Accept a connection in one step.

        asyncio's own server (3.11) takes several, and forgets a connection without closing it
        if the server is closed between them: the client would wait for ever.
        """
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = listening.accept()
            sock.setblocking(False)
            set_linger(sock, 0)  # dropped, it resets the client; close_in_order alone says FIN
            connection = self._loop.create_task(self._serve(sock))
            self._connections.add(connection)
            connection.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket) -> None:
        with sock:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                if self._mode == "http":
                    await self._http.serve((reader, writer))
                else:
                    await PostgresSession(self._plan, self._connect, (reader, writer)).run()
                await close_in_order(writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the client left; the log says what it got
            finally:
                writer.transport.abort()


def _run(work: Coroutine[Any, Any, None], ready: Future[None]) -> None:
    try:
        asyncio.run(work)
    except Exception as error:
        if ready.done():
            raise
        ready.set_exception(error)


def _bind(port: int) -> socket.socket:
    """Return a socket bound to 127.0.0.1:port, beside the reservation on the same port."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a proxy until SIGINT or SIGTERM; steer it over its control API."""
    parser = argparse.ArgumentParser(prog="python -m syncer.testkit.fault_proxy")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--mode", choices=("http", "postgres"), default="http")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--seed", type=int, help="with --rate: a mix of faults from the start")
    parser.add_argument("--rate", type=float, default=0.3)
    given = parser.parse_args(arguments)
    host, _, port = given.upstream.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--upstream must be HOST:PORT, not {given.upstream}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ports = {"port": given.port, "control_port": given.control_port}
    with FaultProxy.start(host, int(port), given.mode, **ports) as proxy:
        if given.seed is not None:
            faults = HTTP_MIX if given.mode == "http" else POSTGRES_MIX
            proxy.mix(FaultMix(given.seed, given.rate, faults))
        control = f"http://127.0.0.1:{proxy.control_port}"
        print(f"{proxy.url} -> {given.upstream}, control {control}/faults", flush=True)
        stop.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
