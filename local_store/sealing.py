"""What leaves the buffer in segments, and what comes into one from another's.

A container's buffer dies with the container. What is sealed and shipped before can be delivered by
whoever takes the segments in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from local_store import adopting, due, figures
from local_store.buffer_file import BufferFile
from local_store.ops import PendingTransaction, TableSpec


class Sealing:
    """What a shipper and an adopter ask of the buffer."""

    _tables: Mapping[str, TableSpec]
    _file: BufferFile

    def sealable(
        self, after: int, *, transactions_max: int, bytes_max: int
    ) -> list[PendingTransaction]:
        """Return undelivered transactions behind position `after`, of one log, by position.

        Due or not; parked ones are with the server already. At least one is returned when there is
        any; `bytes_max` counts ops.
        """
        return self._file.read(
            lambda c: due.sealable(c, self._tables, after, transactions_max, bytes_max)
        )

    def seal_from(self, after: int) -> int:
        """Return behind which position to seal: `after`, or less if a merge reached behind it.

        The first one of what was merged together carries the record of all, so it is sealed with
        the others, in the form that the merge gave it.
        """
        return self._file.read(lambda c: due.seal_from(c, after))

    def undelivered_after(self, position: int) -> int:
        """Return how many undelivered transactions stand behind a position."""
        return self._file.read(lambda c: figures.undelivered_after(c, position))

    def adopt(
        self,
        transactions: Sequence[PendingTransaction],
        *,
        acknowledged_seq: int,
        schemas: Mapping[str, int],
    ) -> int:
        """Take in another buffer's transactions, of one log and in order, to deliver them.

        They keep their ids, their log and their seqs; one that is here already stays as it is.
        Returns how many are new. Meant for a buffer of its own that nobody writes to. `schemas` are
        the tables' schema versions that the ops are written in.
        """
        if not transactions:
            return 0

        def change(connection: sqlite3.Connection) -> int:
            return adopting.adopt(connection, transactions, acknowledged_seq, schemas)

        return self._file.change("an adoption", change, synced=False)  # the segments have it
