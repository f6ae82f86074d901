"""The Postgres wire of the fault proxy: which statement a message runs or answers."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from syncer.testkit.faults import (
    Ending,
    Treatment,
)
from syncer.testkit.proxy_control import (
    FaultPlan,
)
from syncer.testkit.proxy_http import (
    NO_REPLY,
    Connect,
    Streams,
    emit,
    end,
    outcome,
)

sql_chars_max = 200  # enough to recognise a statement in the log
_SSL_OR_GSS = (80877103, 80877104)  # request codes of the Postgres protocol
_CANCEL = 80877102


@dataclass
class _Statement:
    """A statement (or connection attempt) upstream was given and has not answered in full."""

    number: int
    method: str
    way: Treatment
    status: str = ""
    withheld: bytes = b""
    over: bool = False


class _Names:
    """Which SQL the Execute messages of a connection mean."""

    def __init__(self) -> None:
        self._prepared: dict[bytes, bytes] = {}
        self._portals: dict[bytes, bytes] = {}

    def statement(self, message: bytes) -> tuple[str, str] | None:
        """Return (QUERY or EXECUTE, SQL) if the message runs one; remember what names mean."""
        kind, (first, _, rest) = message[:1], message[5:].partition(b"\0")
        if kind == b"Q":
            return "QUERY", first.decode("utf-8", "replace")
        if kind == b"E":
            return "EXECUTE", self._portals.get(first, b"").decode("utf-8", "replace")
        if kind == b"P":
            self._prepared[first] = rest.partition(b"\0")[0]
        elif kind == b"B":
            self._portals[first] = self._prepared.get(rest.partition(b"\0")[0], b"")
        return None


async def _read_wire(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(5)
    return head + await reader.readexactly(int.from_bytes(head[1:]) - 4)


def _wire_status(message: bytes) -> str:
    """Return what a backend message says of its statement: a command tag, an error, or nothing."""
    kind = message[:1]
    if kind == b"C":
        return message[5:-1].decode("utf-8", "replace")
    if kind == b"E":
        fields = (part.decode("utf-8", "replace") for part in message[5:].split(b"\0"))
        return "ERROR " + next((part[1:] for part in fields if part[:1] == "C"), "")
    return {b"R": "AUTHENTICATION", b"I": "EMPTY", b"s": "SUSPENDED"}.get(kind, "")


class PostgresSession:
    """One connection on the Postgres wire: two pumps and the statements under way between them."""

    def __init__(self, plan: FaultPlan, connect: Connect, client: Streams) -> None:
        self._plan = plan
        self._connect = connect
        self._client = client
        self._upstream: Streams | None = None
        self._names = _Names()
        self._waiting: deque[_Statement | None] = deque()  # None: a Sync, which Z answers
        self._losing: _Statement | None = None  # its reply is being withheld

    async def run(self) -> None:
        """Serve the connection until one side or a fault ends it."""
        reader, writer = self._client
        code = _SSL_OR_GSS[0]
        while code in _SSL_OR_GSS:
            head = await reader.readexactly(8)
            startup = head + await reader.readexactly(int.from_bytes(head[:4]) - 8)
            code = int.from_bytes(head[4:])
            if code in _SSL_OR_GSS:
                writer.write(b"N")  # encryption would hide the statements from us
        try:
            if code == _CANCEL:
                self._upstream = await self._connect()
                self._upstream[1].write(startup)
                ending: Ending = "close"
            else:
                ending = await self._submit("CONNECT", _who(startup), startup)
            if ending == "keep":
                ending = await self._pump()
        except OSError:  # upstream can't be reached, or broke
            ending = "reset"
        finally:
            if self._upstream is not None:
                self._upstream[1].close()  # FIN: what was written arrives
        await end(ending, self._client)

    async def _pump(self) -> Ending:
        pumps = [asyncio.create_task(self._frontend()), asyncio.create_task(self._backend())]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except asyncio.IncompleteReadError:
            return "close"
        except asyncio.CancelledError:  # the port closed meanwhile
            for statement in filter(None, self._waiting):
                self._plan.note(statement.number, client_got="reset")
            raise
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _frontend(self) -> Ending:
        """Pass on what the client says; each statement meets its fault here."""
        assert self._upstream is not None
        while True:
            message = await _read_wire(self._client[0])
            statement = self._names.statement(message)
            if statement is not None:
                ending = await self._submit(*statement, message)
                if ending != "keep":
                    return ending
                continue
            if message[:1] == b"S":
                self._waiting.append(None)
            self._upstream[1].write(message)
            await self._upstream[1].drain()
            if message[:1] == b"X":
                return "close"

    async def _submit(self, method: str, sql: str, message: bytes) -> Ending:
        """Give upstream a statement, or what the fault leaves of it; "keep" means go on."""
        entry = self._plan.admit(method, " ".join(sql.split())[:sql_chars_max])
        way = Treatment() if entry.fault is None else entry.fault.treatment
        await asyncio.sleep(way.delay_before_s)
        if way.forward_times == 0:
            self._plan.note(entry.number, client_got=NO_REPLY[way.ending])
            return way.ending
        if self._upstream is None:
            self._upstream = await self._connect()
        part = message[: way.request_bytes_max]
        self._plan.note(entry.number, forwarded=part == message, request_bytes=len(part))
        self._waiting.append(_Statement(entry.number, method, way))
        self._upstream[1].write(part)
        await self._upstream[1].drain()
        if way.request_bytes_max is None:
            return "keep"
        self._plan.note(entry.number, client_got=NO_REPLY[way.ending])
        return way.ending

    async def _backend(self) -> Ending:
        """Pass on what upstream says, or withhold it until the statement is over."""
        assert self._upstream is not None
        while True:
            message = await _read_wire(self._upstream[0])
            statement = self._answered(message)
            if statement is None:
                await emit(self._client[1], message, None)
                continue
            way = statement.way
            if way.ending == "keep":
                await asyncio.sleep(0 if statement.withheld else way.delay_after_s)
                statement.withheld = b"-"  # delayed once is enough
                self._plan.note(statement.number, client_got=statement.status or None)
                await emit(self._client[1], message, way.pace)
                continue
            self._losing = statement
            statement.withheld += message
            if statement.over:
                sent, total = statement.withheld[: way.reply_bytes_max], len(statement.withheld)
                got = outcome(statement.status, way.ending, len(sent), total)
                self._plan.note(statement.number, client_got=got)
                await emit(self._client[1], sent, way.pace)
                return way.ending

    def _answered(self, message: bytes) -> _Statement | None:
        """Return the statement a backend message answers; take it off the queue at its end."""
        kind = message[:1]
        if kind in (b"N", b"S", b"A") or not (self._losing or self._waiting):
            return None  # notices, settings and notifications answer nothing
        statement = self._losing or self._waiting[0]
        if statement is None:
            if kind == b"Z":
                self._waiting.popleft()
            return None
        status = _wire_status(message)
        if status:
            statement.status = status
            self._plan.note(statement.number, upstream_status=status)
        # An EXECUTE outside a transaction commits at Sync only, so its effect is certain at Z.
        statement.over = kind == b"Z" or status == "COMMIT" or statement.method == "CONNECT"
        ends = kind in (b"C", b"I", b"s", b"E") if statement.method == "EXECUTE" else statement.over
        if ends and self._losing is None:
            self._waiting.popleft()
            while kind == b"E" and self._waiting and self._waiting[0] is not None:
                self._waiting.popleft()  # after an error Postgres skips to the next Sync
        return statement


def _who(startup: bytes) -> str:
    """Return user/database as a startup message names them."""
    words = [word.decode("utf-8", "replace") for word in startup[8:].split(b"\0")]
    named = dict(zip(words[::2], words[1::2], strict=False))
    return f"{named.get('user', '')}/{named.get('database', named.get('user', ''))}"
