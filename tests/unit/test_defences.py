"""Each defence that `make defences` takes away is still where it says."""

from __future__ import annotations

import pytest

from tests.defences import DEFENCES, ROOT, Defence


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda defence: defence.name)
def test_a_defences_piece_stands_in_its_file_and_its_tests_exist(defence: Defence) -> None:
    assert defence.piece in (ROOT / defence.file).read_text()
    assert defence.piece != defence.instead
    assert [name for name in defence.tests if not (ROOT / name).exists()] == []
