"""The contenders of benchmarks/ack.py: each puts a row of about 1 KB, and says how many it holds.

`durable` ones survive a power loss when `put` has returned; the others are shown as shipped,
because that is what their users have.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

import orjson

from local_store import Column, Insert, LocalStore, TableSpec

BODY = "x" * 900
NOTES = TableSpec(
    "notes",
    {
        "id": Column("uuid"),
        "user_id": Column("uuid"),
        "updated_at": Column("timestamp"),
        "text": Column("text"),
        "number": Column("int"),
    },
)


class Contender(Protocol):
    """Something that keeps rows."""

    def put(self, number: int) -> None:
        """Keep a row; the number makes its content unlike any other."""

    def held(self) -> int:
        """Return how many rows are kept."""

    def close(self) -> None:
        """Close it."""


def row(number: int) -> dict[str, Any]:
    """Return a row unlike any other: SQLite skips identical overwrites."""
    return {"text": f"{number:09}{BODY}", "number": number}


class Syncer:
    """LocalStore, which has no other mode."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore.open(folder, tables=[NOTES])

    def put(self, number: int) -> None:
        """Keep a row."""
        self.store.write([Insert("notes", row(number))], user_id=f"user-{number % 50}")

    async def put_async(self, number: int) -> None:
        """Keep a row without blocking the loop."""
        await self.store.write_async([Insert("notes", row(number))], user_id=f"user-{number % 50}")

    def held(self) -> int:
        """Count the rows."""
        return int(self.store.stats()["pending"])

    def close(self) -> None:
        """Close it."""
        self.store.close()


class Floor:
    """Append 4 KB to a file and sync it: what a disk asks of anything durable."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / "floor", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._lock = threading.Lock()

    def put(self, number: int) -> None:
        """Keep a row."""
        with self._lock:
            os.write(self._descriptor, f"{number:09}".encode() + b"x" * 4_087)
            os.fdatasync(self._descriptor)

    def held(self) -> int:
        """Count the rows."""
        return os.fstat(self._descriptor).st_size // 4_096

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


class RawSqlite:
    """One connection behind a lock, one transaction per row."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "raw.db", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        self._db.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, body TEXT)")

    def put(self, number: int) -> None:
        """Keep a row."""
        encoded = orjson.dumps(row(number)).decode()
        with self._lock:
            self._db.execute("INSERT INTO t (body) VALUES (?)", (encoded,))

    def held(self) -> int:
        """Count the rows."""
        return int(self._db.execute("SELECT count(*) FROM t").fetchone()[0])

    def close(self) -> None:
        """Close it."""
        self._db.close()


class PersistQueue:
    """persist-queue's SQLiteQueue; forced: synchronous=FULL on the connection that puts."""

    def __init__(self, folder: Path, *, forced: bool) -> None:
        from persistqueue import SQLiteQueue

        self._queue = SQLiteQueue(str(folder), auto_commit=True, multithreading=True)
        if forced:
            self._queue._putter.execute("PRAGMA synchronous = FULL")

    def put(self, number: int) -> None:
        """Keep a row."""
        self._queue.put(row(number))

    def held(self) -> int:
        """Count the rows."""
        return int(self._queue.size)

    def close(self) -> None:
        """Close it."""
        self._queue.close()


class LiteQueue:
    """litequeue, behind a lock as its one connection wants; forced: synchronous=FULL."""

    def __init__(self, folder: Path, *, forced: bool) -> None:
        from litequeue import LiteQueue as Queue

        self._lock, self._queue = threading.Lock(), Queue(str(folder / "lite.db"))
        if forced:
            self._queue.conn.execute("PRAGMA synchronous = FULL")

    def put(self, number: int) -> None:
        """Keep a row."""
        encoded = orjson.dumps(row(number)).decode()
        with self._lock:
            self._queue.put(encoded)

    def held(self) -> int:
        """Count the rows."""
        return int(self._queue.qsize())

    def close(self) -> None:
        """Close it."""
        self._queue.close()


class Huey:
    """huey's SqliteStorage, a connection per thread; forced: fsync=True."""

    def __init__(self, folder: Path, *, forced: bool) -> None:
        from huey.storage import SqliteStorage

        options = {"fsync": True} if forced else {}
        self._storage = SqliteStorage("bench", filename=str(folder / "huey.db"), **options)

    def put(self, number: int) -> None:
        """Keep a row."""
        self._storage.enqueue(orjson.dumps(row(number)))

    def held(self) -> int:
        """Count the rows."""
        return int(self._storage.queue_size())

    def close(self) -> None:
        """Close it."""
        self._storage.close()


class DiskCache:
    """diskcache's Deque over a Cache; forced: sqlite_synchronous=2."""

    def __init__(self, folder: Path, *, forced: bool) -> None:
        from diskcache import Cache, Deque

        options = {"sqlite_synchronous": 2} if forced else {}
        # no eviction, as the Deque has it that makes its own Cache: nothing may be culled
        self._cache = Cache(str(folder), eviction_policy="none", **options)
        self._deque = Deque.fromcache(self._cache)

    def put(self, number: int) -> None:
        """Keep a row."""
        self._deque.append(row(number))

    def held(self) -> int:
        """Count the rows."""
        return len(self._deque)

    def close(self) -> None:
        """Close it."""
        self._cache.close()


class QueueLib:
    """queuelib's FifoDiskQueue behind a lock; forced: fdatasync after each push.

    Kindly counted as durable then: its index (info.json) is written only when it is closed, so
    that after a power loss the rows are in its file and the queue opens empty.
    """

    def __init__(self, folder: Path, *, forced: bool) -> None:
        from queuelib import FifoDiskQueue

        # forced: one file, since the last row of a full one could not be synced from here
        options = {"chunksize": 1 << 30} if forced else {}
        self._lock, self._queue = threading.Lock(), FifoDiskQueue(str(folder / "fifo"), **options)
        self._forced = forced

    def put(self, number: int) -> None:
        """Keep a row."""
        encoded = orjson.dumps(row(number))
        with self._lock:
            self._queue.push(encoded)
            if self._forced:
                os.fdatasync(self._queue.headf.fileno())

    def held(self) -> int:
        """Count the rows."""
        return len(self._queue)

    def close(self) -> None:
        """Close it."""
        self._queue.close()


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender by name; `package` is what has to be installed for it."""

    make: Callable[[Path], Contender]
    durable: bool
    package: str | None = None


def syncs_by_default(options: Iterable[str]) -> bool:
    """Tell by its compile options whether this SQLite syncs every WAL commit without a pragma.

    It does unless it was built with SQLITE_DEFAULT_WAL_SYNCHRONOUS=1; peers that set none
    (persist-queue, huey) are durable as shipped then.
    """
    built = dict(option.partition("=")[::2] for option in options)
    return int(built.get("DEFAULT_WAL_SYNCHRONOUS", built.get("DEFAULT_SYNCHRONOUS", "2"))) >= 2


def _compile_options() -> list[str]:
    with closing(sqlite3.connect(":memory:")) as db:
        return [str(option) for (option,) in db.execute("PRAGMA compile_options")]


BY_DEFAULT = syncs_by_default(_compile_options())
CONTENDERS: dict[str, Entry] = {
    "syncer": Entry(Syncer, True),
    "floor: append 4 KB + fdatasync": Entry(Floor, True),
    "raw sqlite3, FULL": Entry(lambda folder: RawSqlite(folder, "FULL"), True),
    "raw sqlite3, NORMAL": Entry(lambda folder: RawSqlite(folder, "NORMAL"), False),
}
for name, kind, package, shipped in (
    ("persist-queue", PersistQueue, "persist-queue", BY_DEFAULT),
    ("litequeue", LiteQueue, "litequeue", False),
    ("huey", Huey, "huey", BY_DEFAULT),
    ("diskcache", DiskCache, "diskcache", False),
    ("queuelib", QueueLib, "queuelib", False),
):
    for forced in (False, True):
        label = f"{name}, {'forced' if forced else 'as shipped'}"
        CONTENDERS[label] = Entry(partial(kind, forced=forced), forced or shipped, package)


def is_installed(entry: Entry) -> bool:
    """Tell whether a contender's package is here."""
    try:
        return entry.package is None or bool(distribution(entry.package))
    except PackageNotFoundError:
        return False
