"""What segments are called, and what can be wrong with one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import Final, Literal

from local_store.errors import LocalStoreError

SEGMENTS: Final = "segments"
SEQ_MAX = 2**63 - 1  # SQLite's largest integer: 19 digits
SEGMENT_BYTES_MAX = 65 * 1024**2  # 64 MiB of lines that deflate can't shrink, header and HMAC

_LOG_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE = re.compile(r"([0-9]{19})-([0-9]{19})\.seg")

Fault = Literal[
    "not_a_file",
    "too_large",
    "torn",
    "not_a_segment",
    "too_new",
    "wrong_key",
    "tampered",
    "misplaced",
    "other_environment",
    "bomb",
    "malformed",
]


class SegmentCorrupt(LocalStoreError):
    """A file that can't be taken as the segment its path names; nothing of it is used.

    `fault` tells the kinds apart and `offset` is the byte where it shows. `stays` says that the
    file is probably sound, and this reader the wrong one: leave it where it is and report it.
    Everything else belongs into quarantine.
    """

    def __init__(self, path: PurePath, offset: int, fault: Fault, reason: str) -> None:
        super().__init__(f"{path}: {reason} (at byte {offset})")
        self.path = path
        self.offset = offset
        self.fault = fault
        self.reason = reason

    @property
    def stays(self) -> bool:
        """Tell whether newer code, another key or another environment would read it."""
        return self.fault in ("too_new", "wrong_key", "other_environment")


class SegmentTooLarge(LocalStoreError):
    """These transactions don't fit one segment; seal fewer at once. Nothing was written."""


def is_log_id(text: str) -> bool:
    """Tell whether a log may be called so: a UUID in lower case."""
    return _LOG_ID.fullmatch(text) is not None


def parse_seqs(file_name: str) -> tuple[int, int] | None:
    """Return the first and last seq that a segment's file name tells, None for other names."""
    found = _FILE.fullmatch(file_name)
    if found is None:
        return None
    first_seq, last_seq = int(found[1]), int(found[2])
    return (first_seq, last_seq) if 1 <= first_seq <= last_seq <= SEQ_MAX else None


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """Which segment: its log and the seqs it covers, both included. Sorts in order of delivery."""

    log_id: str
    first_seq: int
    last_seq: int

    def __post_init__(self) -> None:
        if not is_log_id(self.log_id):
            raise ValueError("a segment's log_id is a UUID in lower case")
        if not 1 <= self.first_seq <= self.last_seq <= SEQ_MAX:
            raise ValueError("a segment covers seqs from 1 on, the first not above the last")

    @property
    def file_name(self) -> str:
        """The name within the log's folder; its order is that of the seqs."""
        return f"{self.first_seq:019d}-{self.last_seq:019d}.seg"

    @property
    def path(self) -> PurePosixPath:
        """The path below the folder that holds `segments/`."""
        return PurePosixPath(SEGMENTS, self.log_id, self.file_name)

    @classmethod
    def parse(cls, log_id: str, file_name: str) -> SegmentName | None:
        """Return what the names mean, or None where no segment is called so."""
        seqs = parse_seqs(file_name)
        return cls(log_id, *seqs) if seqs is not None and is_log_id(log_id) else None
