"""`make bench`: acknowledge latency of one caller against what the same disk can do.

Interleaved rounds of three contenders on the same folder: one 4 KB append + fdatasync (the floor:
nothing durable can be cheaper), one raw sqlite3 commit (WAL, FULL) of the same bytes, and
`LocalStore.write`. Prints a table in the form of RESULTS.md.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from local_store import Column, Insert, LocalStore, TableSpec

ROUNDS, PER_ROUND = 20, 100
BODY = "The quick brown fox jumps over the lazy dog. " * 22  # about 1 KB, as a revision has

NOTES = TableSpec(
    "notes",
    {"id": Column("uuid"), "user_id": Column("uuid"), "text": Column("text")},
)


def append_and_sync(folder: Path) -> Callable[[int], None]:
    """Return the floor: a block appended and synced."""
    descriptor = os.open(folder / "append.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def op(number: int) -> None:
        os.write(descriptor, f"{number} {BODY}".encode().ljust(4096))
        os.fdatasync(descriptor)

    return op


def raw_sqlite(folder: Path) -> Callable[[int], None]:
    """Return one insert per commit, as durable as the store's."""
    connection = sqlite3.connect(folder / "raw.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT)")

    def op(number: int) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t (body) VALUES (?)", (f"{number} {BODY}",))
        connection.execute("COMMIT")

    return op


def local_store(folder: Path) -> Callable[[int], None]:
    """Return the product: log, row and counts in one durable commit."""
    store = LocalStore.open(folder / "store", tables=[NOTES])

    def op(number: int) -> None:
        store.write([Insert("notes", {"text": f"{number} {BODY}"})], user_id="bench")

    return op


def main() -> None:
    """Run the rounds and print the table."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as temporary:
        makers = (append_and_sync, raw_sqlite, local_store)
        contenders = {maker.__name__: maker(Path(temporary)) for maker in makers}
        for _ in range(ROUNDS):
            for name, op in contenders.items():
                for number in range(PER_ROUND):
                    began = time.perf_counter()
                    op(number)
                    samples.setdefault(name, []).append((time.perf_counter() - began) * 1_000)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}\n")
    print("| one caller, 1 KB | p50 ms | p99 ms | against the floor |\n|---|---|---|---|")
    floor = statistics.median(samples["append_and_sync"])
    for name, values in samples.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        print(f"| {name} | {p50:.3f} | {p99:.3f} | {p50 / floor:.2f}× |")


if __name__ == "__main__":
    main()
