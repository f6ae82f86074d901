"""The small evaluator of alert rules: what it can, and that it refuses what it can't."""

from __future__ import annotations

from typing import Any

import pytest

from tests.promql import Scrapes, evaluate, firing


def scraped(*values: float, name: str = "x_total", step_s: float = 60.0) -> Scrapes:
    made = Scrapes()
    for number, value in enumerate(values):
        made.add(number * step_s, f'# TYPE x counter\n{name}{{a="b"}} {value}\n')
    return made


LABELS = frozenset({("a", "b")})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("x_total", {LABELS: 6.0}),
        ('x_total{a="b"}', {LABELS: 6.0}),
        ('x_total{a="c"}', {}),
        ("x_total > 5", {LABELS: 6.0}),
        ("x_total > 6", {}),
        ("x_total == 6", {LABELS: 6.0}),
        ("1 - x_total / 12", {LABELS: 0.5}),
        ("x_total * 2 + 1", {LABELS: 13.0}),
        ("sum(x_total)", {frozenset(): 6.0}),
        ("sum by (a) (x_total)", {LABELS: 6.0}),
        ("rate(x_total[5m])", {LABELS: 0.05}),
    ],
)
def test_an_expression_has_the_value_that_prometheus_gives_it(expression: str, value: Any) -> None:
    assert evaluate(expression, scraped(0, 3, 6), 120.0) == value


def test_a_rate_survives_a_restart_and_needs_two_points() -> None:
    assert evaluate("rate(x_total[5m])", scraped(10, 4), 60.0) == {LABELS: 4 / 60}
    assert evaluate("rate(x_total[5m])", scraped(10), 0.0) == {}


def test_a_sample_is_forgotten_after_five_minutes() -> None:
    assert evaluate("x_total", scraped(1), 299.0) == {LABELS: 1.0}
    assert evaluate("x_total", scraped(1), 300.0) == {}


def test_a_quantile_is_found_inside_its_bucket() -> None:
    made = Scrapes()
    text = "# TYPE h histogram\n" + "".join(
        f'h_bucket{{le="{bound}"}} {count}\n'
        for bound, count in (("10", 50), ("20", 90), ("+Inf", 100))
    )
    made.add(0.0, text)
    [value] = evaluate("histogram_quantile(0.7, h_bucket)", made, 0.0).values()  # type: ignore[union-attr]
    assert value == pytest.approx(15.0)
    [last] = evaluate("histogram_quantile(0.95, h_bucket)", made, 0.0).values()  # type: ignore[union-attr]
    assert last == 20.0


def test_a_rule_fires_once_it_has_held_for_its_time() -> None:
    rule, scrapes = {"expr": "x_total > 0", "for": "2m"}, scraped(0, 1, 1, 0, 1, 1, 1)
    fires = [firing(rule, scrapes, at * 60.0, 60.0) for at in range(7)]
    assert fires == [False, False, False, False, False, False, True]
    assert firing({"expr": "x_total > 0"}, scrapes, 60.0, 60.0)


@pytest.mark.parametrize(
    "expression",
    [
        "avg(x_total)",
        "x_total offset 5m",
        "x_total or x_total",
        'x_total{a=~"b"}',
        "increase(x_total[5m])",
        "x_total > bool 5",
    ],
)
def test_what_it_does_not_know_it_refuses(expression: str) -> None:
    with pytest.raises((ValueError, AssertionError, IndexError)):
        evaluate(expression, scraped(0, 3), 60.0)
