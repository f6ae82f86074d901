"""The API's latencies with 10,000 sessions stored: Supabase up, slow, down; 1 and 50 clients.

The same app in two processes, on the buffer and on SupabaseSessionStore, measured in turns on one
local Supabase; what makes that slow or lets it go down is a proxy, which isn't there while it is
up. The 50 clients make a call each per second, as people do; one client makes its calls back to
back. The clients are a process of their own (api_clients.py).

    python -m benchmarks.api [--write] [--json] [--sessions 10000] [--calls 150] [--seconds 40]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson

from benchmarks.api_clients import FIRST, LISTED, LISTERS, OPS, Client, Order, Samples
from local_store.clock import SystemClock
from syncer.testkit.api_process import free_port
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Delay, Fault, Refuse
from syncer.testkit.local_supabase import LocalSupabase

CLOCK = SystemClock()
RESULTS = Path(__file__).parent / "RESULTS.md"
USERS = 50
SEEDERS = 8
SLOW_S = 0.3
PACES_S = (1.0, 0.5, 0.25)  # between two calls of each of the 50 clients
LIMITS_MS = {op: 200 if op == "get" else 500 for op in (*OPS, FIRST)}
SLOWER = f"{SLOW_S * 1_000:.0f} ms slower"
FAULTS: dict[str, Fault] = {SLOWER: Delay(SLOW_S), "down": Refuse()}
PARTS = ("server", "Supabase", "clients")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
Line = dict[str, Any]  # of a table, by column


@dataclass(frozen=True)
class Api:
    """A running server: its store, its process, its port."""

    store: str
    pid: int
    port: int

    def order(self, tokens: list[str], **more: float) -> Order:
        """Return an order for clients of this server."""
        return Order("127.0.0.1", self.port, tokens, **more)  # type: ignore[arg-type]


@contextmanager
def api(kind: str, stack: LocalSupabase, url: str, folder: Path) -> Iterator[Api]:
    """Run the app on a store of this kind, with Supabase at a URL."""
    port = free_port()
    env = {
        **os.environ,
        **stack.env(),
        "SUPABASE_URL": url,
        "SYNCER_DATA_DIR": str(folder / kind),
        "SYNCER_PORT": str(port),
        "SYNCER_WATCH_INTERVAL_S": "0",
        "SYNCER_LOG_LEVEL": "warning",
    }
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.api_server", kind], env=env)
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/health/ready").is_success)
        yield Api("buffer" if kind == "buffered" else "none", process.pid, port)
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


async def seed(order: Order, sessions: int) -> None:
    """Store sessions through the API: 1000 of each lister, the other users' in equal parts."""
    users = [number for number in range(LISTERS) for _ in range(LISTED)]
    users += [LISTERS + n % (USERS - LISTERS) for n in range(max(0, sessions - len(users)))]

    async def store(part: list[int]) -> None:
        clients = {number: Client(order, order.tokens[number]) for number in set(part)}
        for number in part:
            assert await clients[number].call("create")

    await asyncio.gather(*(store(users[n::SEEDERS]) for n in range(SEEDERS)))


def measured(order: Order) -> Samples:
    """Let the clients carry out an order in their own process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.api_clients"],
        input=orjson.dumps(asdict(order)),
        stdout=subprocess.PIPE,
        check=True,
    )
    return Samples(**orjson.loads(done.stdout))


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and its descendants have used."""
    try:
        used = sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )
        below = [
            int(p)
            for f in Path(f"/proc/{pid}/task").glob("*/children")
            for p in f.read_text().split()
        ]
    except OSError:  # it has ended
        return 0.0
    return used * TICK_S + sum(map(cpu_s, below))


def p95(values: list[float]) -> float:
    """Return the value that 95 of 100 don't exceed."""
    return sorted(values)[int(len(values) * 0.95)]


def lines_of(store: str, condition: str, clients: str, samples: Samples) -> list[Line]:
    """Return the table's part of one measurement."""
    lines: list[Line] = []
    for op in (*OPS, FIRST):
        values = sorted(samples.ms.get(op, ()))
        if not values:
            continue
        shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
        lines.append(
            {
                "call": op,
                "clients": clients,
                "supabase": condition,
                "buffer": store,
                **{name: values[int(len(values) * share)] for name, share in shares.items()},
                "calls": len(values),
                "failed": samples.failed.get(op, 0),
            }
        )
    return lines


def as_row(line: Line) -> str:
    """Return a line of the table; its last column: how often the plan's limit, or what failed."""
    share = f"{line['failed']} of {line['calls']} failed" if line["failed"] else ""
    if not line["failed"] and line["buffer"] == "buffer":
        share = f"{LIMITS_MS[line['call']] // line['p95_ms']:.0f}×"
    times = " | ".join(f"{line[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
    return (
        f"| {line['call']} | {line['clients']} | {line['supabase']} | {line['buffer']}"
        f" | {times} | {share} |"
    )


def as_load(line: Line) -> str:
    """Return a line of the table of loads."""
    times = [f"{line['p95_ms'][op]:.1f}" for op in OPS]
    shares = [f"{share * 100:.0f} %" for share in line["cores"].values()]
    return f"| {line['calls_s']:.0f} | {' | '.join([*times, *shares])} |"


class Play:
    """The servers on one stack, and what is measured of them."""

    def __init__(self, stack: LocalSupabase, apis: list[Api], calls: int, seconds: float) -> None:
        self._stack, self._apis = stack, apis
        self._calls, self._seconds = calls, seconds
        self._buffered = next(api for api in apis if api.store == "buffer")
        self._tokens = [stack.user_token(f"github:{number}") for number in range(USERS)]

    def seed(self, sessions: int) -> None:
        """Store the sessions on the buffer and wait until Supabase has them."""
        asyncio.run(seed(self._buffered.order(self._tokens), sessions))
        health = f"http://127.0.0.1:{self._buffered.port}/health"
        until(lambda: bool(httpx.get(health).json()["pending"] == 0))

    def latencies(self, condition: str) -> list[Line]:
        """Measure in one condition, the stores in turns."""
        lines: list[Line] = []
        for clients in ("1", "50"):
            for api in self._apis:
                samples = measured(self._order(api, clients, condition))
                found = lines_of(api.store, condition, clients, samples)
                print("\n".join(map(as_row, found)), file=sys.stderr, flush=True)
                lines += found
        return lines

    def _order(self, api: Api, clients: str, condition: str) -> Order:
        """Of what takes its time by design, the order is for less."""
        slowly = (api.store != "buffer") + (condition == SLOWER)
        if clients == "1":
            return api.order(self._tokens[:1], calls=max(10, self._calls // (1, 3, 10)[slowly]))
        seconds = self._seconds / (1 if api.store == "buffer" else 2)
        return api.order(self._tokens, seconds=seconds)

    def loads(self) -> list[Line]:
        """Measure p95 at rising loads on the buffer, with each part's share of a core."""
        lines: list[Line] = []
        for pace_s in PACES_S:
            order = self._buffered.order(self._tokens, seconds=self._seconds / 2, pace_s=pace_s)
            before, began = self._cpu_s(), CLOCK.monotonic()
            found = measured(order)
            took_s = CLOCK.monotonic() - began
            used = [now - was for now, was in zip(self._cpu_s(), before, strict=True)]
            lines.append(
                {
                    "calls_s": USERS / pace_s,
                    "p95_ms": {op: p95(found.ms[op]) for op in OPS},
                    "cores": {part: s / took_s for part, s in zip(PARTS, used, strict=True)},
                }
            )
            print(as_load(lines[-1]), file=sys.stderr, flush=True)
        return lines

    def _cpu_s(self) -> tuple[float, float, float]:
        """Return what the server, Supabase and ended clients have used."""
        clients = os.times()
        used = clients.children_user + clients.children_system
        return cpu_s(self._buffered.pid), sum(map(cpu_s, self._stack.pids())), used


def play(sessions: int, calls: int, seconds: float) -> tuple[list[Line], list[Line]]:
    """Measure all; returns the lines of the two tables."""
    with tempfile.TemporaryDirectory(dir=".") as name, LocalSupabase.start() as stack:
        host, port = stack.url.removeprefix("http://").split(":")

        @contextmanager
        def playing(url: str) -> Iterator[Play]:
            with (
                api("buffered", stack, url, Path(name)) as buffered,
                api("supabase", stack, url, Path(name)) as direct,
            ):
                yield Play(stack, [buffered, direct], calls, seconds)

        with playing(stack.url) as run:
            run.seed(sessions)
            lines, loads = run.latencies("up"), run.loads()
        with FaultProxy.start(host, int(port)) as proxy, playing(proxy.url) as run:
            for condition, fault in FAULTS.items():
                proxy.set(fault)
                lines += run.latencies(condition)
    lines.sort(key=lambda line: str(line["buffer"]))  # the buffer's first
    return lines, loads


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write into RESULTS.md between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=40.0)
    given = parser.parse_args(arguments)
    latencies, loads = play(given.sessions, given.calls, given.seconds)
    today = datetime.now(UTC).date()
    text = "\n".join(
        [
            f"{today}, {platform.machine()}, {os.cpu_count()} cores, Python"
            f" {platform.python_version()}; {given.sessions:,} sessions stored. Postgres, PostgREST"
            " and the clients run on the same cores. 50 clients make 50 calls a second, whatever"
            " became of those before. Milliseconds; the last column: how often the plan's limit"
            " for p95 is met, or what failed.",
            "",
            "| call | clients | Supabase | buffer | p50 | p95 | p99 | |",
            "|---|---|---|---|---|---|---|---|",
            *map(as_row, latencies),
            "",
            "The p95 in ms of 50 clients that make more calls, Supabase up, and the share of a"
            " core that each part takes:",
            "",
            f"| calls/s | {' | '.join(OPS)} | {' | '.join(PARTS)} |",
            f"|{'---|' * (1 + len(OPS) + len(PARTS))}",
            *map(as_load, loads),
        ]
    )
    if given.json:
        document = {"sessions": given.sessions, "calls": latencies, "loads": loads}
        print(orjson.dumps(document).decode())
    elif not given.write:
        print(text)
    if not given.write:
        return
    before, _, rest = RESULTS.read_text().partition("<!-- api -->")
    _, _, after = rest.partition("<!-- /api -->")
    RESULTS.write_text(f"{before}<!-- api -->\n{text}\n<!-- /api -->{after}")


if __name__ == "__main__":
    main()
