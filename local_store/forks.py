"""Which buffer files this process and those it was forked from have open.

SQLite keeps one record of each file and its locks per process, and a forked child inherits it: a
connection that the child opens itself believes in locks that only its parent has. When the parent
then closes, it deletes the write-ahead log under the child, and what the child acknowledges goes
nowhere. The record can't be cleared, so a child must not open what it inherited.
"""

from __future__ import annotations

import os

Identity = tuple[int, int]

# Of the process, as SQLite's own is; a fork copies both.
_opened: list[tuple[int, Identity | None]] = []


def note(identity: Identity | None) -> None:
    """Note that this process opened a file, by device and inode."""
    _opened.append((os.getpid(), identity))


def forget(identity: Identity | None) -> None:
    """Note that this process closed the file, once."""
    _opened.remove((os.getpid(), identity))


def is_inherited(identity: Identity | None) -> bool:
    """Tell whether a process that this one was forked from had the file open at that moment."""
    return any(pid != os.getpid() and known == identity for pid, known in _opened)
