"""A contender of one slice of benchmarks/ack.py: our own front with the usual way to write a group.

The same door, the same group commit, the same table, checksums and durability; but each record of a
group is an execution of its own (`executemany`), where the buffer writes the group as one
statement. Each execution gives up the interpreter, and beside a thread that computes it takes up
to 5 ms to get it back. What else the buffer does for a group (locks between processes, the look at
the file, the listing behind it) is left out here, in this contender's favour.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ack_peers import NOTES, row
from local_store import Insert, op_log, opening
from local_store.appending import COLUMNS, Group
from local_store.buffer_file import WAL_FRAMES_MAX
from local_store.clock import SystemClock, isoformat, new_id
from local_store.door import accept
from local_store.fair_lock import FairLock
from local_store.group_commit import GroupCommit
from local_store.limits import StoreLimits
from local_store.memory import Memory, Proposal
from local_store.ops import Receipt, user_uuid
from local_store.schema import read_log_id

TABLES = {"notes": NOTES}
LIMITS = StoreLimits()
CLOCK = SystemClock()
_INSERT = (
    "INSERT INTO op_log (position, log, seq, user_id, txn_id, digest, accepted_at, size_bytes,"
    " total_bytes, content_crc, schemas, ops, before, children)"
    f" VALUES ({','.join('?' * COLUMNS)})"
)


class _OneByOne(Group):
    """A group whose records are written one by one, in one transaction with one sync."""

    def write(self) -> bool:
        """Put the records into the file, durably."""
        values = self._values
        records = [values[at : at + COLUMNS] for at in range(0, len(values), COLUMNS)]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(_INSERT, records)
        self._connection.execute("COMMIT")
        return bool(records)


class ExecuteMany:
    """The buffer's front and table with `executemany`."""

    def __init__(self, folder: Path) -> None:
        path = folder / opening.FILE_NAME
        self._connection = opening.open_file(path)
        opening.identify(self._connection, path, new_id())
        self._memory = Memory(LIMITS.views_bytes_max)
        self._memory.marks = op_log.read_marks(self._connection)
        self._memory.log_id = read_log_id(self._connection)
        self._front: GroupCommit[Proposal, Receipt] = GroupCommit(
            self._commit, self._checkpoint, time.monotonic
        )
        self._frames, self._lock = 0, FairLock()

    def put(self, number: int) -> None:
        """Keep a row."""
        author = user_uuid(f"user-{number % 50}")
        accepted = accept([Insert("notes", row(number))], TABLES, author, LIMITS)
        size_bytes = len(accepted.encoded)
        self._front.submit(Proposal(new_id(), False, author, accepted, size_bytes))

    def _commit(self, proposals: Sequence[Proposal]) -> list[Receipt | BaseException]:
        with self._lock:
            return self._committed(proposals)

    def _committed(self, proposals: Sequence[Proposal]) -> list[Receipt | BaseException]:
        memory = self._memory
        assert memory.marks is not None
        group = _OneByOne(
            self._connection,
            TABLES,
            memory,
            memory.marks,
            isoformat(CLOCK.now()),
            LIMITS.buffer_transactions_max,
            LIMITS.buffer_bytes_max,
            LIMITS.full_retry_after_s,
        )
        outcomes = group.add(proposals)
        group.write()
        memory.keep(group.marks, group.tail, group.changed, group.loaded)
        self._frames += len(proposals)
        return outcomes

    def _checkpoint(self) -> None:
        """Move the log into the file as often as the buffer does."""
        if self._frames > WAL_FRAMES_MAX:
            with self._lock:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                self._frames = 0

    def held(self) -> int:
        """Count the rows."""
        (count,) = self._connection.execute("SELECT count(*) FROM op_log").fetchone()
        return int(count)

    def close(self) -> None:
        """Close it."""
        self._front.close()
        self._connection.close()
