"""What a history is likely to bring: its length, its accidents, and a taste for some actions.

Each seed has tastes of its own: a history that does much of a few things comes further in each than
one that does a little of everything (swarm testing, Groce et al., ISSTA 2012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.machine import Network
    from tests.simulation.model_people import OperatedModel

LENGTHS = (6, 8, 8, 10, 10, 12, 12, 24)  # actions; each is some 10 steps, and the end 100 more
LONG = 68  # actions; some faults need so many, and take six times as long to look for
CLASHES = 1  # actions at which two containers change one value
CRASHES = 2  # actions at which a process is told to end soon; the others end between two actions
TASTES = (0.0, 0.5, 1.0, 2.0, 4.0)  # times the usual
NEEDED = ("insert", "update", "flush")  # without these nothing happens at all
POWER_EVERY = 6  # histories have disks that can lose power: every third of those with a Volume
VOLUME_EVERY = 4  # histories have a Volume: a pass of its worker costs as much as 20 other steps

BY_USERS = {
    "insert": 7,
    "update": 14,
    "both": 5,
    "child": 6,
    "delete": 2,
    "poison": 3,
    "orphan": 1,
    "expect": 3,
    "look": 8,
    "refresh": 6,
    "flush": 16,
    "late": 6,
    "wait": 10,
    "outage": 4,
    "edit": 5,
    "strike": 1,
    "restart": 1,
}
BY_PEOPLE = {"discard": 5, "retry": 9, "cure": 2, "amend": 10, "decide": 16}
ON_A_VOLUME = {"ship": 6, "background": 2, "work": 3, "lose": 3}


@dataclass(frozen=True)
class Plan:
    """The numbers of a history's actions, and what is likely or certain at each."""

    seed: int
    actions: Sequence[int]
    clashes: frozenset[int]
    crashes: frozenset[int]
    likely: Mapping[str, float]


def plan_of(seed: int, length: int | None = None) -> Plan:
    """Return the plan that belongs to a seed, and to a number of actions if one is asked for."""
    dice = Random(f"the tastes of {seed}")
    actions = range(dice.choice(LENGTHS if length is None else (length,)))
    usual = BY_USERS | BY_PEOPLE | (ON_A_VOLUME if seed % VOLUME_EVERY == 0 else {})
    likely = {name: weight * dice.choice(TASTES) for name, weight in usual.items()}
    likely |= {name: likely[name] or usual[name] / 2 for name in NEEDED}
    clashes = frozenset(dice.sample(actions[1:-2], CLASHES))
    return Plan(seed, actions, clashes, frozenset(dice.sample(actions[3:], CRASHES)), likely)


def possible(
    likely: Mapping[str, float], server: OperatedModel, network: Network
) -> dict[str, float]:
    """Return the actions that have something to act on."""
    idle = set() if network.late else {"late"}
    if not server.rows:
        idle |= {"edit", "strike"}
    parked = {entry.state for entry in server.parked.values()}
    if server.poison is None or not parked:
        idle.add("cure")
    if not parked & {"dead", "held"}:
        idle |= {"discard", "amend"}
    if not parked & {"dead", "held", "conflict"}:
        idle |= {"retry", "decide"}
    return {name: weight for name, weight in likely.items() if name not in idle}
