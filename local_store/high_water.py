"""How far a log was acknowledged, kept outside the buffer file.

A write-ahead log that is deleted, cut or zeroed leaves a database that opens without a complaint
and is older than it was. The mark is written behind each group without a sync of its own: it may
lag after a power loss, and never leads.
"""

from __future__ import annotations

import os
import struct
import threading
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

FILE_NAME = "acknowledged"
_FORM = struct.Struct(">16sQ")
_CRC = struct.Struct(">I")


class HighWater:
    """The highest acknowledged seq of the newest log in a folder."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        self._lock = threading.Lock()  # a number that was closed may be another file's by now

    def read(self) -> tuple[str, int] | None:
        """Return (log_id, seq); None when there is no mark, or a torn one."""
        found = os.pread(self._descriptor, _FORM.size + _CRC.size, 0)
        if len(found) < _FORM.size + _CRC.size:
            return None
        body, crc = found[: _FORM.size], found[_FORM.size :]
        if _CRC.unpack(crc)[0] != zlib.crc32(body):
            return None
        log, seq = _FORM.unpack(body)
        return str(uuid.UUID(bytes=log)), seq

    def write(self, log_id: str, seq: int) -> None:
        """Note that `seq` is durable; a failure leaves the older mark, which is true as well."""
        body = _FORM.pack(uuid.UUID(log_id).bytes, seq)
        with self._lock, suppress(OSError):
            if self._descriptor >= 0:
                os.pwrite(self._descriptor, body + _CRC.pack(zlib.crc32(body)), 0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
