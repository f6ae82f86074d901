"""Names and keys of segments: what they derive from, and what they never show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_store.segment_names import SegmentName
from local_store.segments import SegmentKey
from tests.unit.segment_samples import (
    KEY,
    LOG,
    name_of,
    sealed,
)


@pytest.mark.parametrize(
    "name",
    [
        ("..", 1, 1),
        ("../" + LOG, 1, 1),
        (LOG.upper(), 1, 1),
        (LOG + "\n", 1, 1),
        (LOG, 0, 1),
        (LOG, 2, 1),
        (LOG, 1, 2**63),
    ],
)
def test_no_name_leads_out_of_its_folder(name: tuple[str, int, int]):
    with pytest.raises(ValueError, match="segment"):
        SegmentName(*name)
    assert SegmentName.parse(name[0], f"{name[1]:019d}-{name[2]:019d}.seg") is None


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1))
def test_a_name_is_read_as_it_was_written_and_sorts_as_its_seqs(one: int, two: int):
    name = name_of(min(one, two), max(one, two))
    assert SegmentName.parse(LOG, name.file_name) == name
    assert (name_of(one, one) < name_of(two, two)) == (
        name_of(one, one).file_name < name_of(two, two).file_name
    )


@pytest.mark.parametrize("file_name", ["1-2.seg", "٠" * 19 + "-" + "0" * 18 + "1.seg", "x.seg", ""])
def test_a_file_called_otherwise_is_no_segment(file_name: str):
    assert SegmentName.parse(LOG, file_name) is None


def test_a_key_shows_nothing_of_itself_or_its_secret():
    shown = f"{KEY!r} {KEY} {sealed()!r}"
    assert "secret" not in shown
    assert repr(KEY.mac) not in shown


def test_a_short_secret_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="16 bytes") as caught:
        SegmentKey.derive("hunter2")
    assert "hunter2" not in str(caught.value)


def test_key_and_id_are_derived_apart_from_each_other():
    assert KEY.id != KEY.mac[:8]
    assert b"a secret of the deployment" not in KEY.mac
    assert SegmentKey.derive(b"a secret of the deployment") == KEY
