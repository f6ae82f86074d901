"""What `make coverage` leaves out: little, and each for a reason that stands beside it."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from coverage import Coverage

ROOT = Path(__file__).parents[2]
MEASURED = ("local_store", "syncer/sessions")
LINES_MAX = 20
PRAGMA = re.compile(r"pragma\W*no\W*(cover|branch)", re.IGNORECASE)
WITH_REASON = re.compile(r"# pragma: no (cover|branch) - \S+( \S+){2,}")


def pragmas(path: Path) -> Iterator[str]:
    """Yield the comments of a file that leave something out."""
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and PRAGMA.search(token.string):
                yield token.string


@pytest.fixture(scope="module")
def exclusions() -> dict[Path, list[str]]:
    paths = [path for folder in MEASURED for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: found for path in paths if (found := list(pragmas(path)))}


def test_whatever_is_left_out_has_its_reason_on_the_same_line(exclusions: dict[Path, list[str]]):
    unreasoned = [
        f"{path.relative_to(ROOT)}: {comment}"
        for path, found in exclusions.items()
        for comment in found
        if not WITH_REASON.fullmatch(comment)
    ]
    assert unreasoned == []


def test_no_more_than_twenty_lines_are_left_out(exclusions: dict[Path, list[str]]):
    measured = Coverage(config_file=ROOT / "pyproject.toml", data_file=None)
    assert tuple(measured.get_option("run:source") or ()) == MEASURED
    lines = 0
    for path in (path for folder in MEASURED for path in sorted((ROOT / folder).rglob("*.py"))):
        _, _, excluded, _, _ = measured.analysis2(str(path))
        assert not excluded or path in exclusions, f"{path} leaves {excluded} out without a comment"
        lines += len(excluded)
    branches = sum("no branch" in comment for found in exclusions.values() for comment in found)
    assert lines + branches <= LINES_MAX


def test_a_bare_pragma_leaves_nothing_out(tmp_path: Path):
    source = tmp_path / "sample.py"
    source.write_text(
        "if a:  # pragma: no cover\n    b\nif c:  # pragma: no cover - it has a reason\n    d\n"
    )
    measured = Coverage(config_file=ROOT / "pyproject.toml", data_file=None)
    _, _, excluded, _, _ = measured.analysis2(str(source))
    assert excluded == [3, 4]
