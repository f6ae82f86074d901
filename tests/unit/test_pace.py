"""The pace of batches: ramp-up, back-off, and finding the one that spoils a call."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from syncer.core.pace import PROBE, Pace


def deliver(count: int, poison: set[int], pace: Pace) -> tuple[list[int], list[int], int]:
    """Deliver `count` items, where a call with a poisonous one fails as a whole.

    Returns what was delivered, what was set aside, and how many calls that took.
    """
    queue, delivered, aside, calls = list(range(count)), [], [], 0
    while queue:
        batch, calls = queue[: pace.limit], calls + 1
        assert calls < 100_000, "it never ends"
        if not poison & set(batch):
            delivered += batch
            queue = queue[len(batch) :]
            pace = pace.after_success(len(batch))
        elif len(batch) == 1:
            aside += batch
            queue = queue[1:]
            pace = pace.after_culprit()
        else:
            pace = pace.after_split(len(batch))
    return delivered, aside, calls


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 499))
def test_one_poison_in_500_is_found_in_about_twice_the_bisection(position: int):
    delivered, aside, calls = deliver(500, {position}, Pace())
    assert (aside, len(delivered)) == ([position], 499)
    assert calls <= 2 * 9 + 6


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 199), max_size=6))
def test_every_other_item_is_delivered_once_and_in_order(poison: set[int]):
    delivered, aside, _ = deliver(200, poison, Pace(limit_max=100))
    assert aside == sorted(poison)
    assert delivered == [number for number in range(200) if number not in poison]


def test_a_server_that_comes_back_is_met_with_a_probe_and_then_ever_more():
    pace, limits = Pace().after_outage(), []
    for _ in range(12):
        limits.append(pace.limit)
        pace = pace.after_success(pace.limit)
    assert limits[0] == PROBE
    assert limits == sorted(limits)
    assert limits[-1] == 500


def test_a_throttled_pace_halves_and_never_ends():
    pace = Pace()
    for expected in (250, 125, 62):
        pace = pace.after_throttle(pace.limit)
        assert pace.limit == expected
    for _ in range(20):
        pace = pace.after_throttle(pace.limit)
    assert pace.limit == 1


def test_while_a_culprit_is_looked_for_the_batches_do_not_grow():
    pace = Pace(limit_max=100).after_split(100)
    assert pace.after_success(20).limit == 50
    assert pace.after_success(20).after_success(80).limit == 100
