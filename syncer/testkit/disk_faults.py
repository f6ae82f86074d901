"""Disks that fail on purpose, around the real store on the real SQLite.

    with DiskFaults(folder) as disk, LocalStore.open(folder, tables=TABLES) as store:
        disk.fail_sync("-wal")                    # the next one, once
        with pytest.raises(CommitUnknown): ...
        with disk.full(): ...                     # until the block ends
        assert disk.count("sync", "-wal") == 3    # that completed

Open the store inside the block: connections opened before it are not watched. A file is named by
the end of its path: `-wal` is the write-ahead log, `.db` the database, an empty suffix any file.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Literal, Self

from local_store.clock import Clock, SystemClock
from syncer.testkit.power_loss import DiskEvent, DiskRecorder
from syncer.testkit.sqlite_vfs import CallKind, DiskCall, ShimUnavailable, watching

__all__ = [
    "DiskCall",
    "DiskEvent",
    "DiskFaults",
    "DiskRecorder",
    "DiskRule",
    "ShimUnavailable",
    "flip_bits",
]

When = Literal["before", "after"]
Step = Literal["before write", "after write", "before sync", "after sync"]


@dataclass
class DiskRule:
    """One fault: the calls it waits for, which of them it meets, and what it does to those.

    It meets the `nth` matching call and the `times - 1` after it (None: all), until released.
    `met` and `fired` count matching calls and calls it acted on.
    """

    when: When
    kind: CallKind
    suffix: str
    nth: int
    times: int | None
    act: Callable[[DiskCall], int]
    met: int = 0
    fired: int = 0
    released: bool = False

    def release(self) -> None:
        """Let everything through from now on."""
        self.released = True

    def meets(self, call: DiskCall) -> bool:
        """Count the call if it matches; tell whether the fault happens to it."""
        if self.released or call.kind != self.kind or not call.path.endswith(self.suffix):
            return False
        self.met += 1
        due = self.met >= self.nth and (self.times is None or self.met < self.nth + self.times)
        self.fired += due
        return due


class DiskFaults:
    """Faults on the files of `folder`; a context manager. Thread-safe.

    `clock` does the waiting of slow syncs.
    """

    def __init__(self, folder: str | Path, *, clock: Clock | None = None) -> None:
        self._folder = os.path.realpath(folder)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._rules: list[DiskRule] = []
        self._done: Counter[tuple[CallKind, str]] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(watching(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def fail_sync(
        self,
        suffix: str = "",
        *,
        nth: int = 1,
        times: int | None = 1,
        code: int = sqlite3.SQLITE_IOERR_FSYNC,
    ) -> DiskRule:
        """Let syncs fail with `code`; what they should have made durable isn't."""
        return self._add(DiskRule("before", "sync", suffix, nth, times, lambda _call: code))

    def fail_write(
        self,
        suffix: str = "",
        *,
        nth: int = 1,
        times: int | None = 1,
        code: int = sqlite3.SQLITE_IOERR_WRITE,
    ) -> DiskRule:
        """Let writes fail with `code`; nothing of them reaches the file."""
        return self._add(DiskRule("before", "write", suffix, nth, times, lambda _call: code))

    def fail_open(
        self,
        suffix: str = "",
        *,
        nth: int = 1,
        times: int | None = 1,
        code: int = sqlite3.SQLITE_CANTOPEN,
    ) -> DiskRule:
        """Let opening fail with `code`, as without descriptors or permissions."""
        return self._add(DiskRule("before", "open", suffix, nth, times, lambda _call: code))

    @contextmanager
    def full(self, suffix: str = "", *, overwrites_pass: bool = False) -> Iterator[DiskRule]:
        """Have no space left while the block runs: writes fail with SQLITE_FULL.

        With `overwrites_pass` only writes that lengthen a file fail, as on file systems that
        overwrite in place; without it all do, as on those that copy on write.
        """

        def refuse(call: DiskCall) -> int:
            end = call.offset + len(call.data)
            fits = overwrites_pass and end <= os.stat(call.path).st_size
            return 0 if fits else sqlite3.SQLITE_FULL

        rule = self._add(DiskRule("before", "write", suffix, 1, None, refuse))
        try:
            yield rule
        finally:
            rule.release()

    def slow_sync(self, seconds: float, suffix: str = "", *, times: int | None = None) -> DiskRule:
        """Let each sync take `seconds` longer."""

        def wait(_call: DiskCall) -> int:
            self._clock.sleep(seconds)
            return 0

        return self._add(DiskRule("before", "sync", suffix, 1, times, wait))

    def kill_at(self, step: Step, suffix: str = "", *, nth: int = 1) -> DiskRule:
        """Kill this process (SIGKILL) at the nth such step. For child processes."""

        def kill(_call: DiskCall) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        when, kind = _STEPS[step]
        return self._add(DiskRule(when, kind, suffix, nth, 1, kill))

    def count(self, kind: CallKind, suffix: str = "") -> int:
        """Return how many calls of this kind completed on files with this suffix."""
        with self._lock:
            return sum(
                times
                for (done, path), times in self._done.items()
                if done == kind and path.endswith(suffix)
            )

    def before(self, call: DiskCall) -> int:
        """Refuse or delay the call if a rule says so."""
        return self._meet("before", call)

    def after(self, call: DiskCall, code: int) -> None:
        """Count the call; rules that act afterwards act now."""
        if code == 0 and self._is_here(call):
            with self._lock:
                self._done[call.kind, call.path] += 1
            self._meet("after", call)

    def _meet(self, when: When, call: DiskCall) -> int:
        if not self._is_here(call):
            return 0
        with self._lock:
            due = [rule for rule in self._rules if rule.when == when and rule.meets(call)]
        code = 0
        for rule in due:  # outside the lock: a slow sync must not slow the other files
            code = code or rule.act(call)
        return code

    def _is_here(self, call: DiskCall) -> bool:
        return call.path.startswith(self._folder + os.sep)

    def _add(self, rule: DiskRule) -> DiskRule:
        if rule.nth < 1:
            raise ValueError("nth: calls are counted from 1")
        with self._lock:
            self._rules.append(rule)
        return rule


_STEPS: dict[Step, tuple[When, CallKind]] = {
    "before write": ("before", "write"),
    "after write": ("after", "write"),
    "before sync": ("before", "sync"),
    "after sync": ("after", "sync"),
}


def flip_bits(path: str | Path, seed: int, count: int = 1) -> list[int]:
    """Turn over `count` different bits of a file, as a bad disk would; returns their positions.

    Bit n is bit `n % 8` of byte `n // 8`.
    """
    content = bytearray(Path(path).read_bytes())
    positions = sorted(Random(seed).sample(range(len(content) * 8), count))
    for position in positions:
        content[position // 8] ^= 1 << position % 8
    with open(path, "r+b") as file:  # in place: the same inode, as seen by an open database
        file.write(content)
    return positions
