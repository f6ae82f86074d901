"""Folders and files below a folder that isn't trusted, for segments.

Every step goes through the descriptor of the folder above it and follows no link. No descriptor
outlives its block: a Modal Volume can't be reloaded while one is open.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from local_store.segment_names import SEGMENT_BYTES_MAX, SegmentCorrupt

TEMPORARY = ".tmp"
SAME_NAME_MAX = 1000  # files of one name in quarantine; more is a loop, not an accident
NAME_BYTES_MAX = 200  # of a name in quarantine: file systems end at 255, and a number may follow

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INNER = _FOLDER | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would block for ever
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DiskCalls:
    """The system calls that change a disk, so that a test can watch them or fail one."""

    open: Callable[..., int] = os.open
    mkdir: Callable[..., Any] = os.mkdir
    write: Callable[[int, memoryview], int] = os.write
    fsync: Callable[[int], Any] = os.fsync
    close: Callable[[int], Any] = os.close
    rename: Callable[..., Any] = os.rename
    unlink: Callable[..., Any] = os.unlink


@contextmanager
def opened_folder(calls: DiskCalls, folder: Path) -> Iterator[int]:
    """Open the outermost folder; it is the operator's, and may be a link."""
    with _opened(calls, folder, _FOLDER, None) as descriptor:
        yield descriptor


@contextmanager
def opened_parent(calls: DiskCalls, folder: Path, path: PurePosixPath) -> Iterator[int]:
    """Open the folder that holds `path`, one step at a time from `folder`."""
    with ExitStack() as stack:
        descriptor = stack.enter_context(opened_folder(calls, folder))
        for step in path.parts[:-1]:
            descriptor = stack.enter_context(_inner(calls, descriptor, step, path))
        yield descriptor


@contextmanager
def made_folder(calls: DiskCalls, parent: int, name: str, path: PurePosixPath) -> Iterator[int]:
    """Make a folder where it is missing, and open it; its entry isn't synced."""
    with suppress(FileExistsError):
        calls.mkdir(name, 0o700, dir_fd=parent)
    with _inner(calls, parent, name, path) as descriptor:
        yield descriptor


def read_file(calls: DiskCalls, parent: int, path: PurePosixPath) -> bytes:
    """Return a file's content, at most SEGMENT_BYTES_MAX bytes.

    Raises SegmentCorrupt for what is no file or too large, and OSError.
    """
    try:
        with _opened(calls, path.name, _READ, parent) as descriptor:
            return _content(descriptor, path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            reason = "a link or a socket in place of a file"
            raise SegmentCorrupt(path, 0, "not_a_file", reason) from None
        raise


def place(calls: DiskCalls, parent: int, file_name: str, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = f"{file_name}.{os.getpid()}-{threading.get_native_id()}{TEMPORARY}"
    with suppress(FileNotFoundError):
        calls.unlink(temporary, dir_fd=parent)  # of a process that died with our number
    try:
        with _opened(calls, temporary, _NEW, parent) as descriptor:
            left = memoryview(data)
            while left:
                left = left[calls.write(descriptor, left) :]
            calls.fsync(descriptor)
        calls.rename(temporary, file_name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with suppress(OSError):
            calls.unlink(temporary, dir_fd=parent)
        raise
    calls.fsync(parent)


def free_name(folder: int, path: PurePosixPath) -> str:
    """Return a name for `path` that is free in a flat folder, ends with the old one and fits.

    Raises FileExistsError behind SAME_NAME_MAX files of one name.
    """
    flat = os.fsdecode(os.fsencode("_".join(path.parts[1:]) or path.name)[-NAME_BYTES_MAX:])
    for number in range(SAME_NAME_MAX):
        name = f"{flat}.{number}" if number else flat
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return name
    raise FileExistsError(errno.EEXIST, "too many files of one name in quarantine", flat)


@contextmanager
def _opened(calls: DiskCalls, path: Path | str, flags: int, dir_fd: int | None) -> Iterator[int]:
    descriptor = calls.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        calls.close(descriptor)


@contextmanager
def _inner(calls: DiskCalls, parent: int, name: str, path: PurePosixPath) -> Iterator[int]:
    try:
        descriptor = calls.open(name, _INNER, 0o600, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            reason = f"{name} is a link or a file in place of a folder"
            raise SegmentCorrupt(path, 0, "not_a_file", reason) from None
        raise
    try:
        yield descriptor
    finally:
        calls.close(descriptor)


def _content(descriptor: int, path: PurePosixPath) -> bytes:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise SegmentCorrupt(path, 0, "not_a_file", "not a file")
    parts: list[bytes] = []
    size = 0
    while part := os.read(descriptor, 1024**2):
        size += len(part)
        if size > SEGMENT_BYTES_MAX:
            reason = f"more than {SEGMENT_BYTES_MAX} bytes"
            raise SegmentCorrupt(path, SEGMENT_BYTES_MAX, "too_large", reason)
        parts.append(part)
    return b"".join(parts)
