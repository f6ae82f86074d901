"""Segments on a disk: `<folder>/segments/<log_id>/<first>-<last>.seg`.

Written whole or not at all, found by name, moved to `quarantine/` when they can't be trusted. The
folder may be a mount that others write to: what lies below it is judged, never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from local_store.segment_folders import (
    TEMPORARY,
    DiskCalls,
    free_name,
    made_folder,
    opened_folder,
    opened_parent,
    place,
    read_file,
)
from local_store.segment_names import (
    SEGMENTS,
    SegmentCorrupt,
    SegmentName,
    is_log_id,
    parse_seqs,
)
from local_store.segments import SealedSegment, Segment, SegmentKey, read

QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Written:
    """A segment is durable under its name. `displaced`: something else had the name before, and
    lies there in quarantine.
    """

    path: PurePosixPath
    existed: bool
    displaced: PurePosixPath | None = None


@dataclass(frozen=True, slots=True)
class Stranger:
    """Something below `segments/` that is no segment; it belongs into quarantine."""

    path: PurePosixPath
    reason: str


def write_file(folder: Path, segment: SealedSegment, calls: DiskCalls | None = None) -> Written:
    """Put a segment under its name: whole, mode 0600, durable and closed when this returns.

    A crash at any step leaves it whole or absent, and repeating is harmless. `folder` exists.
    Raises OSError as the disk reports it, and SegmentCorrupt where a link or a file stands in place
    of a folder; then nothing is promised.
    """
    calls = calls or DiskCalls()
    name = segment.name
    with opened_folder(calls, folder) as root:
        with made_folder(calls, root, SEGMENTS, name.path) as segments:
            with made_folder(calls, segments, name.log_id, name.path) as log:
                if not _holds_segments(log):
                    # Also when the folders were there: a crash may have come before their fsync.
                    calls.fsync(root)
                    calls.fsync(segments)
                if _content(calls, log, name) == segment.data:
                    calls.fsync(log)  # a crash may have come between rename and fsync
                    return Written(name.path, existed=True)
                displaced = _displace(calls, root, log, name)
                place(calls, log, name.file_name, segment.data)
    return Written(name.path, existed=False, displaced=displaced)


def load(
    folder: Path, name: SegmentName, keys: Sequence[SegmentKey], *, environment: str
) -> Segment:
    """Read one segment; nothing is open when this returns.

    Raises SegmentCorrupt for one that must not be used, OSError as the disk reports it
    (FileNotFoundError: it was collected meanwhile).
    """
    calls = DiskCalls()
    with opened_parent(calls, folder, name.path) as log:
        data = read_file(calls, log, name.path)
    return read(data, keys, name=name, environment=environment)


def scan(folder: Path) -> Iterator[SegmentName | Stranger]:
    """Yield what lies below `segments/`: by log, and within a log by first seq.

    Reads names only, one log's at a time, and holds nothing open between two items. `*.tmp` are
    others' work under way and left out; a folder that isn't there, or went meanwhile, is empty.
    """
    for log_id, kind in _entries(folder, PurePosixPath(SEGMENTS)):
        path = PurePosixPath(SEGMENTS, log_id) if log_id else PurePosixPath(SEGMENTS)
        if kind != "folder":
            yield Stranger(path, f"a {kind} in place of a folder")
        elif not is_log_id(log_id):
            yield Stranger(path, "no log_id is spelt so")
        else:
            yield from _scan_log(folder, path)


def quarantine(folder: Path, path: PurePosixPath, calls: DiskCalls | None = None) -> PurePosixPath:
    """Move what `scan` or `load` complained about to `quarantine/`; returns where it is now.

    `path` is relative to `folder` and lies below `segments/`, else ValueError. A link is moved, not
    followed. Nothing is deleted or overwritten, whatever it is called. Raises OSError.
    """
    calls = calls or DiskCalls()
    if not 1 <= len(path.parts) <= 3 or path.parts[0] != SEGMENTS or ".." in path.parts:
        raise ValueError("only what lies below segments/ goes into quarantine")
    with opened_folder(calls, folder) as root, opened_parent(calls, folder, path) as parent:
        with made_folder(calls, root, QUARANTINE, PurePosixPath(QUARANTINE)) as target:
            calls.fsync(root)
            kept = free_name(target, path)
            calls.rename(path.name, kept, src_dir_fd=parent, dst_dir_fd=target)
            calls.fsync(target)  # before the other: a crash between may leave two, never none
            calls.fsync(parent)
    return PurePosixPath(QUARANTINE, kept)


def remove(folder: Path, name: SegmentName, calls: DiskCalls | None = None) -> None:
    """Delete a segment of which everything is final, and its log's folder with the last one.

    One that is gone already is no error. Not synced: one that comes back after a crash is found to
    be final again. Raises OSError.
    """
    calls = calls or DiskCalls()
    with suppress(FileNotFoundError), opened_parent(calls, folder, name.path) as log:
        calls.unlink(name.file_name, dir_fd=log)
    with suppress(OSError), opened_parent(calls, folder, name.path.parent) as segments:
        os.rmdir(name.log_id, dir_fd=segments)  # fails while anything is in it


def _scan_log(folder: Path, path: PurePosixPath) -> Iterator[SegmentName | Stranger]:
    for file_name, kind in _entries(folder, path):
        seqs = parse_seqs(file_name)
        if not file_name:
            yield Stranger(path, f"a {kind} in place of a folder")
        elif kind != "file":
            yield Stranger(path / file_name, f"a {kind} in place of a file")
        elif seqs is None:
            yield Stranger(path / file_name, "no segment is called so")
        else:
            yield SegmentName(path.name, *seqs)


def _entries(folder: Path, path: PurePosixPath) -> list[tuple[str, str]]:
    """Return names and kinds in a folder, sorted; where it is no folder, one without a name."""
    try:
        with opened_parent(DiskCalls(), folder, path / "any") as descriptor:
            with os.scandir(descriptor) as found:
                named = [(item.name, _kind(item)) for item in found]
    except FileNotFoundError:
        return []
    except SegmentCorrupt:
        return [("", "link or file")]
    return sorted(item for item in named if not item[0].endswith(TEMPORARY))


def _kind(item: os.DirEntry[str]) -> str:
    if item.is_symlink():
        return "link"
    if item.is_file(follow_symlinks=False):
        return "file"
    return "folder" if item.is_dir(follow_symlinks=False) else "special file"


def _holds_segments(log: int) -> bool:
    with os.scandir(log) as found:
        return any(parse_seqs(item.name) is not None for item in found)


def _content(calls: DiskCalls, log: int, name: SegmentName) -> bytes | None:
    """Return what the file holds; None for no file, or something that no segment can be."""
    try:
        return read_file(calls, log, name.path)
    except (FileNotFoundError, SegmentCorrupt):
        return None


def _displace(calls: DiskCalls, root: int, log: int, name: SegmentName) -> PurePosixPath | None:
    """Keep in quarantine what has the segment's name already, before it is replaced.

    A file is copied, so that at no moment neither is there; anything else is moved.
    """
    try:
        os.stat(name.file_name, dir_fd=log, follow_symlinks=False)
    except FileNotFoundError:
        return None
    data = _content(calls, log, name)
    with made_folder(calls, root, QUARANTINE, PurePosixPath(QUARANTINE)) as target:
        calls.fsync(root)
        kept = free_name(target, name.path)
        if data is None:
            calls.rename(name.file_name, kept, src_dir_fd=log, dst_dir_fd=target)
            calls.fsync(target)
        else:
            place(calls, target, kept, data)
    return PurePosixPath(QUARANTINE, kept)
