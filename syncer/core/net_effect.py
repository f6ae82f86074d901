"""What a run of my updates comes to on one row, per column, and where it meets somebody else's.

Five offline edits of a title are one change to whoever looks from outside: the value before the
first, the value after the last, and theirs are compared. Change and change back is no change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from local_store.ops import Kind, Policy, Row, TableSpec
from syncer.core.json_merge import ABSENT, changed_keys, equal, same, with_changes

AnyPolicy = Policy | Callable[..., Any]


class Sides(NamedTuple):
    """The three values of a column or of a key in it; each may be ABSENT."""

    base: Any
    mine: Any
    theirs: Any


@dataclass(frozen=True, slots=True)
class Step:
    """One op of the chain on the row; `txn` and `op` say where it stands."""

    txn: int
    op: int
    kind: Kind
    values: Row
    before: Row


@dataclass(frozen=True, slots=True)
class Net:
    """What the run does to one column.

    `overlaps` names what both sides changed to different values: the column, or keys in it.
    `stands`: mine is kept where nothing overlaps. With `keys` the column is merged by key, and only
    these keys, the overlapping ones among them, may be taken from mine.
    """

    column: str
    sides: Sides
    stands: bool
    overlaps: Mapping[str, Sides] = field(default_factory=dict)
    keys: frozenset[str] | None = None

    def name(self, key: str) -> str:
        """Return what a record calls a key of this column."""
        return f"{self.column}.{key}"

    def allowed(self, policy: AnyPolicy) -> frozenset[str]:
        """Return the keys that are taken from mine, once `policy` decided the overlapping ones."""
        keys = self.keys or frozenset()
        if policy != "remote_wins":
            return keys
        return frozenset(key for key in keys if self.name(key) not in self.overlaps)


def policy_of(spec: TableSpec, column: str) -> AnyPolicy:
    """Return what decides when both sides changed `column`."""
    if isinstance(spec.policy, Mapping):
        return spec.policy.get(column, "merge")
    return spec.policy


def by_key(spec: TableSpec, column: str, *values: Any) -> bool:
    """Tell whether these values of `column` are merged key by key."""
    return (
        column in spec.json_merge
        and policy_of(spec, column) != "manual"
        and all(isinstance(value, dict) for value in values)
    )


def net_effect(spec: TableSpec, steps: Sequence[Step], theirs: Row) -> dict[str, Net]:
    """Compare a run of updates, an insert that met a row perhaps first, with their row.

    What an insert sets as it stands there is known; for what it sets otherwise there is no base,
    nor for what an earlier insert left to the server's default.
    """
    first: dict[str, Any] = {}
    values: dict[str, list[Any]] = {}
    for step in steps:
        for column, value in step.values.items():
            if column not in values:
                was = step.before.get(column, ABSENT)
                if step.kind == "insert" and equal(spec, column, value, theirs.get(column)):
                    was = value
                first[column] = was
            values.setdefault(column, []).append(value)
    return {
        column: _net(spec, column, first[column], made, theirs.get(column))
        for column, made in values.items()
    }


def _net(spec: TableSpec, column: str, first: Any, made: Sequence[Any], theirs: Any) -> Net:
    sides = Sides(first, made[-1], theirs)
    if equal(spec, column, first, theirs) or not spec.writable(column):
        return Net(column, sides, stands=True)
    if equal(spec, column, made[-1], first) or equal(spec, column, made[-1], theirs):
        return Net(column, sides, stands=False)
    if not by_key(spec, column, first, theirs, *made):
        return Net(column, sides, stands=False, overlaps={column: sides})
    taken: set[str] = set()
    overlaps: dict[str, Sides] = {}
    for key in changed_keys(first, made[-1]):
        was, mine, there = (value.get(key, ABSENT) for value in (first, made[-1], theirs))
        if same(mine, there):
            continue
        taken.add(key)
        if not same(was, there):
            overlaps[f"{column}.{key}"] = Sides(was, mine, there)
    return Net(column, sides, stands=True, overlaps=overlaps, keys=frozenset(taken))


def keys_of(column: str, sides: Sides) -> dict[str, Sides]:
    """Return what they changed in a column that is merged by key, by the names of its keys."""
    return {
        f"{column}.{key}": Sides(sides.base.get(key, ABSENT), ABSENT, sides.theirs.get(key, ABSENT))
        for key in changed_keys(sides.base, sides.theirs)
    }


def setters(steps: Sequence[Step], nets: Mapping[str, Net], names: Mapping[str, Any]) -> list[Step]:
    """Return the steps that set one of the overlapping columns or keys in `names`."""
    found = []
    for step, previous in with_previous(steps, nets):
        for column, value in step.values.items():
            net, was = nets[column], previous[column]
            if net.keys is None:
                touched = {column}
            else:
                touched = {net.name(key) for key in changed_keys(was, value)}
            if touched & names.keys():
                found.append(step)
                break
    return found


def with_previous(
    steps: Sequence[Step], nets: Mapping[str, Net]
) -> list[tuple[Step, dict[str, Any]]]:
    """Return each step with what the author's columns held before it."""
    held = {column: net.sides.base for column, net in nets.items()}
    found = []
    for step in steps:
        found.append((step, dict(held)))
        held.update(step.values)
    return found


Fate = Literal["keep", "drop", "ask"]


def decided(
    net: Net, policy: AnyPolicy, value: Any, previous: Any, standing: Any
) -> tuple[Fate, Any]:
    """Say what becomes of a column in one op: its value on top of the `standing` one, or nothing.

    `ask`: a callable decides, and the value is what mine comes to. What a person must decide is
    kept: nobody sends it before that.
    """
    fate: Fate = "ask" if net.overlaps and callable(policy) else "keep"
    if net.keys is not None:
        if not isinstance(standing, dict):  # a callable made it something else
            return fate, value
        merged = with_changes(standing, previous, value, net.allowed(policy))
        # A disputed key stays where its author set it first, also to what stands there now: the
        # record goes with that op.
        silent = not net.overlaps or policy == "remote_wins"
        return ("drop", None) if silent and same(merged, standing, exact=True) else (fate, merged)
    if net.stands or (net.overlaps and policy != "remote_wins"):
        return fate, value
    return "drop", None
