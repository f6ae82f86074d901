"""As much of Prometheus as the rules in ops/alerts.yml use, to fire them in tests.

Selectors with equal labels, `rate(…[5m])`, `sum`, `sum by (…)`, `histogram_quantile`, arithmetic
and one comparison. Anything else is an error, never a guess. `rate` doesn't extrapolate: ratios and
quantiles are the same without it. Where `promtool` is installed tests/integration/test_alerts.py
compares its judgement with this one.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = Vector | float

LOOKBACK_S = 300.0  # an older sample is no sample
_TOKEN = re.compile(r'\s*(\d+m\b|[\d.]+|"[^"]*"|\w+|[><=!]=?|[-+*/(){},\[\]])')
_NAME = "__name__"
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_COMPARISONS = {
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    ">=": operator.ge,
    "<=": operator.le,
}


@dataclass
class Scrapes:
    """What was scraped, by the second of the scrape."""

    by_time: dict[float, Vector] = field(default_factory=dict)

    def add(self, at_s: float, text: str) -> None:
        """Keep one exposition."""
        self.by_time[at_s] = {
            frozenset({(_NAME, sample.name), *sample.labels.items()}): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def between(self, start_s: float, end_s: float) -> list[tuple[float, Vector]]:
        """Return the scrapes after `start_s` and up to `end_s`."""
        return [(at, self.by_time[at]) for at in sorted(self.by_time) if start_s < at <= end_s]


def firing(rule: Mapping[str, Any], scrapes: Scrapes, at_s: float, step_s: float) -> bool:
    """Tell whether a rule fires at `at_s`, evaluated every `step_s` from 0 on."""
    wait_s, since = _seconds(rule.get("for", "0m")), None
    steps = int(at_s // step_s)
    for number in range(steps + 1):
        now = number * step_s
        active = bool(evaluate(rule["expr"], scrapes, now))
        since = (now if since is None else since) if active else None
    return since is not None and at_s - since >= wait_s


def evaluate(expression: str, scrapes: Scrapes, at_s: float) -> Value:
    """Return the value of an expression; raises ValueError for what isn't supported."""
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != re.sub(r"\s", "", expression):
        raise ValueError(f"not supported: {expression}")
    parser = _Parser(tokens, scrapes, at_s)
    value = parser.comparison()
    if parser.left:
        raise ValueError(f"not supported: {' '.join(parser.left)}")
    return value


def _seconds(text: str) -> float:
    return float(text.removesuffix("m")) * 60


class _Parser:
    def __init__(self, tokens: list[str], scrapes: Scrapes, at_s: float) -> None:
        self.left = tokens
        self._scrapes = scrapes
        self._at_s = at_s

    def _next(self, *wanted: str) -> str:
        found = self.left.pop(0)
        if wanted and found not in wanted:
            raise ValueError(f"{found} where {wanted} was expected")
        return found

    def _is_next(self, *wanted: str) -> bool:
        return bool(self.left) and self.left[0] in wanted

    def comparison(self) -> Value:
        value = self._sum_of_terms()
        if self._is_next(*_COMPARISONS):
            compare = _COMPARISONS[self._next()]
            limit = self._sum_of_terms()
            assert isinstance(value, dict)
            assert isinstance(limit, float)
            return {labels: found for labels, found in value.items() if compare(found, limit)}
        return value

    def _sum_of_terms(self) -> Value:
        value = self._term()
        while self._is_next("+", "-"):
            value = _combined(_ARITHMETIC[self._next()], value, self._term())
        return value

    def _term(self) -> Value:
        value = self._factor()
        while self._is_next("*", "/"):
            value = _combined(_ARITHMETIC[self._next()], value, self._factor())
        return value

    def _factor(self) -> Value:
        token = self._next()
        if token[0].isdigit():
            return float(token)
        if token == "sum":
            return self._aggregated()
        if token == "rate":
            self._next("(")
            rate = self._rate(self._next())
            self._next(")")
            return rate
        if token == "histogram_quantile":
            self._next("(")
            q = float(self._next())
            self._next(",")
            buckets = self._sum_of_terms()
            self._next(")")
            assert isinstance(buckets, dict)
            return _quantile(q, buckets)
        return self._selected(token)

    def _aggregated(self) -> Vector:
        kept: list[str] = []
        if self._is_next("by"):
            self._next("by")
            self._next("(")
            kept.append(self._next())
            self._next(")")
        self._next("(")
        value = self._sum_of_terms()
        self._next(")")
        assert isinstance(value, dict)
        sums: Vector = {}
        for labels, found in value.items():
            group = frozenset((name, text) for name, text in labels if name in kept)
            sums[group] = sums.get(group, 0.0) + found
        return sums

    def _matches(self, name: str) -> Callable[[Labels], bool]:
        wanted = {(_NAME, name)}
        if self._is_next("{"):
            self._next("{")
            label = self._next()
            self._next("=")
            wanted.add((label, self._next().strip('"')))
            self._next("}")
        return lambda labels: wanted <= labels

    def _selected(self, name: str) -> Vector:
        matches = self._matches(name)
        recent = self._scrapes.between(self._at_s - LOOKBACK_S, self._at_s)
        latest = recent[-1][1] if recent else {}
        return {_nameless(labels): found for labels, found in latest.items() if matches(labels)}

    def _rate(self, name: str) -> Vector:
        matches = self._matches(name)
        self._next("[")
        window_s = _seconds(self._next())
        self._next("]")
        rates: Vector = {}
        seen: dict[Labels, list[tuple[float, float]]] = {}
        for at, vector in self._scrapes.between(self._at_s - window_s, self._at_s):
            for labels, found in vector.items():
                if matches(labels):
                    seen.setdefault(labels, []).append((at, found))
        for labels, points in seen.items():
            if len(points) > 1:
                rates[_nameless(labels)] = _increase(points) / (points[-1][0] - points[0][0])
        return rates


def _nameless(labels: Labels) -> Labels:
    return frozenset(pair for pair in labels if pair[0] != _NAME)


def _increase(points: list[tuple[float, float]]) -> float:
    total = 0.0
    for (_, before), (_, after) in itertools.pairwise(points):
        total += after - before if after >= before else after  # a restart counts from 0 again
    return total


def _combined(combine: Callable[[float, float], float], left: Value, right: Value) -> Value:
    def safe(one: float, other: float) -> float:
        if combine is operator.truediv and other == 0:
            return float("nan") if one == 0 else float("inf") * one
        return combine(one, other)

    if isinstance(left, float) and isinstance(right, float):
        return safe(left, right)
    if isinstance(left, float):
        assert isinstance(right, dict)
        return {labels: safe(left, found) for labels, found in right.items()}
    if isinstance(right, float):
        return {labels: safe(found, right) for labels, found in left.items()}
    return {labels: safe(left[labels], right[labels]) for labels in left.keys() & right.keys()}


def _quantile(q: float, buckets: Vector) -> Vector:
    """Interpolate in the bucket that holds the quantile, as Prometheus does."""
    bounds = sorted((float(dict(labels)["le"]), count) for labels, count in buckets.items())
    if not bounds or bounds[-1][1] == 0:
        return {}
    rank, below, start = q * bounds[-1][1], 0.0, 0.0
    for bound, count in bounds:
        if count >= rank:
            if bound == float("inf"):
                return {frozenset(): start}
            return {frozenset(): start + (bound - start) * (rank - below) / (count - below)}
        below, start = count, bound
    raise AssertionError("the last bucket holds everything")
