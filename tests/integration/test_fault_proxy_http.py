"""Each HTTP injector, proved by what the client saw and by what the upstream received."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from local_store.clock import SystemClock
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    CANNED,
    Answer,
    BlackHole,
    Cut,
    Delay,
    DeliverLate,
    Drip,
    Duplicate,
    Refuse,
    Throttle,
    Truncate,
    canned,
)
from tests.integration.proxy_upstream import Seen, Upstream, ask, patience_s, silence_s


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
