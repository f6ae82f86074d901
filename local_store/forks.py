"""Forks: what a process puts down before it is forked, so that both sides can go on.

SQLite keeps one record of each file and its locks per process, and a forked child inherits it: a
connection that the child opens itself would believe in locks that only its parent has. When the
parent then closed, it would delete the write-ahead log under the child, and what the child had
acknowledged would be gone. The record of a file ends with its last connection. So stores close
their file before a fork, and each side opens it again when it is used; what could not be closed
must not be opened by the child.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from weakref import WeakSet

Identity = tuple[int, int]
DESCRIPTORS = "/dev/fd"
KNOWN_MAX = 256  # then those that nobody has open any more are forgotten; 130 bytes each


class Forkable:
    """Something that takes part in the forks of its process, once it is registered."""

    def before_fork(self) -> None:
        """Put down what a copy of this process must not have; waits for a bounded time."""

    def after_fork_in_parent(self) -> None:
        """Take it up again."""

    def after_fork_in_child(self) -> None:
        """Forget what is the parent's. No other thread is here; the locks they held still are."""


# Of the process, as SQLite's own record is.
_registered: WeakSet[Forkable] = WeakSet()
_known: set[Identity] = set()  # files that this process, or one that it was forked from, opened
_inherited: set[Identity] = set()
_forking = threading.RLock()  # a signal's handler may fork while its own thread registers
_watches: list[bool] = []
_noting = threading.Lock()


def register(thing: Forkable) -> None:
    """Let something take part in forks for as long as it lives."""
    with _forking:
        if not _watches:
            os.register_at_fork(
                before=_before, after_in_parent=_in_parent, after_in_child=_in_child
            )
            _watches.append(True)
        _registered.add(thing)


def note(identity: Identity) -> None:
    """Note that this process has a file open, by device and inode."""
    with _noting:
        _known.add(identity)
        if len(_known) % KNOWN_MAX == 0:
            _known.intersection_update(_still_open())


def is_inherited(identity: Identity | None) -> bool:
    """Tell whether a process that this one was forked from had the file open at that moment."""
    return identity in _inherited


def _before() -> None:
    _forking.acquire()  # one fork at a time, and nobody registers meanwhile
    for thing in list(_registered):
        thing.before_fork()


def _in_parent() -> None:
    for thing in list(_registered):
        thing.after_fork_in_parent()
    _forking.release()


def _in_child() -> None:
    global _forking, _noting
    _forking, _noting = threading.RLock(), threading.Lock()
    _inherited.update(_still_open())
    for thing in list(_registered):
        thing.after_fork_in_child()


def _still_open() -> set[Identity]:
    """Return which of the known files have an open descriptor, whoever opened it."""
    try:
        numbers = os.listdir(DESCRIPTORS)
    except OSError:  # no descriptor is left to look with: then none is taken for closed
        return set(_known)
    found = set()
    for number in numbers:
        with suppress(OSError):  # that of the listing itself
            status = os.fstat(int(number))
            found.add((status.st_dev, status.st_ino))
    return found & _known
