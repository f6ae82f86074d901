"""Room on the disk: what is kept free so that a full disk can be drained.

On a full disk SQLite can't even mark a transaction as delivered. So writes are refused while some
room is left, and a file of nothing but zeros is given up when the room was taken by others.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from local_store.errors import BufferFull

FILE_NAME = "ballast"
BALLAST_BYTES = 1024 * 1024  # enough to record a few thousand replies and to checkpoint


def check_free(folder: Path, free_bytes_min: int, retry_after_s: float) -> None:
    """Raise BufferFull when the disk has less than `free_bytes_min` left for us."""
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < free_bytes_min:
        reason = f"less than {free_bytes_min} bytes are free on the disk"
        raise BufferFull(retry_after_s, reason)


class Ballast:
    """One MiB of a folder's disk, to be given back to it in need."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME

    def release(self) -> None:
        """Free the room; harmless when it is free already."""
        with suppress(OSError):
            os.truncate(self._path, 0)

    def restore(self, free_bytes_min: int) -> None:
        """Take the room again when the disk has plenty; a failure is no one's loss."""
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                found = os.fstatvfs(descriptor)
                room = found.f_bavail * found.f_frsize - free_bytes_min
                if os.fstat(descriptor).st_size < BALLAST_BYTES < room:
                    os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
            finally:
                os.close(descriptor)
