"""A reader of SQLite's file format that needs no tree: every leaf page is read by itself.

SQLite finds a record through the pages above it; with one of those gone, all below it is out of
reach, though it is still in the file. Here each page that is a leaf of a table is read, whoever
points to it, and each record in it of the shape that is asked for. Whether a record is what was
written is for its checksum to say. The format: https://sqlite.org/fileformat2.html.

Taken as they are now: a page's newest state is in the write-ahead log, up to its last commit; each
frame there is judged by its own checksum, so that one which is damaged doesn't end the log for
those behind it, as it does for SQLite. Pages on the list of free ones hold what was moved or
deleted, and are left out as long as that list can be read.

Nothing that a user wrote can pass for a page of records: what doesn't fit a leaf is kept in pages
that begin with a page number, and one that begins like a leaf's would need a file of 800 GiB.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

PAGE_BYTES = 4_096
_LEAF = 0x0D  # the first byte of a page: a leaf of a table
_WAL_HEADER, _FRAME_HEADER = 32, 24
_WAL_MAGIC = 0x377F0682  # with the lowest bit: checksums over big-endian words
_FREE_TRUNK = 32  # in the file's header: the first page of the list of free pages
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # bytes by serial type
_REAL, _ZERO, _ONE = 7, 8, 9

Value = str | int | float | None


class _Malformed(Exception):
    """A record that isn't one, or not of the shape asked for."""


class Pages:
    """The pages of a buffer file as they are now, its write-ahead log included."""

    def __init__(self, file: Path, wal: Path) -> None:
        self._file: BinaryIO = file.open("rb")
        self._wal: BinaryIO | None = wal.open("rb") if wal.exists() else None
        size = os.fstat(self._file.fileno()).st_size
        self._moved = _frames(self._wal) if self._wal is not None else {}
        self.count = max(size // PAGE_BYTES, *self._moved, 0)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._wal is not None:
            self._wal.close()

    def read(self, number: int) -> bytes:
        """Return a page by its number, from 1; shorter or empty where the file ends."""
        offset = self._moved.get(number)
        if offset is not None and self._wal is not None:
            return os.pread(self._wal.fileno(), PAGE_BYTES, offset)
        return os.pread(self._file.fileno(), PAGE_BYTES, (number - 1) * PAGE_BYTES)

    def free(self) -> set[int]:
        """Return the pages that are in no tree; as many of them as the list still leads to."""
        found: set[int] = set()
        header = self.read(1)
        trunk = _number(header, _FREE_TRUNK) if len(header) == PAGE_BYTES else 0
        while 1 < trunk <= self.count and trunk not in found:
            found.add(trunk)
            page = self.read(trunk)
            trunk, count = struct.unpack_from(">II", page)
            if count > PAGE_BYTES // 4 - 2:
                break
            found.update(struct.unpack_from(f">{count}I", page, 8))
        return found

    def records(self, kinds: Sequence[str]) -> Iterator[tuple[Value, ...]]:
        """Yield every record with columns of these types (INTEGER, REAL, TEXT, none a blob).

        The first is the key that SQLite keeps apart, as of a table with an INTEGER PRIMARY KEY.
        """
        free = self.free()
        for number in range(2, self.count + 1):  # the first page is the schema's
            page = self.read(number)
            if number in free or len(page) < PAGE_BYTES or page[0] != _LEAF:
                continue
            (cells,) = struct.unpack_from(">H", page, 3)
            for at in struct.unpack_from(f">{min(cells, PAGE_BYTES // 2 - 4)}H", page, 8):
                try:
                    yield _decoded(*self._cell(page, at), kinds)
                except (_Malformed, IndexError, struct.error, UnicodeDecodeError):
                    continue

    def _cell(self, page: bytes, at: int) -> tuple[int, bytes]:
        """Return the key and the payload of a cell, what overflowed included."""
        size, at = _varint(page, at)
        key, at = _varint(page, at)
        if size > self.count * PAGE_BYTES:
            raise _Malformed
        here = size
        if size > PAGE_BYTES - 35:
            least = (PAGE_BYTES - 12) * 32 // 255 - 23
            here = least + (size - least) % (PAGE_BYTES - 4)
            if here > PAGE_BYTES - 35:
                here = least
        parts, missing = [page[at : at + here]], size - here
        following = _number(page, at + here) if missing else 0
        while missing > 0:
            if not 1 < following <= self.count:
                raise _Malformed
            more = self.read(following)
            following = _number(more, 0)
            parts.append(more[4 : 4 + missing])
            missing -= PAGE_BYTES - 4
        return key, b"".join(parts)


def _decoded(key: int, payload: bytes, kinds: Sequence[str]) -> tuple[Value, ...]:
    header_bytes, at = _varint(payload, 0)
    types = []
    while at < header_bytes:
        serial, at = _varint(payload, at)
        types.append(serial)
    if len(types) != len(kinds) or types[0] != 0:
        raise _Malformed
    values: list[Value] = [key]
    for serial, kind in zip(types[1:], kinds[1:], strict=True):
        value, at = _value(payload, at, serial)
        if value is not None and isinstance(value, str) != (kind == "TEXT"):
            raise _Malformed
        # A real number without a fraction is kept as an integer.
        values.append(float(value) if kind == "REAL" and isinstance(value, int) else value)
    return tuple(values)


def _value(payload: bytes, at: int, serial: int) -> tuple[Value, int]:
    """Return a value by its serial type, and where the next one begins."""
    if serial in _INTEGERS:
        end = at + _INTEGERS[serial]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if serial == _REAL:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if serial in (_ZERO, _ONE):
        return serial - _ZERO, at
    if serial == 0:
        return None, at
    if serial < 13 or serial % 2 == 0:  # a blob, or a type that is none
        raise _Malformed
    end = at + (serial - 13) // 2
    if end > len(payload):
        raise _Malformed
    return payload[at:end].decode(), end


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return the number of one to nine bytes at a place, and where it ends."""
    value = 0
    for number in range(8):
        byte = page[at + number]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + number + 1
    value = value << 8 | page[at + 8]
    return value - (1 << 64 if value >= 1 << 63 else 0), at + 9


def _number(page: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", page, at)[0])


def _frames(wal: BinaryIO) -> dict[int, int]:
    """Return where the newest state of each page is, by page: in the frames up to the last commit.

    A frame's checksum goes on from the one that stands in the frame before, and so can be told
    right or wrong whatever that frame holds.
    """
    header = wal.read(_WAL_HEADER)
    if len(header) < _WAL_HEADER or _number(header, 0) & ~1 != _WAL_MAGIC:
        return {}
    order, salts = ">" if header[3] & 1 else "<", header[16:24]
    before, at = header[24:32], _WAL_HEADER
    committed: dict[int, int] = {}
    open_: dict[int, int] = {}
    while len(frame := wal.read(_FRAME_HEADER + PAGE_BYTES)) == _FRAME_HEADER + PAGE_BYTES:
        # With other salts it is of an earlier round: the log is written over from its beginning.
        if frame[8:16] == salts and _is_sum(order, before, frame):
            open_[_number(frame, 0)] = at + _FRAME_HEADER
            if _number(frame, 4):  # the last of a transaction
                committed |= open_
                open_ = {}
        before, at = frame[16:24], at + len(frame)
    return committed


def _is_sum(order: str, before: bytes, frame: bytes) -> bool:
    """Tell whether a frame's checksum is that of the one before it, its own number and its page."""
    one, two = struct.unpack(">II", before)
    for part in (frame[:8], frame[_FRAME_HEADER:]):
        words = struct.unpack(f"{order}{len(part) // 4}I", part)
        for even, odd in zip(words[::2], words[1::2], strict=True):
            one = (one + even + two) & 0xFFFFFFFF
            two = (two + odd + one) & 0xFFFFFFFF
    return struct.pack(">II", one, two) == frame[16:24]
