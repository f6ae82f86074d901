"""Segments: sealed, immutable, authenticated files of transactions. Here: bytes and values only.

Whoever holds a segment and the secret can deliver and merge its transactions without the buffer
they came from. docs/SEGMENTS.md describes the format; `segment_files` puts it on a disk.
Nothing but six fixed fields is interpreted before the HMAC fits.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from local_store.ops import PendingTransaction
from local_store.segment_lines import decode_line, encode_line
from local_store.segment_names import (
    SEGMENT_BYTES_MAX,
    SEQ_MAX,
    Fault,
    SegmentCorrupt,
    SegmentName,
    SegmentTooLarge,
)

MAGIC: Final = b"SYNCSEG\n"
FORMAT: Final = 1

INFLATED_BYTES_MAX = 64 * 1024**2  # a reader holds it whole: eight ops of 4 MiB and their befores
HEADER_BYTES_MAX = 64 * 1024  # names of a thousand tables
TRANSACTIONS_MAX = 10_000  # one flush sends 500: a bad file costs a bounded number of them
SECRET_BYTES_MIN = 16  # HKDF spreads entropy, it makes none
ENVIRONMENT_MAX = 64  # characters
LEVEL = 1  # the caller waits for it: level 6 saves 8 % and takes half as long again

# magic, format, key id, bytes of the header, of the body, of the body inflated
_PREFIX = struct.Struct(">8sH8sIII")
_SIZES_AT = len(MAGIC) + 10
_MAC_BYTES = 32


@dataclass(frozen=True, slots=True)
class SegmentKey:
    """What authenticates segments, derived from the deployment's secret. Never shows itself."""

    id: bytes
    mac: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: str | bytes) -> SegmentKey:
        """Derive the key for this purpose by HKDF-SHA256; at least 16 bytes of secret.

        The same secret may serve other purposes: their keys don't reveal this one.
        """
        material = secret.encode() if isinstance(secret, str) else secret
        if len(material) < SECRET_BYTES_MIN:
            raise ValueError(f"the segment secret needs at least {SECRET_BYTES_MIN} bytes")
        return cls(_hkdf(material, 8, b"key id"), _hkdf(material, 32, b"hmac"))


def _hkdf(material: bytes, length: int, purpose: bytes) -> bytes:
    info = b"syncer segment v1 " + purpose
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(material)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says about itself.

    `acknowledged_seq` is the highest seq its log had acknowledged when it was sealed. A seq between
    first and last that has no transaction was already final then. `schemas` maps each table to the
    schema version its ops have: newer code up-casts from there.
    """

    name: SegmentName
    acknowledged_seq: int
    environment: str
    schemas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SealedSegment:
    """A segment as it goes to the disk."""

    name: SegmentName
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that was read, and is what its path and its HMAC say."""

    header: SegmentHeader
    transactions: tuple[PendingTransaction, ...]


def seal(
    transactions: Sequence[PendingTransaction], header: SegmentHeader, key: SegmentKey
) -> SealedSegment:
    """Encode transactions of one log, in order of seq; the same input gives the same bytes.

    Raises SegmentTooLarge above TRANSACTIONS_MAX or INFLATED_BYTES_MAX, ValueError for transactions
    that the header doesn't describe. What only this buffer knows of their delivery (`attempts`,
    `parked`, `held_since`) isn't carried.
    """
    _check_header(header)
    _check_order(transactions, header.name)
    if len(transactions) > TRANSACTIONS_MAX:
        raise SegmentTooLarge(f"{len(transactions)} transactions; at most {TRANSACTIONS_MAX}")
    lines = _joined(encode_line(item) for item in transactions)
    body = zlib.compress(lines, LEVEL)
    head = orjson.dumps(
        {
            "log_id": header.name.log_id,
            "first_seq": header.name.first_seq,
            "last_seq": header.name.last_seq,
            "acknowledged_seq": header.acknowledged_seq,
            "environment": header.environment,
            "count": len(transactions),
            "schemas": dict(header.schemas),
        },
        option=orjson.OPT_SORT_KEYS,
    )
    if len(head) > HEADER_BYTES_MAX:
        raise SegmentTooLarge(f"a header of {len(head)} bytes; at most {HEADER_BYTES_MAX}")
    prefix = _PREFIX.pack(MAGIC, FORMAT, key.id, len(head), len(body), len(lines))
    sealed = prefix + head + body
    return SealedSegment(header.name, sealed + _mac(key, sealed))


def _joined(lines: Iterable[bytes]) -> bytes:
    """Join lines, and stop at the limit rather than after it."""
    kept: list[bytes] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if size > INFLATED_BYTES_MAX:
            raise SegmentTooLarge(f"more than {INFLATED_BYTES_MAX} bytes of transactions")
        kept.append(line)
    return b"\n".join(kept) + b"\n"


def read(
    data: bytes, keys: Sequence[SegmentKey], *, name: SegmentName, environment: str
) -> Segment:
    """Check and decode the content of the file `name`. Raises SegmentCorrupt, and nothing else.

    `keys` are tried by id: the present one, and those that were rotated out.
    """
    head, body, inflated_bytes = _authentic(data, keys, name)
    header, count = _header(head, name)
    if header.name != name:
        told = header.name.path
        raise SegmentCorrupt(name.path, _PREFIX.size, "misplaced", f"this is {told}")
    if header.environment != environment:
        reason = f"sealed in environment {header.environment!r}, this is {environment!r}"
        raise SegmentCorrupt(name.path, _PREFIX.size, "other_environment", reason)
    offset = _PREFIX.size + len(head)
    lines = _inflated(body, inflated_bytes, name, offset)
    try:
        transactions = tuple(decode_line(line, name.log_id) for line in lines)
        _check_order(transactions, name)
    except (ValueError, TypeError, KeyError) as error:  # the values stay out of the reason
        reason = f"a transaction doesn't read ({type(error).__name__})"
        raise SegmentCorrupt(name.path, offset, "malformed", reason) from None
    if len(transactions) != count:
        reason = f"{len(transactions)} transactions where the header says {count}"
        raise SegmentCorrupt(name.path, offset, "malformed", reason)
    return Segment(header, transactions)


def _authentic(
    data: bytes, keys: Sequence[SegmentKey], name: SegmentName
) -> tuple[bytes, bytes, int]:
    """Return header, body and the body's inflated size once the HMAC over all of it fits."""
    key_id, head_bytes, inflated_bytes = _measured(data, name)
    key = next((key for key in keys if key.id == key_id), None)
    if key is None:
        reason = "sealed with a key that isn't given here: another environment's, or an old one"
        raise SegmentCorrupt(name.path, len(MAGIC) + 2, "wrong_key", reason)
    sealed = data[:-_MAC_BYTES]
    if not hmac.compare_digest(_mac(key, sealed), data[-_MAC_BYTES:]):
        reason = "its HMAC doesn't fit: damaged or changed"
        raise SegmentCorrupt(name.path, len(sealed), "tampered", reason)
    body_at = _PREFIX.size + head_bytes
    return sealed[_PREFIX.size : body_at], sealed[body_at:], inflated_bytes


def _measured(data: bytes, name: SegmentName) -> tuple[bytes, int, int]:
    """Return key id and sizes from the prefix, which fit the data's length and the limits."""

    def corrupt(offset: int, fault: Fault, reason: str) -> SegmentCorrupt:
        return SegmentCorrupt(name.path, offset, fault, reason)

    if len(data) > SEGMENT_BYTES_MAX:
        raise corrupt(SEGMENT_BYTES_MAX, "too_large", f"more than {SEGMENT_BYTES_MAX} bytes")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise corrupt(0, "not_a_segment", "it doesn't begin as a segment does")
    if len(data) < _PREFIX.size:
        raise corrupt(len(data), "torn", f"it ends after {len(data)} bytes, in the prefix")
    _, version, key_id, head_bytes, body_bytes, inflated_bytes = _PREFIX.unpack_from(data)
    if version != FORMAT:
        reason = f"format {version}, this code reads {FORMAT}; a newer worker reads it"
        raise corrupt(len(MAGIC), "too_new", reason)
    if head_bytes > HEADER_BYTES_MAX or inflated_bytes > INFLATED_BYTES_MAX:
        raise corrupt(_SIZES_AT, "bomb", "it announces more than a segment may hold")
    end = _PREFIX.size + head_bytes + body_bytes + _MAC_BYTES
    if len(data) < end:
        raise corrupt(len(data), "torn", f"it ends after {len(data)} of {end} bytes")
    if len(data) > end:
        raise corrupt(end, "tampered", f"{len(data) - end} bytes behind its end")
    return key_id, head_bytes, inflated_bytes


def _header(head: bytes, name: SegmentName) -> tuple[SegmentHeader, int]:
    try:
        told = orjson.loads(head)
        found = SegmentName(told.pop("log_id"), told.pop("first_seq"), told.pop("last_seq"))
        count = told.pop("count")
        header = SegmentHeader(found, **told)
        _check_header(header)
        return header, int(count)
    except (ValueError, TypeError, KeyError, AttributeError):
        reason = "its header doesn't read"
        raise SegmentCorrupt(name.path, _PREFIX.size, "malformed", reason) from None


def _inflated(body: bytes, size: int, name: SegmentName, offset: int) -> list[bytes]:
    """Return the body's lines; never inflates more than the announced and allowed size."""
    inflater = zlib.decompressobj()
    try:
        lines = inflater.decompress(body, size + 1)  # one more, to notice
    except zlib.error:
        raise SegmentCorrupt(name.path, offset, "malformed", "its body isn't zlib") from None
    if len(lines) > size:
        reason = f"its body inflates to more than the {size} bytes announced"
        raise SegmentCorrupt(name.path, offset, "bomb", reason)
    if len(lines) < size or not inflater.eof or inflater.unused_data:
        raise SegmentCorrupt(name.path, offset, "malformed", "its body has another length")
    if lines.count(b"\n") > TRANSACTIONS_MAX:
        reason = f"more than {TRANSACTIONS_MAX} transactions"
        raise SegmentCorrupt(name.path, offset, "bomb", reason)
    return lines.removesuffix(b"\n").split(b"\n")


def _check_header(header: SegmentHeader) -> None:
    name, environment, schemas = header.name, header.environment, header.schemas
    acknowledged: Any = header.acknowledged_seq
    if not isinstance(acknowledged, int) or not name.last_seq <= acknowledged <= SEQ_MAX:
        raise ValueError("acknowledged_seq lies below the segment's last seq")
    if not isinstance(environment, str) or not 1 <= len(environment) <= ENVIRONMENT_MAX:
        raise ValueError(f"an environment's name has 1 to {ENVIRONMENT_MAX} characters")
    if not all(isinstance(key, str) and type(value) is int for key, value in schemas.items()):
        raise ValueError("schemas map names of tables to whole numbers")


def _check_order(transactions: Sequence[PendingTransaction], name: SegmentName) -> None:
    """Refuse what path and header don't describe, or what would be delivered out of order."""
    if not transactions:
        raise ValueError("a segment holds at least one transaction")
    before = name.first_seq - 1
    for item in transactions:
        if item.log_id != name.log_id or not before < item.seq <= name.last_seq:
            raise ValueError("transactions are of one log, in order of seq, from first to last")
        before = item.seq
    if len({item.txn_id for item in transactions}) != len(transactions):
        raise ValueError("a txn_id appears twice")


def _mac(key: SegmentKey, sealed: bytes) -> bytes:
    return hmac.new(key.mac, sealed, hashlib.sha256).digest()
