"""The API's latencies with 10,000 sessions stored: Supabase up, slow, down; 1 and 50 clients.

The same app, in a process of its own, once on the buffer and once on SupabaseSessionStore, in turns
on one local Supabase behind the fault proxy. The 50 clients make a call each per second, as people
do; one client makes its calls back to back.

    python -m benchmarks.api [--write] [--json] [--sessions 10000] [--calls 150]
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
import orjson

from local_store.clock import SystemClock
from syncer.testkit.api_process import free_port
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Delay, Refuse
from syncer.testkit.local_supabase import LocalSupabase

CLOCK = SystemClock()
RESULTS = Path(__file__).parent / "RESULTS.md"
OPS = ("create", "resolve", "get", "page of 50", "list of 1000")
LISTED = 1_000  # sessions of the user whose list is read
USERS = 50
SLOW_S = 0.3
PACE_S = 1.0
Line = dict[str, Any]  # of the table, by column
LIMITS_MS = {"create": 500, "resolve": 500, "get": 200, "page of 50": 500, "list of 1000": 500}


@dataclass
class Samples:
    """Latencies in ms by op, and calls that weren't answered with 2xx."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Reply:
    """What a call was answered with."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        """Tell whether it succeeded."""
        return 200 <= self.status < 300


class Client:
    """One user of the API, on one connection.

    Of the standard library, which leaves the answer's bytes as they come: some megabytes, which
    other clients take as long to take apart as the server to send.
    """

    def __init__(self, url: str, stack: LocalSupabase, number: int) -> None:
        self._http = HTTPConnection(url.removeprefix("http://"), timeout=60.0)
        self._headers = {
            "Authorization": f"Bearer {stack.user_token(f'github:{number}')}",
            "Content-Type": "application/json",
        }
        self._made: list[dict[str, Any]] = []

    def call(self, op: str) -> Reply:
        """Make one call of a kind."""
        if op == "create":
            reply = self._ask("POST", "/api/sessions", {"prompt": "Sort a list by ???"})
            if reply.ok:
                self._made.append(orjson.loads(reply.body))
            return reply
        if op == "resolve":
            session = self._made[-1]
            hole = session["current_draft"]["ambiguities"][0]
            path = f"/api/sessions/{session['session_id']}/holes/{hole}/resolve"
            return self._ask("POST", path, {"resolution_text": "by name"})
        if op == "get":
            return self._ask("GET", f"/api/sessions/{self._made[-1]['session_id']}")
        return self._ask("GET", f"/api/sessions?limit={LISTED if op == 'list of 1000' else 50}")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        content = None if body is None else orjson.dumps(body)
        self._http.request(method, path, content, self._headers)
        reply = self._http.getresponse()
        return Reply(reply.status, reply.read())

    def measure(self, op: str, samples: Samples) -> None:
        """Make one call and note what it took."""
        began = CLOCK.monotonic()
        try:
            ok = self.call(op).ok
        except (HTTPException, OSError):
            self._http.close()
            ok = False
        except IndexError:  # there is no session to call
            ok = False
        samples.ms[op].append((CLOCK.monotonic() - began) * 1_000)
        samples.failed[op] += not ok


@contextmanager
def api(kind: str, stack: LocalSupabase, proxy: FaultProxy, folder: Path) -> Any:
    """Run the app on a store of this kind; yields its address."""
    port = free_port()
    env = {
        **os.environ,
        **stack.env(),
        "SUPABASE_URL": proxy.url,
        "SYNCER_DATA_DIR": str(folder / kind),
        "SYNCER_PORT": str(port),
        "SYNCER_WATCH_INTERVAL_S": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.api_server", kind], env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: httpx.get(f"{url}/health/ready").is_success)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def until(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Wait for something of the server."""
    end = CLOCK.monotonic() + timeout_s
    while CLOCK.monotonic() < end:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        CLOCK.sleep(0.1)
    raise TimeoutError("did not happen in time")


def seed(url: str, stack: LocalSupabase, sessions: int) -> None:
    """Store sessions through the API: 1000 of the first user, the others' in equal parts."""
    users = [0] * LISTED + [1 + n % (USERS - 1) for n in range(max(0, sessions - LISTED))]
    parts = [users[n::8] for n in range(8)]

    def store(part: list[int]) -> None:
        clients = {number: Client(url, stack, number) for number in sorted(set(part))}
        for number in part:
            assert clients[number].call("create").ok

    threads = [threading.Thread(target=store, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_client(url: str, stack: LocalSupabase, calls: int) -> Samples:
    """Call back to back, the kinds in turn."""
    samples, client = Samples(), Client(url, stack, 0)
    for number in range(calls):
        for op in OPS:
            if op != "list of 1000" or number % 3 == 0:
                client.measure(op, samples)
    return samples


def fifty_clients(url: str, stack: LocalSupabase, seconds: float) -> Samples:
    """Each client makes a call per second, at its own moment of it."""
    found = [Samples() for _ in range(USERS)]
    clients = [Client(url, stack, number) for number in range(USERS)]
    for client in clients:
        client.measure("create", Samples())  # its connection, its token, the user's buffer
    began = CLOCK.monotonic()

    def use(number: int) -> None:
        client = clients[number]
        due = began + number / USERS * PACE_S
        turn = 0
        while due < began + seconds:
            CLOCK.sleep(max(0.0, due - CLOCK.monotonic()))
            kinds = OPS if number == 0 else OPS[:4]
            client.measure(kinds[turn % len(kinds)], found[number])
            turn, due = turn + 1, due + PACE_S

    threads = [threading.Thread(target=use, args=(number,)) for number in range(USERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Samples()
    for samples in found:
        for op, values in samples.ms.items():
            total.ms[op] += values
            total.failed[op] += samples.failed[op]
    return total


def rows_of(store: str, condition: str, clients: str, samples: Samples) -> list[Line]:
    """Return one measurement's part of the table."""
    lines: list[Line] = []
    for op in OPS:
        values = sorted(samples.ms[op])
        if not values:
            continue
        p50, p95, p99 = (values[int(len(values) * share)] for share in (0.5, 0.95, 0.99))
        lines.append(
            {
                "call": op,
                "clients": clients,
                "supabase": condition,
                "buffer": store,
                "p50_ms": p50,
                "p95_ms": p95,
                "p99_ms": p99,
                "calls": len(values),
                "failed": samples.failed[op],
            }
        )
    return lines


def as_row(line: Line) -> str:
    """Return a line of the table; its last column: how often the plan's limit, or what failed."""
    share = f"{line['failed']} of {line['calls']} failed" if line["failed"] else ""
    if not line["failed"] and line["buffer"] == "buffer":
        share = f"{LIMITS_MS[line['call']] / line['p95_ms']:.0f}×"
    times = " | ".join(f"{line[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
    return (
        f"| {line['call']} | {line['clients']} | {line['supabase']} | {line['buffer']}"
        f" | {times} | {share} |"
    )


def play(sessions: int, calls: int, seconds: float) -> list[Line]:
    """Measure all; returns the lines of the table."""
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=".") as name, LocalSupabase.start() as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        with FaultProxy.start(host, int(port)) as proxy:
            for kind, store in (("buffered", "buffer"), ("supabase", "none")):
                with api(kind, stack, proxy, Path(name)) as url:
                    if kind == "buffered":
                        seed(url, stack, sessions)
                        until(lambda: httpx.get(f"{url}/health").json()["pending"] == 0)
                    lines += measure_all(url, stack, proxy, store, calls, seconds)
    return lines


def measure_all(
    url: str, stack: LocalSupabase, proxy: FaultProxy, store: str, calls: int, seconds: float
) -> list[Line]:
    """Measure one app in each condition."""
    lines: list[Line] = []
    conditions = (("up", None), ("300 ms slower", Delay(SLOW_S)), ("down", Refuse()))
    for condition, fault in conditions:
        proxy.clear()
        if fault is not None:
            proxy.set(fault)
        fewer = calls if store == "buffer" or condition == "up" else max(10, calls // 10)
        lines += rows_of(store, condition, "1", one_client(url, stack, fewer))
        lines += rows_of(store, condition, "50", fifty_clients(url, stack, seconds))
        print(f"{store}, {condition}: measured", file=sys.stderr, flush=True)
    proxy.clear()
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write into RESULTS.md between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args(arguments)
    sys.setswitchinterval(0.0005)  # the clients share this process, not each other's time
    lines = play(given.sessions, given.calls, given.seconds)
    today = datetime.now(UTC).date()
    text = "\n".join(
        [
            f"{today}, {platform.machine()}, {os.cpu_count()} cores, Python"
            f" {platform.python_version()}; {given.sessions:,} sessions stored. Milliseconds; the"
            " last column: how often the plan's limit for p95 is met, or what failed.",
            "",
            "| call | clients | Supabase | buffer | p50 | p95 | p99 | |",
            "|---|---|---|---|---|---|---|---|",
            *map(as_row, lines),
        ]
    )
    if given.json:
        print(orjson.dumps({"sessions": given.sessions, "calls": lines}).decode())
    elif not given.write:
        print(text)
    if not given.write:
        return
    before, _, rest = RESULTS.read_text().partition("<!-- api -->")
    _, _, after = rest.partition("<!-- /api -->")
    RESULTS.write_text(f"{before}<!-- api -->\n{text}\n<!-- /api -->{after}")


if __name__ == "__main__":
    main()
