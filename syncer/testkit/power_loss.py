"""What a disk may hold after power loss: record a run, then cut the power at any event of it.

    with DiskRecorder(folder) as disk:
        with LocalStore.open(folder, tables=TABLES) as store:
            receipt = store.write(...)
            disk.mark(receipt.txn_id)
    disk.power_loss_image(at=disk.events_before(receipt.txn_id), seed=7, into=image)

Everything before a file's last completed sync is in the image. Of what came later each sector may
have reached the disk or not, in any order, as the seed says. Killing a process proves nothing of
the kind: the kernel still holds all its writes.

The model's limits: a file that was created is there (its directory entry is never lost); a delete
may be undone until the folder is synced, which SQLite does with the first sync of each log or
journal it creates, or until the name is used again; a sector of 512 bytes is never torn in itself;
files that are written past SQLite are taken as they were when the recording began.
`-shm` is no file on the disk to SQLite: it is rebuilt after a crash and left out here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Literal, Self

from syncer.testkit.sqlite_vfs import CallKind, DiskCall, watching

SECTOR_BYTES = 512  # the smallest unit that disks promise to write as a whole
Style = Literal["lost", "kept", "writes", "sectors"]
STYLES: tuple[Style, ...] = ("lost", "kept", "writes", "sectors")
"""What becomes of unsynced writes: none arrived; all did; each by itself arrived, was lost or torn;
each sector holds what it held at some moment since the sync, as when a cache is written back in any
order."""


@dataclass(frozen=True, slots=True)
class DiskEvent:
    """One thing that happened on the disk, or a mark of the test.

    `covers` of a sync is the number of events that were complete when it began: those are safe.
    `durable` says that the folder was synced too.
    """

    kind: CallKind | Literal["mark"]
    file: str
    offset: int = 0
    data: bytes = b""
    durable: bool = False
    covers: int = 0


class DiskRecorder:
    """Records what SQLite does to the files of `folder`, in order; a context manager.

    Files that exist at the start count as synced, except those whose names end in one of
    `unsynced`: for them the whole content is one unsynced write, as after a killed process.
    """

    def __init__(self, folder: str | Path, *, unsynced: Sequence[str] = ()) -> None:
        self._folder = os.path.realpath(folder)
        self._unsynced = tuple(unsynced)
        self._lock = threading.Lock()
        self._begun: dict[tuple[int, str], int] = {}
        self._created: set[str] = set()
        self._stack = ExitStack()
        self.events: list[DiskEvent] = []
        self.at_start: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        for path in sorted(Path(self._folder).rglob("*")):
            name = os.path.relpath(path, self._folder)
            if not path.is_file() or name.endswith("-shm"):
                continue
            if self._unsynced and name.endswith(self._unsynced):
                self.events.append(DiskEvent("open", name))
                self.events.append(DiskEvent("write", name, 0, path.read_bytes()))
            else:
                self.at_start[name] = path.read_bytes()
        self._stack.enter_context(watching(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def before(self, call: DiskCall) -> int:
        """Remember when a sync begins: a write that races it isn't covered by it."""
        with self._lock:
            if call.kind == "sync":
                self._begun[threading.get_ident(), call.path] = len(self.events)
            elif call.kind == "open" and not os.path.exists(call.path):
                self._created.add(call.path)
        return 0

    def after(self, call: DiskCall, code: int) -> None:
        """Record what succeeded; what failed promised nothing."""
        with self._lock:
            covers = self._begun.pop((threading.get_ident(), call.path), 0)
            name = _name_in(self._folder, call.path)
            if code or not call.path or name.startswith(".."):
                return
            durable = call.durable or (call.kind == "sync" and self._syncs_folder(call.path))
            covers = len(self.events) if call.kind == "delete" else covers
            self.events.append(DiskEvent(call.kind, name, call.offset, call.data, durable, covers))

    def _syncs_folder(self, path: str) -> bool:
        """Tell whether this is the sync with which SQLite also syncs the folder of a new file."""
        first = path in self._created and path.endswith(("-wal", "-journal"))
        self._created.discard(path)
        return first

    def mark(self, label: str) -> None:
        """Note something that the test knows, such as an acknowledgement."""
        with self._lock:
            self.events.append(DiskEvent("mark", label))

    def events_before(self, label: str) -> int:
        """Return how many events came before a mark."""
        return self.events.index(DiskEvent("mark", label))

    def marks(self, at: int | None = None) -> list[str]:
        """Return the marks set before event `at`, in order."""
        return [event.file for event in self.events[:at] if event.kind == "mark"]

    def syncs(self, suffix: str = "") -> int:
        """Return how many syncs of files with this suffix completed."""
        return sum(e.kind == "sync" and e.file.endswith(suffix) for e in self.events)

    def unsynced_writes(self, at: int, suffix: str = "") -> int:
        """Return how many writes a power loss at event `at` could take, of files with `suffix`."""
        count = 0
        for name, events in self._by_file(at).items():
            if name.endswith(suffix):
                covered = _covered(events)
                count += sum(e.kind == "write" for index, e in events if index >= covered)
        return count

    def power_loss_image(self, at: int, seed: int, into: str | Path) -> Style:
        """Write into the new folder `into` what the disk may hold after power loss at event `at`.

        The same `at` and `seed` give the same image. Returns which of STYLES the seed chose.
        """
        folder = Path(into)
        folder.mkdir(mode=0o700, parents=True)
        style, files = self.after_power_loss(at, seed)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o600)
        return style

    def after_power_loss(self, at: int, seed: int) -> tuple[Style, dict[str, bytes]]:
        """Return the files of such an image instead of writing them, and the style."""
        dice = Random(f"{seed}/{at}")
        style = dice.choice(STYLES)
        by_file = self._by_file(at)
        folder_covered = max((e.covers for e in self.events[:at] if e.durable), default=0)
        files = {}
        for name in sorted({*self.at_start, *by_file}):
            file = _File(self.at_start.get(name), style, dice, folder_covered)
            content = file.after_power_loss(by_file.get(name, []))
            if content is not None:
                files[name] = bytes(content)
        return style, files

    def _by_file(self, at: int) -> dict[str, list[tuple[int, DiskEvent]]]:
        found: dict[str, list[tuple[int, DiskEvent]]] = {}
        for index, event in enumerate(self.events[:at]):
            if event.kind != "mark":
                found.setdefault(event.file, []).append((index, event))
        return found


def _covered(events: Sequence[tuple[int, DiskEvent]]) -> int:
    """Return the index below which everything is on the disk."""
    return max((event.covers for _, event in events if event.kind == "sync"), default=0)


class _File:
    """One file while its image is built."""

    def __init__(
        self, at_start: bytes | None, style: Style, dice: Random, folder_covered: int
    ) -> None:
        self._content = None if at_start is None else bytearray(at_start)
        self._style = style
        self._dice = dice
        self._folder_covered = folder_covered
        self._cuts: dict[int, int] = {}
        self._moments: list[int] = []

    def after_power_loss(self, events: Sequence[tuple[int, DiskEvent]]) -> bytearray | None:
        """Return the content, or None when there is no such file."""
        covered = _covered(events)
        self._moments = [covered, *(index + 1 for index, _ in events if index >= covered)]
        last_open = max((index for index, event in events if event.kind == "open"), default=-1)
        gone_before = max(last_open, self._folder_covered)  # deletes that can't be undone any more
        for index, event in events:
            safe = index < covered
            match event.kind:
                case "open":
                    self._content = bytearray() if self._content is None else self._content
                case "write" if safe:
                    self._put(event.offset, event.data)
                case "write":
                    self._write_unsynced(index, event)
                case "truncate" if safe or self._arrives():
                    self._resize(event.offset)
                case "delete" if event.durable or index < gone_before or self._arrives():
                    self._content = None
                case _:
                    pass
        return self._content

    def _arrives(self) -> bool:
        if self._style in ("lost", "kept"):
            return self._style == "kept"
        return self._dice.random() < 0.5

    def _write_unsynced(self, index: int, event: DiskEvent) -> None:
        if self._style == "kept":
            self._put(event.offset, event.data)
        elif self._style == "sectors":
            for offset, piece in _sectors(event):
                sector = offset // SECTOR_BYTES
                if sector not in self._cuts:
                    self._cuts[sector] = self._dice.choice(self._moments)
                if index < self._cuts[sector]:
                    self._put(offset, piece)
        elif self._style == "writes":
            self._write_or_tear(event)

    def _write_or_tear(self, event: DiskEvent) -> None:
        fate = self._dice.choice(("kept", "lost", "torn", "length only"))
        if fate == "kept":
            self._put(event.offset, event.data)
        elif fate == "torn":
            for offset, piece in _sectors(event):
                if self._arrives():
                    self._put(offset, piece)
        elif fate == "length only":  # a file system that journals sizes before data
            self._resize(max(len(self._content or b""), event.offset + len(event.data)))

    def _put(self, offset: int, data: bytes) -> None:
        if self._content is None:
            self._content = bytearray()
        if len(self._content) < offset:
            self._resize(offset)
        self._content[offset : offset + len(data)] = data

    def _resize(self, size: int) -> None:
        content = bytearray() if self._content is None else self._content
        del content[size:]
        content.extend(bytes(size - len(content)))
        self._content = content


@lru_cache(maxsize=1_024)  # called with each write
def _name_in(folder: str, path: str) -> str:
    return os.path.relpath(path, folder)


def _sectors(event: DiskEvent) -> list[tuple[int, bytes]]:
    """Cut a write at the boundaries of the disk's sectors."""
    end = event.offset + len(event.data)
    cuts = [
        event.offset,
        *range(event.offset // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES),
        end,
    ]
    return [
        (first, event.data[first - event.offset : last - event.offset])
        for first, last in pairwise(cuts)
    ]
