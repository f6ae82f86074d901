"""Each injector is proved twice: by what the client saw and by what a real upstream received."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from local_store.clock import SystemClock
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    CANNED,
    HTTP_MIX,
    POSTGRES_MIX,
    Answer,
    BlackHole,
    Cut,
    Delay,
    DeliverLate,
    Drip,
    Duplicate,
    Fault,
    FaultMix,
    InvalidFault,
    LoseCommitReply,
    Refuse,
    Throttle,
    Truncate,
    canned,
    decide,
)
from syncer.testkit.proxy_control import dump_fault, dump_mix, parse_fault, parse_mix

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


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.stop()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy.start("127.0.0.1", upstream.port, control_port=0) as running:
        yield running


def test_without_faults_everything_passes_byte_for_byte_on_one_connection(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    with httpx.Client(base_url=proxy.url) as client:
        assert client.post("/rows", content=b"one").json() == {"n": 1}
        assert client.post("/chunked", content=iter([b"two ", b"parts"])).json() == {"n": 2}
        assert len(client.post("/big", content=b"z" * 300_000).content) == 3_000
    assert [received.body for received in upstream.received] == [
        b"one",
        b"4\r\ntwo \r\n5\r\nparts\r\n0\r\n\r\n",
        b"z" * 300_000,
    ]
    assert [(entry.forwarded, entry.client_got) for entry in proxy.log] == [(1, "200")] * 3


def test_pipelined_requests_are_answered_in_their_order(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    one = b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    with socket.create_connection(("127.0.0.1", proxy.port), patience_s) as sock:
        sock.sendall(one % 1 + one % 2)
        data = b""
        while data.count(b"HTTP/1.1 200") < 2 or not data.endswith(b"}"):
            data += sock.recv(65_536)
    assert data.index(b'{"n": 1}') < data.index(b'{"n": 2}')
    assert upstream.paths == ["/1", "/2"]


def test_client_that_expects_100_continue_gets_it(proxy: FaultProxy, upstream: Upstream) -> None:
    head = b"POST /c HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), patience_s) as sock:
        sock.sendall(head)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 100")
        sock.sendall(b"hi")
        assert sock.recv(65_536).startswith(b"HTTP/1.1 200")
    assert upstream.received[0].body == b"hi"


def test_upstream_that_breaks_by_itself_breaks_the_client_too(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    seen = ask(proxy, "/dies")
    assert (seen.end, seen.data.endswith(b"half")) == ("rst", True)
    assert proxy.log[-1].upstream_status == "cut short"


def test_unreachable_upstream_resets_the_client(proxy: FaultProxy, upstream: Upstream) -> None:
    upstream.stop()
    assert ask(proxy).end == "rst"
    assert (proxy.log[-1].forwarded, proxy.log[-1].upstream_status) == (0, "unreachable")


def test_refuse_closes_the_port_and_cuts_open_connections(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), patience_s) as idle:
        ask(proxy)
        proxy.set(Refuse())
        with pytest.raises(ConnectionRefusedError):
            ask(proxy)
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
    assert (upstream.connections, len(proxy.log)) == (1, 1)
    proxy.clear()
    assert ask(proxy).status == 200


def test_port_that_refuses_can_not_be_taken_by_others(proxy: FaultProxy) -> None:
    proxy.set(Refuse())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", proxy.port))


def test_flapping_port_serves_whenever_it_is_open(proxy: FaultProxy, upstream: Upstream) -> None:
    for _ in range(20):
        proxy.set(Refuse())
        with pytest.raises(ConnectionRefusedError):
            ask(proxy)
        proxy.set(None)
        assert ask(proxy).status == 200
    assert len(upstream.received) == 20


def test_black_hole_takes_the_request_and_never_answers(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.set(BlackHole())
    assert ask(proxy, wait_s=silence_s) == Seen(b"", "silence", 0)
    assert upstream.connections == 0
    assert (proxy.log[0].forwarded, proxy.log[0].client_got) == (0, "nothing")


def test_delay_before_lets_the_request_land_after_the_client_gave_up(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(Delay(0.3))
    assert ask(proxy, wait_s=0.1).end == "silence"
    assert upstream.received == []
    assert len(upstream.wait_for(1)) == 1


def test_delay_after_holds_the_reply_of_a_request_that_was_done(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(Delay(0.3, "after"))
    assert ask(proxy, wait_s=0.15).end == "silence"
    assert len(upstream.received) == 1
    assert proxy.log[0].upstream_status == 200


def test_delayed_reply_arrives_whole_when_the_client_is_patient(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    clock = SystemClock()
    for stage in ("before", "after"):
        proxy.next(Delay(0.1, stage))
        started = clock.monotonic()
        assert ask(proxy).status == 200
        assert clock.monotonic() - started >= 0.1


def test_throttle_limits_the_bytes_per_second_of_the_reply(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    clock = SystemClock()
    proxy.next(Throttle(10_000))
    started = clock.monotonic()
    assert len(ask(proxy, "/big").body) == 3_000
    assert clock.monotonic() - started >= 0.25  # 3,000 bytes, the first portion at once
    assert upstream.paths == ["/big"]


def test_drip_outlasts_a_timeout_that_counts_per_read(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    """A client that trusts its read timeout waits far longer than it says."""
    clock = SystemClock()
    proxy.next(Drip(0.004), times=2)
    started = clock.monotonic()
    assert httpx.post(f"{proxy.url}/rows", content=b"x", timeout=0.2).json() == {"n": 1}
    assert clock.monotonic() - started > 0.2
    seen = ask(proxy)
    assert seen.reads > len(seen.data) / 2
    assert len(upstream.received) == 2


@pytest.mark.parametrize(("how", "end"), [("reset", "rst"), ("close", "fin")])
def test_cut_before_forwards_nothing(
    proxy: FaultProxy, upstream: Upstream, how: Any, end: str
) -> None:
    proxy.next(Cut("before", how))
    assert ask(proxy) == Seen(b"", end, 0)
    assert upstream.connections == 0
    assert (proxy.log[0].forwarded, proxy.log[0].request_bytes) == (0, 0)


@pytest.mark.parametrize(("how", "end"), [("reset", "rst"), ("close", "fin")])
def test_cut_in_the_request_leaves_upstream_with_its_beginning(
    proxy: FaultProxy, upstream: Upstream, how: Any, end: str
) -> None:
    proxy.next(Cut("in", how, request_bytes=60))
    assert ask(proxy) == Seen(b"", end, 0)
    (received,) = upstream.wait_for(1)
    assert (received.whole, len(received.body)) == (False, 60)
    assert (proxy.log[0].forwarded, proxy.log[0].request_bytes) == (0, 60)


@pytest.mark.parametrize(("how", "end"), [("reset", "rst"), ("close", "fin")])
def test_cut_after_throws_the_reply_of_a_done_request_away(
    proxy: FaultProxy, upstream: Upstream, how: Any, end: str
) -> None:
    proxy.next(Cut("after", how))
    assert ask(proxy) == Seen(b"", end, 0)
    assert [received.whole for received in upstream.received] == [True]
    assert (proxy.log[0].forwarded, proxy.log[0].upstream_status) == (1, 200)


@pytest.mark.parametrize(("how", "end"), [("reset", "rst"), ("close", "fin")])
def test_truncate_gives_the_beginning_of_the_reply(
    proxy: FaultProxy, upstream: Upstream, how: Any, end: str
) -> None:
    proxy.next(Truncate(70, how))
    seen = ask(proxy)
    assert (len(seen.data), seen.end, seen.status) == (70, end, 200)
    assert [received.whole for received in upstream.received] == [True]
    got = {"reset": "reset", "close": "closed"}[how]
    assert re.fullmatch(f"200: 70 of [0-9]+ bytes, then {got}", str(proxy.log[0].client_got))


@pytest.mark.parametrize(("answer", "n"), [("first", 1), ("second", 2)])
def test_duplicate_forwards_twice_and_answers_once(
    proxy: FaultProxy, upstream: Upstream, answer: Any, n: int
) -> None:
    proxy.next(Duplicate(answer))
    assert json.loads(ask(proxy).body) == {"n": n}
    first, second = upstream.received
    assert (first.body, first.path) == (second.body, second.path)
    assert first.connection != second.connection
    assert proxy.log[0].forwarded == 2


def test_duplicate_at_once_has_both_copies_under_way_together(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    """/together answers nobody before two requests are there."""
    proxy.next(Duplicate("second", at_once=True))
    assert ask(proxy, "/together").status == 200
    assert upstream.paths == ["/together"] * 2


@pytest.mark.parametrize(("how", "end"), [("reset", "rst"), ("close", "fin"), ("hang", "silence")])
def test_late_request_arrives_after_newer_ones(
    proxy: FaultProxy, upstream: Upstream, how: Any, end: str
) -> None:
    proxy.next(DeliverLate(after_newer=2, how=how))
    assert ask(proxy, "/old", wait_s=silence_s) == Seen(b"", end, 0)
    ask(proxy, "/new1")
    assert upstream.paths == ["/new1"]
    ask(proxy, "/new2")
    upstream.wait_for(3)
    assert upstream.paths == ["/new1", "/new2", "/old"]
    assert proxy.wait_until(lambda log: log[0].upstream_status == 200, patience_s)
    assert proxy.log[0].forwarded == 1


def test_late_request_arrives_after_its_time_without_newer_ones(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(DeliverLate(after_newer=None, after_s=0.1))
    assert ask(proxy, "/old").end == "rst"
    assert upstream.received == []
    assert [received.path for received in upstream.wait_for(1)] == ["/old"]


def test_late_requests_can_be_let_go_by_hand(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.next(DeliverLate(after_newer=1_000), times=2)
    ask(proxy, "/old1")
    ask(proxy, "/old2")
    proxy.clear()
    assert upstream.received == []
    proxy.deliver_held()
    assert {received.path for received in upstream.wait_for(2)} == {"/old1", "/old2"}


@pytest.mark.parametrize("name", sorted(CANNED))
@pytest.mark.parametrize("after_forwarding", [False, True])
def test_canned_replies_come_with_and_without_the_server_having_done_it(
    shared: tuple[FaultProxy, Upstream], name: str, after_forwarding: bool
) -> None:
    proxy, upstream = shared
    before = len(upstream.received)
    proxy.next(canned(name, after_forwarding=after_forwarding))
    seen, reply = ask(proxy), CANNED[name]
    assert (seen.status, seen.body.decode()) == (reply.status, reply.body)
    head = seen.data.partition(b"\r\n\r\n")[0].decode()
    assert all(f"{field}: {value}" in head for field, value in reply.headers)
    assert len(upstream.received) - before == after_forwarding
    entry = proxy.log[-1]
    assert (entry.forwarded, entry.client_got) == (after_forwarding, str(reply.status))
    assert entry.upstream_status == (200 if after_forwarding else None)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FaultProxy, Upstream]]:
    upstream = Upstream()
    with FaultProxy.start("127.0.0.1", upstream.port) as proxy:
        yield proxy, upstream
    upstream.stop()


def test_canned_reply_keeps_the_connection_and_leaves_head_replies_empty(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(Answer(503, "busy"), times=2)
    with httpx.Client(base_url=proxy.url) as client:
        assert client.head("/rows").status_code == 503
        assert client.post("/rows", content=b"x").text == "busy"
        assert client.post("/rows", content=b"x").json() == {"n": 1}


def test_next_counts_down_and_skips_what_does_not_match(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(Answer(503), times=2, matching="post /RPC")
    statuses = [ask(proxy, path).status for path in ("/rows", "/rpc/a", "/rows", "/rpc/b", "/rpc")]
    assert statuses == [200, 503, 200, 503, 200]
    assert upstream.paths == ["/rows", "/rows", "/rpc"]


def test_next_goes_before_set_and_set_before_the_mix(proxy: FaultProxy) -> None:
    proxy.mix(FaultMix(1, 1.0, ((Answer(501), 1),)))
    proxy.set(Answer(502), matching="/set")
    proxy.next(Answer(503))
    assert [ask(proxy, path).status for path in ("/set", "/set", "/mix")] == [503, 502, 501]
    assert [entry.decided_by for entry in proxy.log] == ["next", "set", "mix seed=1 n=1"]
    proxy.clear()
    assert ask(proxy, "/set").status == 200


def test_callers_in_many_threads_share_the_ordered_faults_exactly(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    proxy.next(Answer(503), times=50)
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(lambda _: ask(proxy).status, range(120)))
    assert statuses == {503: 50, 200: 70}
    assert len(upstream.received) == 70
    assert sorted(entry.number for entry in proxy.log) == list(range(1, 121))


def test_decisions_depend_on_seed_and_number_alone() -> None:
    mix = FaultMix(7, 0.3)
    first = [decide(mix, n) for n in range(1, 2_001)]
    assert first == [decide(FaultMix(7, 0.3), n) for n in range(1, 2_001)]
    assert decide(mix, 1_234) == first[1_233]
    assert first != [decide(FaultMix(8, 0.3), n) for n in range(1, 2_001)]
    # Pinned: a seed from an old failure report must mean the same after an upgrade.
    assert [n for n, fault in enumerate(first[:12], 1) if fault is not None] == [3, 4, 7, 8, 12]


def test_mix_keeps_its_rate_and_its_weights() -> None:
    mix = FaultMix(3, 0.3, ((Cut("before"), 3), (Cut("after"), 1)))
    counts = Counter(decide(mix, n) for n in range(1, 20_001))
    assert abs(counts[None] / 20_000 - 0.7) < 0.02
    assert abs(counts[Cut("before")] / counts[Cut("after")] - 3) < 0.3
    assert all(decide(FaultMix(3, 0.0), n) is None for n in range(1, 1_000))
    assert all(decide(FaultMix(3, 1.0), n) is not None for n in range(1, 1_000))
    assert {decide(FaultMix(5, 1.0), n) for n in range(1, 2_000)} == {f for f, _ in HTTP_MIX}


def test_log_agrees_with_upstream_on_each_request_of_a_mix(
    proxy: FaultProxy, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = FaultMix(11, 0.5, matching="/rpc")
    proxy.mix(mix)
    assert "seed=11" in capsys.readouterr().err
    ask(proxy, "/other")
    for n in range(1, 81):
        ask(proxy, f"/rpc/{n}")
    proxy.deliver_held()
    late = [entry.number for entry in proxy.log if isinstance(entry.fault, DeliverLate)]
    assert late
    assert proxy.wait_until(lambda log: all(log[n - 1].upstream_status for n in late), patience_s)
    assert [entry.fault for entry in proxy.log[1:]] == [decide(mix, n) for n in range(1, 81)]
    assert proxy.log[80].decided_by in ("", "mix seed=11 n=80")
    whole = Counter(received.path for received in upstream.received if received.whole)
    assert whole == Counter({entry.path: entry.forwarded for entry in proxy.log if entry.forwarded})


@pytest.mark.parametrize("fault", [*dict(HTTP_MIX + POSTGRES_MIX), Refuse(), BlackHole()])
def test_each_fault_survives_its_json_form(fault: Fault) -> None:
    assert parse_fault(json.loads(json.dumps(dump_fault(fault)))) == fault


def test_mix_survives_its_json_form() -> None:
    mix = FaultMix(9, 0.25, POSTGRES_MIX, "COMMIT")
    assert parse_mix(json.loads(json.dumps(dump_mix(mix)))) == mix


@pytest.mark.parametrize(
    "make",
    [
        lambda: Delay(-1),
        lambda: Delay(float("nan")),
        lambda: Throttle(0),
        lambda: Answer(99),
        lambda: Answer(200, headers=(("A", "b\r\nc: d"),)),
        lambda: DeliverLate(after_newer=None),
        lambda: FaultMix(1, 1.5),
        lambda: FaultMix(1, 0.5, ()),
        lambda: FaultMix(1, 0.5, ((Refuse(), 1),)),
        lambda: canned("no such reply"),
    ],
)
def test_impossible_faults_can_not_be_described(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()


def test_faults_out_of_place_are_refused_and_change_nothing(proxy: FaultProxy) -> None:
    orders: list[Callable[[], None]] = [
        lambda: proxy.next(Refuse()),
        lambda: proxy.next(LoseCommitReply()),
        lambda: proxy.set(LoseCommitReply()),
        lambda: proxy.set(Refuse(), matching="/rpc"),
        lambda: proxy.next(BlackHole(), times=0),
        lambda: proxy.mix(FaultMix(1, 1.0, POSTGRES_MIX)),
    ]
    for order in orders:
        with pytest.raises(InvalidFault):
            order()
    assert ask(proxy).status == 200


@pytest.fixture
def control(proxy: FaultProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy.control_port}") as client:
        yield client


def test_control_api_steers_the_proxy_and_shows_the_log(
    proxy: FaultProxy, upstream: Upstream, control: httpx.Client
) -> None:
    order = {"fault": {"kind": "cut", "stage": "after"}, "times": 2, "matching": "/rpc"}
    assert control.post("/next", json=order).json()["next"][0]["times"] == 2
    assert ask(proxy, "/rpc").end == "rst"
    assert control.get("/faults").json()["next"][0]["times"] == 1
    assert control.put("/fault", json={"fault": {"kind": "refuse"}}).status_code == 200
    with pytest.raises(ConnectionRefusedError):
        ask(proxy)
    assert control.delete("/fault").json() == {"next": [], "set": None, "mix": None}
    assert ask(proxy).status == 200
    mix = {"seed": 5, "rate": 1, "faults": [[{"kind": "canned", "name": "540_json"}, 1]]}
    mix["faults"] = [[{"kind": "answer", "status": 540}, 1]]
    assert control.put("/mix", json=mix).json()["mix"]["seed"] == 5
    assert ask(proxy).status == 540
    assert control.get("/faults").json()["mix"]["drawn"] == 1
    log = control.get("/log").json()
    assert [(entry["forwarded"], entry["client_got"]) for entry in log] == [
        (1, "reset"),
        (1, "200"),
        (0, "540"),
    ]
    assert log[0]["fault"] == {
        "kind": "cut",
        "stage": "after",
        "how": "reset",
        "request_bytes": 1,
    }
    assert len(upstream.received) == 2


def test_control_api_takes_canned_replies_by_name(proxy: FaultProxy, control: httpx.Client) -> None:
    fault = {"kind": "canned", "name": "429_retry_after", "after_forwarding": True}
    assert control.put("/fault", json={"fault": fault}).status_code == 200
    assert ask(proxy).status == 429
    assert proxy.log[0].forwarded == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "reason"),
    [
        ("PUT", "/fault", b"not json", "not JSON"),
        ("PUT", "/fault", b"\xff\xfe", "not JSON"),
        ("PUT", "/fault", b"[]", '"fault"'),
        ("PUT", "/fault", b"{}", '"fault"'),
        ("PUT", "/fault", b'{"fault": {"kind": "gremlin"}}', "gremlin"),
        ("PUT", "/fault", b'{"fault": {"kind": "delay"}}', "delay.seconds"),
        ("PUT", "/fault", b'{"fault": {"kind": "delay", "seconds": 1, "x": 2}}', "delay.x"),
        ("PUT", "/fault", b'{"fault": {"kind": "refuse"}, "times": 1}', "times"),
        ("PUT", "/fault", b'{"fault": {"kind": "lose_commit_reply"}}', "http mode"),
        ("POST", "/next", b'{"fault": {"kind": "refuse"}}', "use set"),
        ("POST", "/next", b'{"fault": {"kind": "drip"}, "times": 0}', "times"),
        ("POST", "/next", b'{"fault": {"kind": "drip"}, "times": "2"}', "times"),
        ("POST", "/next", b'{"fault": {"kind": "drip"}, "often": 2}', "often"),
        ("POST", "/next", b'{"fault": {"kind": "canned", "name": "999"}}', "999"),
        ("PUT", "/mix", b'{"seed": 1}', "rate"),
        ("PUT", "/mix", b'{"seed": 1, "rate": 2}', "rate"),
    ],
)
def test_control_api_answers_400_with_the_reason_and_changes_nothing(
    control: httpx.Client, method: str, path: str, body: bytes, reason: str
) -> None:
    reply = control.request(method, path, content=body)
    assert reply.status_code == 400
    assert reason in reply.json()["error"]
    assert control.get("/faults").json() == {"next": [], "set": None, "mix": None}


def test_control_api_names_its_paths_on_404(control: httpx.Client) -> None:
    reply = control.get("/fault")
    assert reply.status_code == 404
    assert "GET /faults" in reply.json()["error"]


def test_stop_frees_the_port_and_may_be_repeated(upstream: Upstream) -> None:
    proxy = FaultProxy.start("127.0.0.1", upstream.port, control_port=0)
    proxy.next(DeliverLate(after_newer=1_000))
    ask(proxy)
    with socket.create_connection(("127.0.0.1", proxy.port), patience_s) as idle:
        proxy.stop()
        proxy.stop()
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
    for port in (proxy.port, proxy.control_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), patience_s)
    with FaultProxy.start("127.0.0.1", upstream.port, port=proxy.port) as again:
        assert ask(again).status == 200


def test_start_says_when_its_port_is_taken(upstream: Upstream) -> None:
    with pytest.raises(OSError, match="in use"):
        FaultProxy.start("127.0.0.1", upstream.port, port=upstream.port)


def test_command_line_runs_a_mix_until_terminated(upstream: Upstream) -> None:
    command = [sys.executable, "-m", "syncer.testkit.fault_proxy"]
    options = ["--upstream", f"127.0.0.1:{upstream.port}", "--seed", "4", "--rate", "0"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        words = process.stdout.readline().split()
        assert httpx.post(f"{words[0]}/rows", content=b"x").json() == {"n": 1}
        assert httpx.get(words[-1]).json()["mix"]["seed"] == 4
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(patience_s) == 0
        assert "seed=4" in process.stderr.read()


# ---- The Postgres wire, on a real Postgres ----


@pytest.fixture
def table(local_supabase: Any) -> Iterator[str]:
    """A table of its own and the way to it around the proxy."""
    with psycopg.connect(local_supabase.database_url, autocommit=True) as direct:
        direct.execute("drop table if exists public.fault_proxy_rows")
        direct.execute("create table public.fault_proxy_rows (id int primary key)")
        yield local_supabase.database_url
        direct.execute("drop table public.fault_proxy_rows")


@pytest.fixture
def wire(table: str) -> Iterator[FaultProxy]:
    target = conninfo_to_dict(table)
    host, port = str(target.get("host", "127.0.0.1")), int(str(target.get("port", 5432)))
    with FaultProxy.start(host, port, mode="postgres") as proxy:
        yield proxy


def through(wire: FaultProxy, table: str) -> str:
    return make_conninfo(table, host="127.0.0.1", hostaddr="127.0.0.1", port=wire.port)


def ids(table: str) -> list[int]:
    with psycopg.connect(table) as direct:
        rows = direct.execute("select id from public.fault_proxy_rows order by id")
        return [row[0] for row in rows]


INSERT = "insert into public.fault_proxy_rows values (%s)"


def test_postgres_passes_unharmed_without_faults(wire: FaultProxy, table: str) -> None:
    with psycopg.connect(through(wire, table)) as client:
        client.execute(INSERT, (1,), prepare=True)
        client.execute(INSERT, (2,), prepare=True)
        client.commit()
        with pytest.raises(psycopg.errors.UniqueViolation):
            client.execute(INSERT, (1,))
        client.rollback()
        with client.cursor().copy("copy public.fault_proxy_rows from stdin") as copy:
            copy.write("3\n4\n")
    assert ids(table) == [1, 2, 3, 4]
    log = wire.log
    assert log[0].method == "CONNECT"
    inserts = [entry for entry in log if entry.path.startswith("insert")]
    assert [entry.client_got for entry in inserts] == ["INSERT 0 1"] * 2 + ["ERROR 23505"]
    assert log[-1].upstream_status == "COMMIT"


@pytest.mark.parametrize("how", ["reset", "close"])
def test_lost_reply_to_commit_raises_though_the_row_is_there(
    wire: FaultProxy, table: str, how: Any
) -> None:
    wire.next(LoseCommitReply(how))
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == [1]
    entry = wire.log[-1]
    assert (entry.path, entry.forwarded, entry.upstream_status) == ("COMMIT", 1, "COMMIT")
    assert entry.client_got == ("reset" if how == "reset" else "closed")


def test_lost_reply_to_commit_in_a_pipeline_of_extended_messages(
    wire: FaultProxy, table: str
) -> None:
    wire.next(LoseCommitReply())
    client = psycopg.connect(through(wire, table), autocommit=True)

    def work() -> None:
        with client.pipeline():
            client.execute("begin")
            client.execute(INSERT, (1,), prepare=True)
            client.execute(INSERT, (2,), prepare=True)
            client.execute("commit")

    with pytest.raises(psycopg.OperationalError):
        work()
    assert ids(table) == [1, 2]
    statements = [(entry.method, entry.upstream_status) for entry in wire.log[1:]]
    assert statements[-4:] == [
        ("EXECUTE", "BEGIN"),
        ("EXECUTE", "INSERT 0 1"),
        ("EXECUTE", "INSERT 0 1"),
        ("EXECUTE", "COMMIT"),
    ]


def test_lost_reply_to_a_commit_that_was_prepared_earlier(wire: FaultProxy, table: str) -> None:
    """PostgREST prepares COMMIT once per connection and from then on sends its name only."""
    client = psycopg.connect(through(wire, table), autocommit=True)
    for number in (1, 2):
        if number == 2:
            wire.next(LoseCommitReply())
        client.execute("begin")
        client.execute(INSERT, (number,))
        if number == 2:
            with pytest.raises(psycopg.OperationalError):
                client.execute("commit", prepare=True)
        else:
            client.execute("commit", prepare=True)
    assert ids(table) == [1, 2]
    commits = [entry for entry in wire.log if entry.path == "commit"]
    assert [entry.method for entry in commits] == ["EXECUTE", "EXECUTE"]
    assert [entry.client_got for entry in commits] == ["COMMIT", "reset"]


def test_commit_cut_before_it_is_forwarded_leaves_no_row(wire: FaultProxy, table: str) -> None:
    wire.next(Cut("before"), matching="COMMIT")
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == []
    assert wire.log[-1].forwarded == 0


def test_commit_cut_in_its_message_leaves_no_row(wire: FaultProxy, table: str) -> None:
    wire.next(Cut("in", request_bytes=7), matching="COMMIT")
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == []
    assert (wire.log[-1].forwarded, wire.log[-1].request_bytes) == (0, 7)


@pytest.mark.parametrize("fault", [Cut("after"), Truncate(3)])
def test_autocommitted_insert_whose_reply_is_cut_is_there(
    wire: FaultProxy, table: str, fault: Fault
) -> None:
    """Outside a transaction Postgres commits at Sync, after it named the statement complete."""
    wire.next(fault, matching="insert")
    client = psycopg.connect(through(wire, table), autocommit=True)
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, (1,), prepare=True)
    assert ids(table) == [1]
    assert wire.log[-1].upstream_status == "INSERT 0 1"


def test_postgres_port_refuses_and_cuts_open_connections(wire: FaultProxy, table: str) -> None:
    client = psycopg.connect(through(wire, table), autocommit=True)
    wire.set(Refuse())
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(through(wire, table))
    wire.clear()
    with psycopg.connect(through(wire, table)) as again:
        again.execute(INSERT, (2,))
    assert ids(table) == [2]


async def test_postgres_black_hole_swallows_connections_and_statements(
    wire: FaultProxy, table: str
) -> None:
    client = await psycopg.AsyncConnection.connect(through(wire, table), autocommit=True)
    wire.set(BlackHole())
    swallowed = {
        asyncio.create_task(client.execute(INSERT, (1,))),
        asyncio.create_task(psycopg.AsyncConnection.connect(through(wire, table))),
    }
    done, _ = await asyncio.wait(swallowed, timeout=silence_s)
    assert done == set()
    assert [(entry.client_got, entry.forwarded) for entry in wire.log[1:]] == [("nothing", 0)] * 2
    wire.set(Refuse())
    for outcome in await asyncio.gather(*swallowed, return_exceptions=True):
        assert isinstance(outcome, psycopg.OperationalError)
    assert ids(table) == []


@pytest.mark.parametrize("stage", ["before", "after"])
def test_postgres_statement_is_delayed_and_done(wire: FaultProxy, table: str, stage: Any) -> None:
    clock = SystemClock()
    wire.next(Delay(0.2, stage), matching="insert")
    with psycopg.connect(through(wire, table), autocommit=True) as client:
        started = clock.monotonic()
        client.execute(INSERT, (1,))
        assert clock.monotonic() - started >= 0.2
    assert ids(table) == [1]


def test_postgres_connection_attempt_can_be_reset(wire: FaultProxy, table: str) -> None:
    for stage in ("before", "after"):
        wire.next(Cut(stage), matching="CONNECT")
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(through(wire, table))
    assert [entry.client_got for entry in wire.log] == ["reset", "reset"]
    assert [entry.upstream_status for entry in wire.log] == [None, "AUTHENTICATION"]


def test_postgres_mix_loses_commits_that_took_effect(wire: FaultProxy, table: str) -> None:
    """Whatever the client was told: a row is there exactly when upstream said COMMIT."""
    wire.mix(FaultMix(2, 0.7, POSTGRES_MIX, "COMMIT"))
    told = {}
    for number in range(20):
        client = psycopg.connect(through(wire, table))
        client.execute(INSERT, (number,))
        try:
            client.commit()
            told[number] = True
        except psycopg.OperationalError:
            told[number] = False
        client.close()
    commits = [entry for entry in wire.log if entry.path == "COMMIT"]
    done = [n for n, entry in enumerate(commits) if entry.upstream_status == "COMMIT"]
    assert ids(table) == done
    assert {n for n in told if told[n]} < set(done) < set(told)
