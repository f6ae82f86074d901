"""The arithmetic of the acknowledge benchmark; what it measures is no test's business."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.ack import COMPARED, FULL, MODES, QUICK, Run, build_shim, percentile, workplace
from benchmarks.ack_measure import made, summary
from benchmarks.ack_peers import CONTENDERS, is_installed, syncs_by_default
from benchmarks.ack_plot import plot
from benchmarks.ack_report import (
    BEGIN,
    CPU_BOUND,
    DRAWN,
    END,
    EXECUTEMANY,
    FLOOR,
    SLOW,
    Ratio,
    ratios,
    replaced,
    report,
)


def cell(**rates: float) -> dict[str, Any]:
    return {
        name: [{"ops_s": rate * factor, "p50_ms": 1_000 / rate, "p99_ms": 5_000 / rate,
                "syncs_per_op": 0.03}
               for factor in (1, 2, 0.5)]
        for name, rate in rates.items()
    }  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    names = {"syncer": 8_000.0, FLOOR: 4_000.0, "huey, forced": 2_000.0, "raw sqlite3, FULL": 3e3}
    cells = {f"threads {n}": cell(**names) for n in (1, 4, 16, 64)}
    cells |= {f"coroutines {n}": cell(**names) for n in (1, 16, 64)}
    cells[f"threads 16 {CPU_BOUND}"] = cell(**names, **{EXECUTEMANY: 1_000.0})
    looked = {"p50_ms": 1.0, "pending_ms": 2.0, "rss_mb": 50.0}
    return {
        "cells": cells,
        "counted": True,
        "queued": {
            "count": 10,
            "filled_s": 1.0,
            "empty": looked,
            "full": {**looked, "p50_ms": 1.3},
        },
        "sustained": {"seconds": 10, "first": 100, "last": 90},
        "large_row": {"small_p50_ms": 1.0, "large_p50_ms": 1.1},
        "missing": ["litequeue"],
    }


def test_percentiles_are_of_the_sorted_values():
    values = [float(n) for n in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)
    assert percentile([7.0], 0.99) == 7.0


def test_writes_count_by_when_they_finished_so_that_a_queue_at_either_end_costs_nobody_his_rate():
    # Ten callers before one lock, 0.1 s a write: each waits for the nine others.
    done = [(max(0.0, (n - 10) / 10), min(1.0, n / 10)) for n in range(1, 45)]
    found = summary(done, measured_from=1.05, end=3.05, syncs=20)
    assert found["ops_s"] == pytest.approx(10)
    assert found["syncs_per_op"] == 1.0
    assert found["p50_ms"] == pytest.approx(1_000)


def test_the_latencies_are_also_of_those_who_were_still_waiting_at_the_end():
    done = [(n / 10, 0.1) for n in range(20)] + [(0.5, 9.0)]
    found = summary(done, measured_from=0.95, end=2.05, syncs=None)
    assert (found["p99_ms"], found["syncs_per_op"]) == (9_000, None)


def test_whoever_finishes_nothing_in_the_window_is_slow_and_no_error():
    assert summary([(0.0, 5.0)], measured_from=1.0, end=2.0, syncs=1)["ops_s"] == 1.0


def test_a_ratio_is_met_from_its_own_side():
    assert Ratio("rate", 3.5, 5, 3.5, at_least=True).ok
    assert not Ratio("rate", 3.5, 5, 3.4, at_least=True).ok
    assert Ratio("time", 1.15, 1, 1.15, at_least=False).ok
    assert not Ratio("time", 1.15, 1, 1.2, at_least=False).ok


def test_ratios_compare_medians_with_the_best_durable_peer(found: dict[str, Any]):
    by_name = {ratio.what: ratio for ratio in ratios(found)}
    assert by_name["p50, 1 thread / floor"].found == 0.5
    assert by_name["threads 64 / best durable peer (huey, forced)"].found == 4.0  # raw is no peer
    assert by_name["syncs per op, threads 64"].ok
    assert not by_name["syncs per op, coroutines 64"].ok
    assert by_name[f"p50 with executemany / syncer, 16 threads {CPU_BOUND}"].found == 8.0
    assert not by_name["p50 with 10 queued / empty"].ok


def test_the_report_names_what_is_missing_and_what_was_missed(found, tmp_path):
    text = report(found, tmp_path, write=False)
    assert "pip install litequeue" in text
    assert "| p50 with 10 queued / empty | ≤ 1.2 | 1 | 1.3 | missed |" in text
    assert "**threads 64**" in text


def test_a_ratio_is_of_the_same_round_so_that_a_slow_round_of_the_disk_cancels_out(
    found: dict[str, Any],
):
    for name, rates in (("syncer", (800, 80, 8)), ("huey, forced", (200, 20, 2))):
        found["cells"]["threads 64"][name] = [{"ops_s": rate, "syncs_per_op": 1} for rate in rates]
    by_name = {ratio.what: ratio for ratio in ratios(found)}
    assert by_name["threads 64 / best durable peer (huey, forced)"].found == 4.0


def test_without_any_durable_peer_the_ratio_is_left_out_and_the_rest_stays(found: dict[str, Any]):
    for by_name in found["cells"].values():
        by_name.pop("huey, forced")
    text = report(found, Path("/nowhere"), write=False)
    assert "best durable peer" not in text
    assert "p50, 1 thread / floor" in text


def test_without_a_compiler_the_report_says_that_nothing_was_counted(found, tmp_path):
    found["counted"] = False
    assert "syncs not counted" in report(found, tmp_path, write=False)


def test_writing_replaces_what_is_between_the_markers_only():
    old = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(old, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


@pytest.mark.parametrize("mode", ["threads", "coroutines"])
def test_the_plot_is_well_formed_and_has_a_line_for_each_contender_in_each_panel(
    found: dict[str, Any], mode: str
):
    root = ElementTree.fromstring(plot(found, DRAWN))
    words = [element.text for element in root.iter() if element.text]
    assert {mode, "callers", "writes per second", "syncer", FLOOR, "huey, forced"} <= set(words)
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 * 4


def test_the_plot_escapes_names(found: dict[str, Any]):
    for by_name in found["cells"].values():
        by_name["a<b"] = by_name.pop(FLOOR)
    ElementTree.fromstring(plot(found, ["syncer", "a<b"]))


def test_every_round_begins_with_another_contender(tmp_path: Path, found: dict[str, Any]):
    run = Run(tmp_path, replace(QUICK, rounds=3))
    firsts = {run.turn(number)[0] for number in range(3)}
    assert len(firsts) == 3
    assert all(sorted(run.turn(n)) == sorted(run.turn(0)) for n in range(3))


def test_every_number_of_callers_is_measured_alone_beside_a_busy_thread_and_on_a_slower_disk(
    tmp_path: Path,
):
    run = Run(tmp_path, FULL)
    first, later = run.plan(0), run.plan(1)
    wheres = ("", CPU_BOUND, SLOW) if build_shim(tmp_path) else ("", CPU_BOUND)
    assert set(first) == {(*mode, where) for mode in MODES for where in wheres}
    assert len(first) == len(set(first))
    assert set(later) == {one for one in first if not one[2] or one in COMPARED}
    assert set(Run(tmp_path, QUICK).plan(0)) > COMPARED & set(first)


@pytest.mark.parametrize(
    "name", [*(n for n, e in CONTENDERS.items() if is_installed(e)), EXECUTEMANY]
)
def test_what_a_contender_acknowledged_is_there_when_it_is_opened_again(name: str, tmp_path: Path):
    contender = made(name, tmp_path)
    for number in range(7):
        contender.put(number)
    contender.close()
    again = made(name, tmp_path)
    assert again.held() == 7
    again.close()


def test_what_lies_in_the_folder_given_is_left_alone(tmp_path: Path):
    (tmp_path / "somebodys").write_text("kept")
    with workplace(tmp_path) as place:
        Path(place, "ours").write_text("gone")
    assert [path.name for path in tmp_path.iterdir()] == ["somebodys"]


def test_a_peer_without_a_pragma_is_as_durable_as_sqlite_was_built():
    assert syncs_by_default(["DEFAULT_SYNCHRONOUS=2", "DEFAULT_WAL_SYNCHRONOUS=2", "THREADSAFE=1"])
    assert syncs_by_default(["THREADSAFE=1", "ENABLE_FTS5"])
    assert not syncs_by_default(["DEFAULT_SYNCHRONOUS=2", "DEFAULT_WAL_SYNCHRONOUS=1"])
