"""How far a log was acknowledged, kept outside the buffer file.

A write-ahead log that is deleted, cut or zeroed leaves a database that opens without a complaint
and is older than it was. The mark is written behind each group without a sync of its own: it may
lag after a power loss, and never leads.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import uuid
import zlib
from pathlib import Path

FILE_NAME = "acknowledged"
_FORM = struct.Struct(">16sQ")
_CRC = struct.Struct(">I")
_SIZE = _FORM.size + _CRC.size


class HighWater:
    """The highest acknowledged seq of the newest log in a folder."""

    def __init__(self, folder: Path) -> None:
        # Mapped: a write to the file would wait for the file system's journal, which the syncs of
        # the buffer keep busy.
        with open(os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            if os.fstat(file.fileno()).st_size < _SIZE:
                os.posix_fallocate(file.fileno(), 0, _SIZE)  # a hole could be refused a block later
            self._mapped = mmap.mmap(file.fileno(), _SIZE)
        self._lock = threading.Lock()
        self._named, self._name = "", b""

    def read(self) -> tuple[str, int] | None:
        """Return (log_id, seq); None when there is no mark, or a torn one."""
        found = self._mapped[:_SIZE]
        body, crc = found[: _FORM.size], found[_FORM.size :]
        if _CRC.unpack(crc)[0] != zlib.crc32(body):
            return None
        log, seq = _FORM.unpack(body)
        return str(uuid.UUID(bytes=log)), seq

    def write(self, log_id: str, seq: int) -> None:
        """Note that `seq` is durable."""
        if log_id != self._named:
            self._named, self._name = log_id, uuid.UUID(log_id).bytes
        body = _FORM.pack(self._name, seq)
        with self._lock:
            if not self._mapped.closed:
                self._mapped[:_SIZE] = body + _CRC.pack(zlib.crc32(body))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._mapped.close()
