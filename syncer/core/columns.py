"""The columns of one row: which of them conflict, and what their policies make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from local_store.ops import Resolution, Row, RowConflict, TableSpec, WireOp
from syncer.core.values import ABSENT, clashing_keys, same, with_my_keys

Policy = str | Callable[..., Any]
OUTCOMES = {"merge": "manual", "manual": "manual", "remote_wins": "remote", "local_wins": "local"}


@dataclass(frozen=True, slots=True)
class Link:
    """One op of a chain, in its slot."""

    txn_id: str
    index: int
    op: WireOp
    before: Row | None


class Slots(Protocol):
    """Where the rewritten ops and their records go."""

    slots: dict[str, list[Link | None]]

    def put(self, link: Link, op: WireOp | None, before: Row | None = None) -> None:
        """Write an op back."""
        ...

    def record(self, link: Link, record: Row) -> None:
        """Attach a record."""
        ...


@dataclass(slots=True)
class Column:
    """What became of one column over the chain: its three values, and the parts that conflict.

    `keys` are None for a column that is taken as a whole, else the keys that both sides changed.
    """

    name: str
    first: Any
    final: Any
    theirs: Any
    policy: Policy
    conflicts: bool = False
    keys: list[str] | None = None
    drop: bool = False

    @property
    def parts(self) -> list[str]:
        """The names under which a record lists what conflicts."""
        return [self.name] if self.keys is None else [f"{self.name}.{key}" for key in self.keys]

    def part(self, side: str) -> Row:
        """Return one side's values of what conflicts."""
        value = getattr(self, side)
        if self.keys is None:
            return {self.name: None if value is ABSENT else value}
        return {f"{self.name}.{key}": value.get(key) for key in self.keys}


@dataclass(slots=True)
class Answers:
    """What callables answered, and how it ended."""

    surfaced: set[str] = field(default_factory=set)
    failure: str | None = None


def merge_columns(work: Slots, spec: TableSpec, chain: Sequence[Link], theirs: Row) -> None:
    """Rewrite a chain of updates (or an insert that met a row, and updates of it) on their row."""
    columns = {name: _column(spec, name, chain, theirs) for name in _names(chain)}
    if spec.policy == "manual":
        columns = {name: _taken_whole(spec, column) for name, column in columns.items()}
    answers = _rewrite(work, spec, chain, columns, theirs)
    if answers.failure is not None:
        _leave_to_person(work, spec, chain, columns, answers.failure)
        return
    for policy, group in _groups(columns).items():
        outcome = OUTCOMES.get(policy, "merged")
        if outcome == "merged":
            group = [column for column in group if column.name in answers.surfaced]
        if group:
            _record(work, spec, chain, group, outcome, policy)


def _names(chain: Sequence[Link]) -> list[str]:
    return list(dict.fromkeys(name for link in chain for name in link.op.values))


def _column(spec: TableSpec, name: str, chain: Sequence[Link], theirs: Row) -> Column:
    setting = [link for link in chain if name in link.op.values]
    before, final = setting[0].before, setting[-1].op.values[name]
    first = ABSENT if before is None else before.get(name, ABSENT)
    chosen = spec.policy.get(name, "merge") if isinstance(spec.policy, Mapping) else spec.policy
    column = Column(name, first, final, theirs.get(name), chosen)
    by_key = name in spec.json_merge and chosen != "manual"
    if by_key and all(isinstance(side, dict) for side in (first, final, column.theirs)):
        column.keys = clashing_keys(first, final, column.theirs)
        column.conflicts = bool(column.keys)
        return column
    if first is not ABSENT and same(spec, name, column.theirs, first):
        return column
    column.drop = same(spec, name, final, first) or same(spec, name, final, column.theirs)
    column.conflicts = not column.drop
    return column


def _taken_whole(spec: TableSpec, column: Column) -> Column:
    """A table that is left to a person: any change of a row that moved is."""
    agreed = same(spec, column.name, column.final, column.theirs)
    return replace(column, keys=None, conflicts=not agreed, drop=agreed)


def _groups(columns: Mapping[str, Column]) -> dict[str, list[Column]]:
    groups: dict[str, list[Column]] = {}
    for column in columns.values():
        if column.conflicts:
            label = column.policy if isinstance(column.policy, str) else "callable"
            groups.setdefault("merge" if label == "manual" else label, []).append(column)
    return groups


def _rewrite(
    work: Slots,
    spec: TableSpec,
    chain: Sequence[Link],
    columns: Mapping[str, Column],
    theirs: Row,
) -> Answers:
    """Put every op of the chain on top of their row and of the ops before it."""
    working, answers, told = dict(theirs), Answers(), set[str]()
    for link in chain:
        values: Row = {}
        for name, value in link.op.values.items():
            kept = _kept(columns[name], value)
            if kept is not ABSENT:
                values[name] = kept
        values |= _asked(work, spec, link, columns, working, answers)
        before = {name: working.get(name) for name in values}
        for name in values.keys() - told:
            # What a person must decide keeps saying what its author knew.
            if columns[name].conflicts and columns[name].policy in ("merge", "manual"):
                before[name] = None if columns[name].first is ABSENT else columns[name].first
        told |= values.keys()
        working |= values
        op = _op(link, values, columns)
        insert = op is not None and op.kind == "insert"
        work.put(_current(work, link), op, None if insert else before)
    return answers


def _current(work: Slots, link: Link) -> Link:
    return work.slots[link.txn_id][link.index] or link


def _kept(column: Column, value: Any) -> Any:
    """Return what an op still sets in a column, ABSENT for nothing."""
    if column.drop or (column.conflicts and callable(column.policy)):
        return ABSENT
    if column.keys is not None:
        dropped = set(column.keys) if column.policy == "remote_wins" else set[str]()
        return with_my_keys(column.first, value, column.theirs, dropped)
    return ABSENT if column.conflicts and column.policy == "remote_wins" else value


def _op(link: Link, values: Row, columns: Mapping[str, Column]) -> WireOp | None:
    if link.op.kind == "insert":
        undecided = [c for c in columns.values() if c.conflicts and c.policy in ("merge", "manual")]
        if undecided:
            return link.op  # the author's own insert: a person sees it as it was meant
        values = {name: value for name, value in values.items() if name in columns}
    return replace(link.op, kind="update", values=values) if values else None


def _asked(
    work: Slots,
    spec: TableSpec,
    link: Link,
    columns: Mapping[str, Column],
    working: Row,
    answers: Answers,
) -> Row:
    """Ask the callables about the columns in conflict that an op sets; returns what to write."""
    asked: dict[Callable[..., Any], set[str]] = {}
    for name in link.op.values:
        column = columns[name]
        if column.conflicts and callable(column.policy):
            asked.setdefault(column.policy, set()).add(name)
    written: Row = {}
    for policy, names in asked.items():
        slots = work.slots[link.txn_id]
        conflict = RowConflict(
            spec.name,
            link.op.id,
            dict(link.before or {}),
            dict(link.op.values),
            dict(working),
            frozenset(names),
            tuple(slot.op if slot is not None else link.op for slot in slots),
        )
        try:
            resolution = _resolution(spec, policy(conflict), names)
        except Exception as error:
            # A policy is the application's code: whatever it raises must not stop the delivery.
            answers.failure = answers.failure or type(error).__name__
            continue
        if resolution.surfaced:
            answers.surfaced |= names
        written |= {name: value for name, value in resolution.values.items() if name in names}
        for index, values in resolution.siblings.items():
            sibling = slots[index]
            if sibling is not None and index != link.index:
                op = replace(sibling.op, values={**sibling.op.values, **values})
                work.put(sibling, op, sibling.before)
        working |= resolution.derived
    return written


def _resolution(spec: TableSpec, answer: object, names: set[str]) -> Resolution:
    if isinstance(answer, Mapping):
        answer = Resolution(dict(answer))
    if not isinstance(answer, Resolution):
        raise TypeError("a policy returns a dict or a Resolution")
    unknown = [name for name in answer.values if not spec.writable(name)]
    if unknown:
        raise ValueError(f"{unknown[0]} can't be written")
    return answer


def _record(
    work: Slots,
    spec: TableSpec,
    chain: Sequence[Link],
    group: Sequence[Column],
    outcome: str,
    policy: str,
    note: str | None = None,
) -> None:
    names = {column.name for column in group}
    setting = [link for link in chain if names & link.op.values.keys()]
    sides: dict[str, Row] = {"base": {}, "mine": {}, "theirs": {}}
    for column in group:
        for side, attribute in (("base", "first"), ("mine", "final"), ("theirs", "theirs")):
            sides[side] |= column.part(attribute)
    record: Row = {
        "table": spec.name,
        "id": chain[0].op.id,
        "columns": sorted(part for column in group for part in column.parts),
        **sides,
        "policy": policy,
        "outcome": outcome,
        "through": setting[-1].txn_id,
    }
    work.record(setting[0], record if note is None else {**record, "note": note})


def _leave_to_person(
    work: Slots,
    spec: TableSpec,
    chain: Sequence[Link],
    columns: Mapping[str, Column],
    failure: str,
) -> None:
    """A policy failed: the chain stays as its author wrote it, and a person decides."""
    for link in chain:
        work.put(_current(work, link), link.op, link.before)
    group = [column for column in columns.values() if column.conflicts]
    _record(work, spec, chain, group, "manual", "callable", note=failure)
