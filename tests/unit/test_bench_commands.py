"""`syncer bench`: commands that hand over to a checkout's benchmarks, or say where they are."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from syncer.errors import SettingsError
from syncer.service.cli import app


@pytest.mark.parametrize("name", ["ack", "flush", "api"])
def test_without_a_checkout_a_benchmark_says_where_it_can_be_run(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    for module in ("benchmarks", "benchmarks.ack", "benchmarks.drain", "benchmarks.api"):
        monkeypatch.setitem(sys.modules, module, None)  # as in an installed package
    ran = CliRunner().invoke(app, ["bench", name])
    assert isinstance(ran.exception, SettingsError)
    assert "aren't part of the package" in str(ran.exception)
    assert "checkout" in ran.exception.hint


def test_what_else_a_benchmark_misses_is_told_by_its_own_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "benchmarks.drain", raising=False)
    monkeypatch.setitem(sys.modules, "syncer.testkit.local_supabase", None)
    ran = CliRunner().invoke(app, ["bench", "flush"])
    assert isinstance(ran.exception, ModuleNotFoundError)
    assert ran.exception.name == "syncer.testkit.local_supabase"


@pytest.mark.parametrize(
    ("command", "module", "handed_over"),
    [
        ("ack --quick --json", "ack", ["--quick", "--json"]),
        ("flush --transactions 2000", "drain", ["--transactions", "2000", "--users", "200"]),
        (
            "api --write --calls 20",
            "api",
            ["--write", "--sessions", "10000", "--calls", "20", "--seconds", "20.0"],
        ),
    ],
)
def test_options_are_handed_over(
    command: str, module: str, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
):
    stand_in, given = ModuleType(module), []
    stand_in.main = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"benchmarks.{module}", stand_in)
    assert CliRunner().invoke(app, ["bench", *command.split()]).exit_code == 0
    assert given == [handed_over]
