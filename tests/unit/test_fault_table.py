"""The table of faults in the documents names tests that exist, at least one in each row."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "FAULTS.md"
GROUPS = (
    "Local disk",
    "Process",
    "Network",
    "Server",
    "Auth and settings",
    "Data",
    "Conflict",
    "Time",
    "Volume",
    "Security",
    "Long",
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def rows(group: str) -> list[list[str]]:
    """The cells of a group's rows, without its head."""
    [text] = re.findall(rf"^## {group}\n(.*?)(?=^## |\Z)", TABLE.read_text(), re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| fault | what holds | tests |", "|---|---|---|"]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@cache
def names_in(path: Path) -> frozenset[str]:
    """The names of all test functions of a file, also of those inside classes."""
    tree = ast.parse(path.read_text())
    found = (node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
    return frozenset(name for name in found if name.startswith("test_"))


def test_the_table_has_its_groups_in_their_order():
    assert tuple(re.findall(r"^## (.*)$", TABLE.read_text(), re.M)) == GROUPS


@pytest.mark.parametrize("group", GROUPS)
def test_each_fault_of_the_table_has_a_promise_and_tests_that_exist(group: str):
    assert rows(group)
    for cells in rows(group):
        assert len(cells) == 3, cells
        fault, holds, named = cells
        assert fault, named
        assert holds, fault
        tests = [test for test in named.split(", ") if test]
        assert tests, f"{fault}: no test"
        for test in tests:
            found = re.fullmatch(r"`(\w+/[\w/]+\.py)::(test_\w+)`", test)
            assert found, f"{fault}: {test} is no test's path"
            path, name = ROOT / "tests" / found[1], found[2]
            assert path.is_file(), f"{fault}: no file {found[1]}"
            assert name in names_in(path), f"{fault}: no {name} in {found[1]}"


@pytest.mark.parametrize("group", GROUPS)
def test_no_fault_stands_in_the_table_twice(group: str):
    faults = [cells[0] for cells in rows(group)]
    assert len(set(faults)) == len(faults)
