"""An outage of a day, compressed: 100,000 transactions queue up, then drain while writes go on.

Prints the probes in the outage, the acknowledgements before, in and after it, the lag
over time, memory. Real Postgres, PostgREST and supabase-py; the proxy refuses during the outage.

    python -m benchmarks.drain [--transactions 100000] [--users 200] [--json]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
from pathlib import Path
from typing import Any

import orjson

from local_store import Insert, LocalStore
from local_store.clock import SystemClock, new_id
from syncer.audit import audit
from syncer.flusher import Flusher
from syncer.remote import SupabaseRemote
from syncer.service.scheduler import FlushScheduler
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Refuse
from syncer.testkit.local_supabase import LocalSupabase

CLOCK = SystemClock()
INTERVAL_S = 1.0
WRITES_PER_S = 50  # what the application goes on writing during the drain


def main(arguments: list[str] | None = None) -> None:
    """Play the outage and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transactions", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with (
        LocalSupabase.start() as stack,
        tempfile.TemporaryDirectory(prefix="syncer-drain-") as folder,
    ):
        host, port = stack.url.removeprefix("http://").split(":")
        with FaultProxy.start(host, int(port)) as proxy:
            found = play(stack, proxy, Path(folder), given.transactions, given.users)
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() if given.json else told(found))


def play(
    stack: LocalSupabase, proxy: FaultProxy, folder: Path, transactions: int, users: int
) -> dict[str, Any]:
    """Queue while Supabase is away, then let it come back; returns what was measured."""
    remote = SupabaseRemote(proxy.url, stack.secret_key)
    found: dict[str, Any] = {"transactions": transactions, "users": users}
    with LocalStore.open(folder, tables=SESSION_TABLES) as store:
        writer = Writer(store, users)
        found["idle"] = ms(writer.measure(300))
        store_drained(store, remote)
        proxy.set(Refuse())
        calls: list[int] = []
        scheduler = FlushScheduler(
            store,
            Flusher(store, remote),
            interval_s=INTERVAL_S,
            on_report=lambda report: calls.append(report.sent) if report.sent else None,
        )
        scheduler.start()
        began = CLOCK.monotonic()
        found["outage"] = ms(writer.measure(transactions))
        found["outage_s"] = round(CLOCK.monotonic() - began, 1)
        found |= {"probes": len(calls), "queued_rss_mb": rss_mb()}
        proxy.clear()
        began = CLOCK.monotonic()
        found["pending"], latencies = watch(store, writer, began)
        took_s = CLOCK.monotonic() - began
        scheduler.stop()
        found |= {"drain": ms(latencies), "drain_s": round(took_s, 1), "rss_mb": rss_mb()}
        found["transactions_s"] = round(transactions / took_s)
        report = audit(remote, store)
        found |= {"balanced": report.balanced, "audit": report.to_json()}
    remote.close()
    return found


def told(found: dict[str, Any]) -> str:
    """Return the figures for people; latencies are those of an acknowledgement."""
    times = {
        name: "{p50:.2f}/{p99:.2f} ms".format(**found[name]) for name in ("idle", "outage", "drain")
    }
    return "\n".join(
        [
            f"queued {found['transactions']} in {found['outage_s']:.0f} s:"
            f" acknowledged p50/p99 {times['outage']}",
            f"probes in the outage: {found['probes']} (breaker interval 5 s)",
            f"drained in {found['drain_s']:.0f} s: {found['transactions_s']} transactions/s",
            f"acknowledged during the drain p50/p99 {times['drain']}; idle {times['idle']}",
            f"pending every two seconds: {' '.join(map(str, found['pending']))}",
            f"memory (RSS max): {found['queued_rss_mb']:.0f} MB queued,"
            f" {found['rss_mb']:.0f} MB after the drain",
            f"audit: {'balanced' if found['balanced'] else found['audit']}",
        ]
    )


def store_drained(store: LocalStore, remote: SupabaseRemote) -> None:
    """Deliver what is there."""
    flusher = Flusher(store, remote)
    while flusher.flush_once().stopped != "empty":
        pass


def watch(store: LocalStore, writer: Writer, began: float) -> tuple[list[int], list[float]]:
    """Write on while the queue drains; returns the lag each two seconds and the latencies."""
    lags: list[int] = []
    latencies: list[float] = []
    done = threading.Event()

    def write_on() -> None:
        while not done.wait(1 / WRITES_PER_S):
            latencies.append(writer.write())

    thread = threading.Thread(target=write_on)
    thread.start()
    while (pending := store.stats()["pending"]) > WRITES_PER_S:
        lags.append(pending)
        CLOCK.sleep(2.0)
        if CLOCK.monotonic() - began > 900:
            break
    done.set()
    thread.join()
    return lags, latencies


class Writer:
    """Writes sessions and revisions of many users."""

    def __init__(self, store: LocalStore, users: int) -> None:
        self._store = store
        self._users = [f"github:{number}" for number in range(users)]
        self._sessions: dict[str, str] = {}
        self._count = 0

    def write(self) -> float:
        """Make one write; returns its seconds."""
        self._count += 1
        user = self._users[self._count % len(self._users)]
        session = self._sessions.get(user)
        if session is None or self._count % 50 == 0:
            session = self._sessions[user] = new_id()
            op = Insert("sessions", {"id": session, "metadata": {"n": self._count}})
        else:
            op = Insert(
                "session_revisions",
                {
                    "session_id": session,
                    "content": f"{self._count} " + "x" * 800,
                    "revision_type": "manual_edit",
                },
            )
        began = CLOCK.monotonic()
        self._store.write([op], user_id=user)
        return CLOCK.monotonic() - began

    def measure(self, count: int) -> list[float]:
        """Return the seconds of `count` writes."""
        return [self.write() for _ in range(count)]


def ms(seconds: list[float]) -> dict[str, float]:
    """Return p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return {"p50": round(p50 * 1e3, 2), "p99": round(p99 * 1e3, 2)}


def rss_mb() -> float:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
