"""Segments as bytes: what was sealed is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import math
import os
import struct
import tracemalloc
import zlib
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_store import segments
from local_store.ops import PendingTransaction, WireOp
from local_store.segment_names import SegmentCorrupt, SegmentName, SegmentTooLarge
from local_store.segments import SealedSegment, Segment, SegmentKey, read, seal
from tests.unit.segment_samples import (
    KEY,
    LOG,
    OTHER_LOG,
    header_of,
    name_of,
    sealed,
    transaction,
)

# -- strategies: what the door lets through -------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROW = st.dictionaries(TEXT, JSON, max_size=3)
KINDS = st.sampled_from(["insert", "update", "delete"])


@st.composite
def transactions(draw: st.DrawFn) -> list[PendingTransaction]:
    found = []
    seq = 0
    for _ in range(draw(st.integers(1, 4))):
        seq += draw(st.integers(1, 3))
        ops = draw(st.lists(st.builds(WireOp, TEXT, KINDS, TEXT, ROW), max_size=3))

        def per_op(item: st.SearchStrategy[Any], count: int = len(ops)) -> tuple[Any, ...]:
            return tuple(draw(st.lists(item, min_size=count, max_size=count)))

        found.append(
            transaction(
                seq,
                accepted_at=draw(TEXT),
                ops=tuple(ops),
                bases=per_op(st.none() | TEXT),
                chained=per_op(st.booleans()),
                before=per_op(st.none() | ROW),
                children=per_op(st.none() | st.dictionaries(TEXT, st.none() | TEXT, max_size=2)),
                after=tuple(draw(st.lists(TEXT, max_size=2))),
                records=tuple(draw(st.lists(ROW, max_size=2))),
                met=draw(st.dictionaries(TEXT, st.none() | TEXT, max_size=2)),
                position=draw(st.integers(0, 2**63 - 1)),
                size_bytes=draw(st.integers(0, 2**40)),
            )
        )
    return found


def read_back(segment: SealedSegment, **changes: Any) -> Segment:
    asked: dict[str, Any] = {"keys": [KEY], "name": segment.name, "environment": "prod", **changes}
    return read(segment.data, asked.pop("keys"), **asked)


def refused(data: bytes, name: SegmentName, **changes: Any) -> SegmentCorrupt:
    with pytest.raises(SegmentCorrupt) as caught:
        read_back(SealedSegment(name, data), **changes)
    assert caught.value.path == name.path
    assert 0 <= caught.value.offset <= max(len(data), 1)
    return caught.value


def forged(head: object, lines: bytes, *, inflated: int | None = None, body: bytes = b"") -> bytes:
    """Seal anything with the right key, as a bug or a thief of the key would."""
    raw = head if isinstance(head, bytes) else orjson.dumps(head)
    body = body or zlib.compress(lines)
    size = len(lines) if inflated is None else inflated
    prefix = struct.pack(">8sH8sIII", b"SYNCSEG\n", 1, KEY.id, len(raw), len(body), size)
    data = prefix + raw + body
    return data + hmac.new(KEY.mac, data, hashlib.sha256).digest()


def head_of(**changes: object) -> dict[str, object]:
    head = {
        "log_id": LOG,
        "first_seq": 1,
        "last_seq": 1,
        "acknowledged_seq": 1,
        "environment": "prod",
        "count": 1,
        "schemas": {},
    }
    return {**head, **changes}


def line_of(**changes: object) -> bytes:
    body = zlib.decompress(sealed(1, 1).data[30 + header_bytes(sealed(1, 1).data) : -32])
    return orjson.dumps({**orjson.loads(body), **changes}) + b"\n"


def header_bytes(data: bytes) -> int:
    return struct.unpack_from(">I", data, 18)[0]


# -- what was sealed is read back -----------------------------------------------------------------


@given(transactions(), st.dictionaries(TEXT, st.integers(1, 9), max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_transaction_comes_back_as_it_was_sealed(
    items: list[PendingTransaction], schemas: dict[str, int]
):
    header = header_of(1, items[-1].seq, acknowledged_seq=items[-1].seq + 5, schemas=schemas)
    found = read_back(seal(items, header, KEY))
    assert found == Segment(header, tuple(items))


def test_a_segment_carries_every_field_but_what_only_its_buffer_knows_of_the_delivery():
    local = {"attempts": 3, "parked": True, "held_since": "2026-01-01T00:00:00.000000+00:00"}
    [found] = read_back(seal([transaction(**local)], header_of(1, 1), KEY)).transactions
    assert found == transaction()
    carried = set(orjson.loads(line_of())) | {"log_id"}
    assert {item.name for item in dataclasses.fields(PendingTransaction)} == carried | set(local)


def test_the_same_transactions_give_the_same_bytes():
    assert sealed().data == sealed().data


def test_a_range_may_have_gaps_where_transactions_were_final_already():
    items = [transaction(3), transaction(7)]
    found = read_back(seal(items, header_of(2, 9, acknowledged_seq=9), KEY))
    assert [item.seq for item in found.transactions] == [3, 7]


def test_a_key_that_was_rotated_out_still_reads():
    new = SegmentKey.derive("the secret of next year")
    assert read_back(sealed(), keys=[new, KEY]).transactions


@pytest.mark.parametrize(
    ("items", "header"),
    [
        ([], header_of(1, 1)),
        ([transaction(2), transaction(1)], header_of(1, 2)),
        ([transaction(1), transaction(1)], header_of(1, 2)),
        ([transaction(3)], header_of(1, 2)),
        ([transaction(1)], header_of(2, 2)),
        ([transaction(1, OTHER_LOG)], header_of(1, 1)),
        ([transaction(1), transaction(2, txn_id=transaction(1).txn_id)], header_of(1, 2)),
        ([transaction(2)], header_of(1, 2, acknowledged_seq=1)),
        ([transaction(1)], header_of(1, 1, environment="")),
        ([transaction(1)], header_of(1, 1, schemas={"notes": "2"})),
    ],
)
def test_what_the_header_does_not_describe_is_not_sealed(items: Any, header: Any):
    with pytest.raises(ValueError, match=r"\w"):
        seal(items, header, KEY)


def test_too_many_transactions_are_refused_before_anything_is_encoded():
    count = segments.TRANSACTIONS_MAX + 1
    with pytest.raises(SegmentTooLarge, match="at most 10000"):
        seal([transaction(seq) for seq in range(1, count + 1)], header_of(1, count), KEY)


def test_too_many_bytes_are_refused():
    op = WireOp("notes", "insert", "id-1", {"text": "x" * (33 * 1024**2)})
    items = [transaction(seq, ops=(op,)) for seq in (1, 2)]
    with pytest.raises(SegmentTooLarge, match="67108864 bytes"):
        seal(items, header_of(1, 2), KEY)


def test_the_largest_segment_of_noise_fits_the_limit_of_the_file():
    noise = os.urandom(47 * 1024**2).hex()[: 63 * 1024**2]
    op = WireOp("notes", "insert", "id-1", {"text": noise})
    segment = seal([transaction(ops=(op,))], header_of(1, 1), KEY)
    assert read_back(segment).transactions[0].ops == (op,)


# -- and nothing else is --------------------------------------------------------------------------


def test_a_segment_cut_at_any_byte_is_torn():
    segment = sealed()
    for length in range(len(segment.data)):
        found = refused(segment.data[:length], segment.name)
        assert (found.fault, found.offset) == ("torn", length)


def test_a_segment_with_any_bit_flipped_is_refused():
    segment = sealed(1, 1)
    faults = set()
    for index in range(len(segment.data)):
        for bit in range(8):
            data = bytearray(segment.data)
            data[index] ^= 1 << bit
            faults.add(refused(bytes(data), segment.name).fault)
    expected = {"not_a_segment", "too_new", "wrong_key", "bomb", "torn", "tampered"}
    assert faults == expected  # none got as far as being parsed


def test_bytes_behind_the_end_are_refused():
    segment = sealed()
    found = refused(segment.data + b"\0", segment.name)
    assert (found.fault, found.offset) == ("tampered", len(segment.data))


def test_zeros_in_place_of_the_content_are_no_segment():
    segment = sealed()
    assert refused(bytes(len(segment.data)), segment.name).fault == "not_a_segment"
    sparse = segment.data[:100] + bytes(len(segment.data) - 100)
    assert refused(sparse, segment.name).fault == "tampered"


def test_two_segments_swapped_by_name_are_both_refused():
    one, two = sealed(1, 2), sealed(3, 4)
    assert refused(one.data, two.name).fault == "misplaced"
    assert refused(two.data, one.name).fault == "misplaced"


def test_a_segment_replayed_from_another_logs_folder_is_refused():
    found = refused(sealed(1, 2, OTHER_LOG).data, name_of(1, 2))
    assert found.fault == "misplaced"
    assert OTHER_LOG in found.reason


def test_another_key_is_told_from_damage():
    segment = sealed(key=SegmentKey.derive("a secret of somebody else"))
    found = refused(segment.data, segment.name)
    assert (found.fault, found.stays) == ("wrong_key", True)
    assert refused(segment.data, segment.name, keys=[]).fault == "wrong_key"


def test_a_key_id_alone_opens_nothing():
    forger = SegmentKey(KEY.id, b"x" * 32)
    segment = sealed(key=forger)
    assert refused(segment.data, segment.name).fault == "tampered"


def test_another_environment_is_told_from_damage():
    segment = sealed(environment="staging")
    found = refused(segment.data, segment.name)
    assert (found.fault, found.stays) == ("other_environment", True)


def test_a_newer_format_is_left_for_newer_code():
    data = bytearray(sealed().data)
    struct.pack_into(">H", data, 8, 2)
    found = refused(bytes(data), sealed().name)
    assert (found.fault, found.stays, found.offset) == ("too_new", True, 8)


def test_only_three_faults_leave_the_file_in_its_place():
    faults = segments.Fault.__args__  # type: ignore[attr-defined]
    stay = [it for it in faults if SegmentCorrupt(name_of(1, 1).path, 0, it, "").stays]
    assert stay == ["too_new", "wrong_key", "other_environment"]


@functools.cache
def gigabyte_of_zeros() -> bytes:
    deflater = zlib.compressobj(1)
    mebibyte = bytes(1024**2)
    return b"".join(deflater.compress(mebibyte) for _ in range(1024)) + deflater.flush()


@pytest.mark.parametrize("announced", [None, 1000, 64 * 1024**2])
def test_a_gigabyte_of_zeros_is_not_inflated(announced: int | None):
    body = gigabyte_of_zeros()
    size = 1024**3 if announced is None else announced
    data = forged(head_of(), b"", inflated=size, body=body)
    tracemalloc.start()
    assert refused(data, name_of(1, 1)).fault == "bomb"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 64 * 1024**2


def test_lines_without_end_are_not_parsed():
    data = forged(head_of(count=20_000), b"{}\n" * 20_000)
    assert refused(data, name_of(1, 1)).fault == "bomb"


def test_a_header_larger_than_the_limit_is_refused():
    head = orjson.dumps(head_of(schemas={str(number): 1 for number in range(10_000)}))
    assert refused(forged(head, line_of()), name_of(1, 1)).fault == "bomb"
    many = {str(number): 1 for number in range(10_000)}
    with pytest.raises(SegmentTooLarge, match="header"):
        seal([transaction()], header_of(1, 1, schemas=many), KEY)


def test_a_file_above_the_limit_is_refused_unread():
    data = b"SYNCSEG\n" + bytes(65 * 1024**2)
    assert refused(data, name_of(1, 1)).fault == "too_large"


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (b"[]", line_of()),
        (b"{", line_of()),
        (head_of(log_id="../../etc"), line_of()),
        (head_of(log_id=5), line_of()),
        (head_of(first_seq=0), line_of()),
        (head_of(acknowledged_seq="1"), line_of()),
        (head_of(schemas=[]), line_of()),
        (head_of(extra=1), line_of()),
        (head_of(count=2), line_of()),
        (head_of(count=None), line_of()),
        (head_of(), b"{}\n"),
        (head_of(), b"\n"),
        (head_of(), b"[1]\n"),
        (head_of(), line_of() + line_of()),
        (head_of(), line_of(surplus=1)),
        (head_of(), line_of(seq="1")),
        (head_of(), line_of(seq=True)),
        (head_of(), line_of(seq=2)),
        (head_of(), line_of(user_id=None)),
        (head_of(), line_of(ops=None)),
        (head_of(), line_of(ops=[{"table": "notes"}])),
        (head_of(), line_of(ops=[{"table": "notes", "kind": "drop", "id": "i", "values": {}}])),
        (head_of(), line_of(ops=[{"table": "notes", "kind": "insert", "id": 1, "values": {}}])),
        (head_of(), line_of(ops=[{"table": "n", "kind": "insert", "id": "i", "values": []}])),
        (head_of(), line_of(bases=[])),
        (head_of(), line_of(chained=[None])),
        (head_of(), line_of(met=[])),
        (head_of(), line_of(met={"notes/1": 1})),
        (head_of(), line_of(before=["x"])),
        (head_of(), line_of(children=[[]])),
        (head_of(), line_of(records=[None])),
        (head_of(), line_of(after=[None])),
    ],
)
def test_an_authentic_segment_that_makes_no_sense_is_an_error_not_a_crash(head: Any, lines: bytes):
    assert refused(forged(head, lines), name_of(1, 1)).fault == "malformed"


def test_the_forgery_of_these_tests_reads_when_it_makes_sense():
    assert read_back(SealedSegment(name_of(1, 1), forged(head_of(), line_of()))).transactions


@pytest.mark.parametrize("body", [b"not zlib", zlib.compress(b"x" * 10), zlib.compress(b"") + b"x"])
def test_a_body_that_is_not_what_the_prefix_says_is_refused(body: bytes):
    data = forged(head_of(), b"", inflated=100, body=body)
    assert refused(data, name_of(1, 1)).fault == "malformed"


def test_a_body_that_goes_on_or_lacks_its_end_is_refused():
    body = zlib.compress(line_of())
    for wrong in (body + b"x", body[:-1], body[:-4]):
        assert refused(forged(head_of(), line_of(), body=wrong), name_of(1, 1)).fault == "malformed"


def test_reasons_never_repeat_values():
    found = refused(forged(head_of(), line_of(user_id=None, digest="canary")), name_of(1, 1))
    assert "canary" not in str(found)
    assert found.__cause__ is None
    assert math.isfinite(found.offset)
