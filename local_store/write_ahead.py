"""The write-ahead log moved into the file, and who keeps that from being done.

A reader that stays in one transaction needs the file as it was: meanwhile the log only grows.
Writes go on, up to the room that is kept free on the disk; so it has to be told, not prevented.
"""

from __future__ import annotations

import logging
import sqlite3

_log = logging.getLogger(__name__)

PINNED_PAGES_MAX = 4_000  # 16 MB: four checkpoints in a row had to leave off


def checkpoint(connection: sqlite3.Connection, was_pinned: bool) -> bool:
    """Move what no reader still needs; returns whether somebody pins a long log, told once.

    The next commit after the reader's end begins the log anew and cuts its file.
    """
    _, pages, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    is_pinned = int(pages) - int(moved) > PINNED_PAGES_MAX
    if is_pinned and not was_pinned:
        _log.warning(
            "the write-ahead log can't be moved into the file: it is at %d pages, and another"
            " connection has been reading one old state of the file all the while; end it",
            pages,
        )
    return is_pinned
