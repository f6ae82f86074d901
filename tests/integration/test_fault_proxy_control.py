"""Orders, mixes, the control API and the command line of the fault proxy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    HTTP_MIX,
    POSTGRES_MIX,
    Answer,
    BlackHole,
    Cut,
    Delay,
    DeliverLate,
    Fault,
    FaultMix,
    InvalidFault,
    LoseCommitReply,
    Refuse,
    Throttle,
    canned,
    decide,
)
from syncer.testkit.proxy_control import dump_fault, dump_mix, parse_fault, parse_mix
from tests.integration.proxy_upstream import Upstream, ask, patience_s


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
