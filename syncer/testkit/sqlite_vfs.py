"""A shim in SQLite's own file layer: watch, delay or refuse each write, sync and delete.

SQLite reaches the disk only through a VFS. The shim lets the real one open a file and then gives
that file a copy of its method table in which four entries lead here first. Reads, locks, shared
memory and mmap stay native, so WAL works and costs what it costs without the shim.

It is registered in the very library that the `sqlite3` module calls, through ctypes. While a
`watching` block runs it is the default VFS: connections opened in the block are watched for as long
as an observer is attached, connections opened before it are untouched.
"""

from __future__ import annotations

import ctypes
import importlib
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

CallKind = Literal["open", "write", "truncate", "sync", "delete"]

_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_DELETE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_CLOSE = CFUNCTYPE(c_int, c_void_p)
_WRITE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_TRUNCATE = CFUNCTYPE(c_int, c_void_p, c_int64)
_SYNC = CFUNCTYPE(c_int, c_void_p, c_int)


class _Methods(Structure):
    """`struct sqlite3_io_methods` (https://sqlite.org/c3ref/io_methods.html)."""

    _fields_ = [
        ("version", c_int),
        ("close", _CLOSE),
        ("read", c_void_p),
        ("write", _WRITE),
        ("truncate", _TRUNCATE),
        ("sync", _SYNC),
        *[(f"native_{n}", c_void_p) for n in range(7)],  # size, locks, control, device
        *[(f"shm_{n}", c_void_p) for n in range(4)],  # since version 2: what WAL needs
        *[(f"mmap_{n}", c_void_p) for n in range(2)],  # since version 3
    ]


class _Vfs(Structure):
    """`struct sqlite3_vfs` (https://sqlite.org/c3ref/vfs.html)."""

    _fields_ = [
        ("version", c_int),
        ("file_bytes", c_int),
        ("path_bytes_max", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("app_data", c_void_p),
        ("open", _OPEN),
        ("delete", _DELETE),
        *[(f"native_{n}", c_void_p) for n in range(8)],
        *[(f"time_{n}", c_void_p) for n in range(2)],
        ("time_int64", c_void_p),  # since version 2
        *[(f"system_call_{n}", c_void_p) for n in range(3)],  # since version 3
    ]


# What each version of a structure leaves out at its end, in pointers.
_METHODS_MISSING = {1: 6, 2: 2}
_VFS_MISSING = {1: 4, 2: 3}


class ShimUnavailable(RuntimeError):
    """This Python's sqlite3 module can't be watched; the message says which one can."""


@dataclass(frozen=True, slots=True)
class DiskCall:
    """One call from SQLite to the disk.

    `offset` is where a write goes or the size a truncate leaves, in bytes. `durable` is set for a
    delete that also syncs the directory.
    """

    kind: CallKind
    path: str
    offset: int = 0
    data: bytes = b""
    durable: bool = False


class Observer(Protocol):
    """Sees each call twice. Called from the thread that SQLite runs on; must not use SQLite."""

    def before(self, call: DiskCall) -> int:
        """Return 0 to let the call through, or the SQLite error code to refuse it with."""
        ...

    def after(self, call: DiskCall, code: int) -> None:
        """Take note of how the call ended: 0, or an SQLite error code."""
        ...


@contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Attach `observer` to every connection that is opened in the block.

    Raises ShimUnavailable where SQLite's functions can't be reached. An exception inside an
    observer becomes an I/O error for SQLite and is raised here when the block ends.
    """
    shim = _shim()
    shim.attach(observer)
    try:
        yield
    finally:
        shim.detach(observer)
    shim.raise_failure()


@dataclass(frozen=True, slots=True)
class _OpenFile:
    path: str
    native: Any  # the real method table


class _Shim:
    """The registered VFS. One per process, never freed: SQLite keeps pointers into it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._register = library.sqlite3_vfs_register
        self._register.argtypes = (c_void_p, c_int)
        library.sqlite3_vfs_find.restype = c_void_p
        self._native_address: int = library.sqlite3_vfs_find(None)
        self._native = ctypes.cast(self._native_address, POINTER(_Vfs)).contents
        self._lock = threading.Lock()
        self._observers: tuple[Observer, ...] = ()
        self._files: dict[int, _OpenFile] = {}
        self._tables: dict[int, _Methods] = {}
        self._failures: list[BaseException] = []
        self._callbacks = {
            "close": _CLOSE(self._on_close),
            "write": _WRITE(self._on_write),
            "truncate": _TRUNCATE(self._on_truncate),
            "sync": _SYNC(self._on_sync),
        }
        self._vfs = _Vfs()
        _copy(self._vfs, self._native_address, _VFS_MISSING.get(self._native.version, 0))
        self._vfs.version = min(self._native.version, 3)
        self._vfs.next, self._vfs.name = None, b"syncer-testkit"
        self._vfs.open, self._vfs.delete = _OPEN(self._on_open), _DELETE(self._on_delete)

    def attach(self, observer: Observer) -> None:
        with self._lock:
            self._observers = (*self._observers, observer)
            self._register(ctypes.addressof(self._vfs), 1)

    def detach(self, observer: Observer) -> None:
        with self._lock:
            self._observers = tuple(one for one in self._observers if one is not observer)
            if not self._observers:
                self._register(self._native_address, 1)

    def raise_failure(self) -> None:
        with self._lock:
            failures, self._failures = self._failures, []
        if failures:
            raise RuntimeError("a disk observer failed; SQLite saw an I/O error") from failures[0]

    # Each callback below is entered from C: an exception that left it would be printed and
    # turned into "success", the worst of all answers. `_guarded` and `_through` catch everything.

    def _on_open(
        self, _vfs: int, name: int | None, file: int, flags: int, out_flags: int | None
    ) -> int:
        def native() -> int:
            # The name goes on as the pointer that came: SQLite keeps it and reads behind its end.
            code = self._native.open(self._native_address, name, file, flags, out_flags)
            if name is not None:
                self._adopt(file, path)
            return int(code)

        path = "" if name is None else _text(name)
        return self._through(DiskCall("open", path), native)

    def _on_delete(self, _vfs: int, name: int, durable: int) -> int:
        call = DiskCall("delete", _text(name), durable=bool(durable))
        return self._through(
            call, lambda: int(self._native.delete(self._native_address, name, durable))
        )

    def _on_close(self, file: int) -> int:
        return int(self._files.pop(file).native.close(file))

    def _on_write(self, file: int, data: int, size: int, offset: int) -> int:
        opened = self._files[file]
        if not self._observers:
            return int(opened.native.write(file, data, size, offset))
        call = DiskCall("write", opened.path, offset, ctypes.string_at(data, size))
        return self._through(call, lambda: int(opened.native.write(file, data, size, offset)))

    def _on_truncate(self, file: int, size: int) -> int:
        opened = self._files[file]
        call = DiskCall("truncate", opened.path, size)
        return self._through(call, lambda: int(opened.native.truncate(file, size)))

    def _on_sync(self, file: int, flags: int) -> int:
        opened = self._files[file]
        return self._through(
            DiskCall("sync", opened.path), lambda: int(opened.native.sync(file, flags))
        )

    def _through(self, call: DiskCall, native: Callable[[], int]) -> int:
        try:
            observers, code = self._observers, 0
            for observer in observers:
                code = code or observer.before(call)
            code = code or native()
            for observer in observers:
                observer.after(call, code)
        except BaseException as error:
            self._failures.append(error)
            return sqlite3.SQLITE_IOERR
        return code

    def _adopt(self, file: int, path: str) -> None:
        """Swap the method table of a file that the real VFS has just opened."""
        slot = ctypes.cast(file, POINTER(c_void_p))
        address = slot[0]
        if not address:  # the open failed
            return
        native = ctypes.cast(address, POINTER(_Methods)).contents
        if address not in self._tables:
            table = _Methods()
            _copy(table, address, _METHODS_MISSING.get(native.version, 0))
            table.version = min(native.version, 3)
            for name, callback in self._callbacks.items():
                setattr(table, name, callback)
            self._tables[address] = table
        self._files[file] = _OpenFile(path, native)
        slot[0] = ctypes.addressof(self._tables[address])


def _copy(target: Structure, address: int, missing_pointers: int) -> None:
    size = ctypes.sizeof(target) - missing_pointers * ctypes.sizeof(c_void_p)
    ctypes.memmove(ctypes.addressof(target), address, size)


def _text(address: int) -> str:
    return ctypes.string_at(address).decode(errors="surrogateescape")


@lru_cache(maxsize=1)
def _shim() -> _Shim:
    shim = _Shim(_library())
    _prove(shim)
    return shim


def _library() -> ctypes.CDLL:
    """Find SQLite's functions where the `sqlite3` module finds them.

    A symbol looked up in the extension module is searched in what it links to as well, so this
    reaches a shared libsqlite3 and one that was linked into the extension with its names kept.
    """
    extension = getattr(importlib.import_module("_sqlite3"), "__file__", None)
    library = ctypes.CDLL(extension)  # None: built in, so look in the program itself
    if not hasattr(library, "sqlite3_vfs_register"):
        raise ShimUnavailable(
            "the sqlite3 module of this Python hides SQLite's own functions, so its disk can't be "
            "watched; run these tests with a Python that links libsqlite3 dynamically: a "
            "distribution's, or one built by pyenv"
        )
    return library


class _Counter:
    def __init__(self) -> None:
        self.writes = 0

    def before(self, call: DiskCall) -> int:
        self.writes += call.kind == "write"
        return 0

    def after(self, call: DiskCall, code: int) -> None:
        pass


def _prove(shim: _Shim) -> None:
    """Write one page and see it pass: a second copy of SQLite in the process is another world."""
    counter = _Counter()
    shim.attach(counter)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with closing(sqlite3.connect(Path(folder) / "probe.db")) as connection:
                connection.execute("PRAGMA user_version = 1")
    finally:
        shim.detach(counter)
    shim.raise_failure()
    if not counter.writes:
        raise ShimUnavailable(
            "the sqlite3 module doesn't use the SQLite library that was found for it; run these "
            "tests with a Python that links libsqlite3 dynamically"
        )
