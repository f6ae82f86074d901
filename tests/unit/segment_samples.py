"""Transactions by hand, and the disk's calls under observation, for the tests of segments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from local_store.ops import PendingTransaction, WireOp
from local_store.segment_files import load
from local_store.segment_folders import DiskCalls
from local_store.segment_names import SegmentCorrupt, SegmentName
from local_store.segments import SealedSegment, SegmentHeader, SegmentKey, seal

LOG = "0199a0c4-0000-7000-8000-000000000001"
OTHER_LOG = "0199a0c4-0000-7000-8000-000000000002"
USER = "5f0c4f4e-0000-4000-8000-000000000042"
KEY = SegmentKey.derive("a secret of the deployment")


def transaction(seq: int = 1, log_id: str = LOG, **changes: Any) -> PendingTransaction:
    values: dict[str, Any] = {
        "seq": seq,
        "txn_id": f"0199a0c4-0000-7000-8000-{seq:012d}",
        "user_id": USER,
        "digest": "d" * 64,
        "accepted_at": "2026-01-01T00:00:00.000000+00:00",
        "ops": (WireOp("notes", "update", "id-1", {"text": "héllo\n🙂", "number": 2**63 - 1}),),
        "bases": ("2025-10-19T00:00:00+00:00",),
        "chained": (False,),
        "after": (),
        "size_bytes": 40,
        "attempts": 0,
        "position": seq + 7,
        "log_id": log_id,
        "before": ({"text": None},),
        "children": (None,),
    }
    return PendingTransaction(**{**values, **changes})


def name_of(first: int, last: int, log_id: str = LOG) -> SegmentName:
    return SegmentName(log_id, first, last)


def header_of(first: int, last: int, log_id: str = LOG, **changes: Any) -> SegmentHeader:
    values: dict[str, Any] = {"acknowledged_seq": last, "environment": "prod", **changes}
    return SegmentHeader(name_of(first, last, log_id), **values)


def sealed(
    first: int = 1, last: int = 2, log_id: str = LOG, key: SegmentKey = KEY, **changes: Any
) -> SealedSegment:
    header = header_of(first, last, log_id, **changes)
    return seal([transaction(seq, log_id) for seq in range(first, last + 1)], header, key)


ONE = sealed(1, 2)


def log_folder(folder: Path, log_id: str = LOG) -> Path:
    return folder / "segments" / log_id


def file_of(folder: Path, segment: SealedSegment = ONE) -> Path:
    return folder / segment.name.path


def seqs(folder: Path, name: SegmentName = ONE.name) -> list[int]:
    found = load(folder, name, [KEY], environment="prod")
    return [item.seq for item in found.transactions]


def fault(folder: Path, name: SegmentName = ONE.name) -> str:
    with pytest.raises(SegmentCorrupt) as caught:
        load(folder, name, [KEY], environment="prod")
    return caught.value.fault


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in found}


class Crashed(BaseException):
    """The process ended here; nothing it would still do happens."""


@dataclass
class Watched:
    """The disk's calls, by name and in order; the process dies before call `crash_before`.

    `changes` counts those at which it can: a close changes nothing.
    """

    crash_before: int | None = None
    changes: int = 0
    done: list[str] = field(default_factory=list)
    dead: bool = False

    def calls(self) -> DiskCalls:
        return DiskCalls(
            open=self._watch("open", os.open),
            mkdir=self._watch("mkdir", os.mkdir),
            write=self._watch("write", lambda fd, data: os.write(fd, data[:100])),
            fsync=self._watch("fsync", os.fsync),
            close=self._close,
            rename=self._watch("rename", os.rename),
            unlink=self._watch("unlink", os.unlink),
        )

    def _watch(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            if self.dead or self.changes == self.crash_before:
                self.dead = True
                raise Crashed
            target = args[0]
            if what == "open" and kwargs.get("dir_fd") is None:
                label = "<folder>"
            elif isinstance(target, int):
                label = os.path.basename(os.readlink(f"/proc/self/fd/{target}"))
            else:
                label = str(target)
            result = call(*args, **kwargs)
            self.changes += 1
            self.done.append(f"{what} {label}")
            return result

        return watching

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)  # also after a crash: the kernel closes for the dead
        if not self.dead:
            self.done.append("close")
