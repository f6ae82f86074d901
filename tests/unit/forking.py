"""Real forks of a test's own process; a child answers by its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from local_store import LocalStore
from tests.unit.buffer_tables import TABLES

DEADLINE_S = 60
HANGS_S = 30  # a child that takes longer is ended by its alarm


def forked(child: Callable[[], None], fork: Callable[[], int] = os.fork) -> int:
    """Run `child` in a forked process; returns its process id."""
    pid = fork()
    if pid == 0:
        try:
            signal.alarm(HANGS_S)
            child()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    return pid


def ended(pid: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Line:
    """A pipe through which one process tells another that it has come to some point."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def tell(self, what: str = "go") -> None:
        os.write(self.writer, what.encode() + b"\n")

    def hear(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            found += os.read(self.reader, 1)
        return found.decode().strip()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        os.close(self.writer)


def assert_whole(folder: Path, acknowledged: set[str] | int) -> None:
    """Every acknowledged transaction is there, once, and the log has no gap and no loss."""
    with LocalStore.open(folder, tables=TABLES) as store:
        found = store.undelivered(limit=-1)  # not a batch of them only
        assert [txn.seq for txn in found] == list(range(1, len(found) + 1))
        assert len({txn.txn_id for txn in found}) == len(found)
        assert store.damage() == {"quarantined": 0, "lost": 0, "files": []}
        if isinstance(acknowledged, int):
            assert len(found) == acknowledged
        else:
            assert {txn.txn_id for txn in found} == acknowledged
