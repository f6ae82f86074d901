"""The arithmetic of the acknowledge benchmark; what it measures is no test's business."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.ack import percentile
from benchmarks.ack_report import FLOOR, Ratio, plot, ratios, report


def cell(**rates: float) -> dict[str, Any]:
    return {
        name: [{"ops_s": rate * factor, "p50_ms": 1_000 / rate, "p99_ms": 5_000 / rate}
               for factor in (1, 2, 0.5)]
        for name, rate in rates.items()
    }  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    names = {"syncer": 8_000.0, FLOOR: 4_000.0, "huey, forced": 2_000.0, "raw sqlite3, FULL": 3e3}
    cells = {f"threads {n}": cell(**names) for n in (1, 4, 16, 64)}
    cells |= {f"coroutines {n}": cell(**names) for n in (1, 16, 64)}
    cells["threads 16 beside a CPU-bound thread"] = cell(**names)
    looked = {"p50_ms": 1.0, "pending_ms": 2.0, "rss_mb": 50.0}
    return {
        "cells": cells,
        "syncs": {"threads 64": {"syncer": 0.03}, "coroutines 64": {"syncer": 0.5}},
        "queued": {
            "count": 10,
            "filled_s": 1.0,
            "empty": looked,
            "full": {**looked, "p50_ms": 1.3},
        },
        "sustained": {"first": 100, "last": 90},
        "large_row": {"small_p50_ms": 1.0, "large_p50_ms": 1.1},
        "missing": ["litequeue"],
    }


def test_percentiles_are_of_the_sorted_values():
    values = [float(n) for n in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)
    assert percentile([7.0], 0.99) == 7.0


def test_a_ratio_is_met_from_its_own_side():
    assert Ratio("rate", 3.5, 5, 3.5, at_least=True).ok
    assert not Ratio("rate", 3.5, 5, 3.4, at_least=True).ok
    assert Ratio("time", 1.15, 1, 1.15, at_least=False).ok
    assert not Ratio("time", 1.15, 1, 1.2, at_least=False).ok


def test_ratios_compare_medians_with_the_best_durable_peer(found: dict[str, Any]):
    by_name = {ratio.what: ratio for ratio in ratios(found)}
    assert by_name["p50, 1 thread / floor"].found == 0.5
    assert by_name["threads 64 / best durable peer"].found == 4.0  # raw sqlite3 is no peer
    assert not by_name["syncs per op, coroutines 64"].ok
    assert not by_name["p50 with 10 queued / empty"].ok


def test_the_report_names_what_is_missing_and_what_was_missed(found, tmp_path):
    text = report(found, tmp_path, write=False)
    assert "pip install litequeue" in text
    assert "| p50 with 10 queued / empty | ≤ 1.2 | 1 | 1.3 | missed |" in text
    assert "**threads 64**" in text


def test_the_plot_is_well_formed(found: dict[str, Any]):
    root = ElementTree.fromstring(plot(found))
    assert root.tag.endswith("svg")
    assert any("syncer" in (element.text or "") for element in root.iter())
