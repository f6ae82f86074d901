"""One row's pending chain on top of what somebody else made of the row.

The chain is a run of updates (an insert that met a row perhaps first), then maybe a delete, maybe
an insert, and so on. Runs are merged by their net effect. Where a person must decide, the run is
merged all the same, because its ops replace whole columns and would undo what nobody disputes;
what is disputed keeps what its author wrote, and what follows the run stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from local_store.ops import Row, RowConflict
from syncer.core.asking import Answer, ask
from syncer.core.conflict_records import Part, joined
from syncer.core.json_merge import ABSENT, equal
from syncer.core.meeting import Meeting, NeedsPerson, PolicyFailed, RowPlan, Written
from syncer.core.net_effect import (
    AnyPolicy,
    Net,
    Sides,
    Step,
    decided,
    keys_of,
    net_effect,
    policy_of,
    setters,
    with_previous,
)


def merge_row(meeting: Meeting) -> RowPlan:
    """Merge one row's chain; pure but for the policy callables that it asks."""
    steps, manual = list(meeting.steps), None
    failed: dict[str, str] = {}
    while True:
        merging = _Merging(meeting, steps, failed)
        try:
            merging.run()
        except PolicyFailed as failure:
            failed = {**failed, **dict.fromkeys(failure.columns, failure.note)}
        except NeedsPerson as found:
            # What precedes must be judged without what now waits: a change that was taken back
            # later stands for as long as the taking back waits.
            manual = found.part if manual is None else joined(found.part, manual)
            steps = [step for step in steps if step.txn < found.part.txn]
        else:
            plan = merging.plan
            if manual is not None:
                plan.manual = manual if plan.manual is None else joined(plan.manual, manual)
            return plan


class _Merging:
    def __init__(self, meeting: Meeting, steps: Sequence[Step], failed: Mapping[str, str]) -> None:
        self._meeting, self._steps, self._failed = meeting, steps, failed
        self._spec = meeting.tables[meeting.table]
        unknown = meeting.theirs is ABSENT
        row = {} if unknown else meeting.theirs
        self.plan = RowPlan(None if row is None else dict(row))
        self._own = unknown  # what stands there is the author's own work
        self._met: Row = dict(row or {})  # as it stood before the chain
        self._first: Row = {}  # what the author knew of it, per column changed since
        self._returned = False  # a delete of the author's gave way to their change
        self._lost: list[Step] = []

    def run(self) -> None:
        at = 0
        while at < len(self._steps) and self.plan.manual is None:
            step, following = self._steps[at], at + 1
            if self.plan.row is None:
                self._without_row(step)
            elif self._own:
                self._on_own_row(step)
            elif step.kind == "delete":
                self._delete(step)
            else:
                while following < len(self._steps) and self._steps[following].kind == "update":
                    following += 1
                self._change(self._steps[at:following])
                self._ask_for_delete(self._steps[following:])
            at = following
        self._lose()

    # -- no row, or a row of the author's own --

    def _without_row(self, step: Step) -> None:
        if step.kind == "insert" and not self._meeting.orphan(step):
            self._lose()
            self.plan.row, self._own = dict(step.values), True
            return
        self.plan.written[step.txn, step.op] = None
        if step.kind == "delete":
            self._lost.clear()  # both sides deleted it: nobody misses what was changed before
        else:
            self._lost.append(step)

    def _lose(self) -> None:
        """Tell of changes to a row that isn't there any more."""
        if not self._lost:
            return
        columns: dict[str, Sides] = {}
        for step in self._lost:
            for column, value in step.values.items():
                base = step.before.get(column, ABSENT)
                columns[column] = Sides(columns.get(column, Sides(base, 0, 0)).base, value, ABSENT)
        part = Part("deleted", "remote_wins", columns, self._lost, gone=True)
        if self._spec.policy == "manual":
            raise NeedsPerson(replace(part, outcome="manual", policy="manual"))
        self._tell(part)
        self._lost = []

    def _on_own_row(self, step: Step) -> None:
        if step.kind == "delete":
            self.plan.row = None
        elif step.kind == "insert" and self._meeting.orphan(step):
            self.plan.row = None
            self._without_row(step)
        else:
            self._refuse_stray(step)
            self.plan.row = {**(self.plan.row or {}), **step.values}

    def _refuse_stray(self, step: Step) -> None:
        """A move under a parent that is gone: where else the row should go, nobody can tell."""
        if step.kind == "update" and self._spec.parent and self._meeting.orphan(step):
            column = self._spec.parent[0]
            sides = Sides(step.before.get(column, ABSENT), step.values[column], ABSENT)
            raise NeedsPerson(Part("manual", "merge", {column: sides}, [step], gone=True))

    # -- their row --

    @property
    def _standing(self) -> Row:
        assert self.plan.row is not None
        return self.plan.row

    def _policy(self, column: str) -> AnyPolicy:
        return "manual" if column in self._failed else policy_of(self._spec, column)

    def _change(self, run: Sequence[Step]) -> None:
        """Merge a run of updates; its first step may be an insert that met a row."""
        for step in run:
            self._refuse_stray(step)
        self._refuse_return(run[0])
        nets = net_effect(self._spec, run, self._standing)
        if self._spec.policy == "manual" and self._meeting.moved and run[0].kind == "update":
            # Left to a person as a whole: no column of a row that moved is merged.
            nets = {
                column: Net(column, net.sides, stands=True, overlaps={column: net.sides})
                for column, net in nets.items()
            }
        self.plan.manual = self._left_to_person(run, nets)
        answers: dict[int, list[Answer]] = {}
        for step, previous in with_previous(run, nets):
            self._write(step, previous, nets, answers)
        for net in nets.values():
            self._first.setdefault(net.column, net.sides.base)
            self._tell_overlaps(run, nets, net, answers)

    def _refuse_return(self, step: Step) -> None:
        """Inserted again after a delete that gave way: does the author still want it gone,
        replaced, or as they left it? Only a person can tell.
        """
        if step.kind != "insert" or not self._returned:
            return
        columns = {
            column: Sides(ABSENT, value, self._standing.get(column))
            for column, value in step.values.items()
            if not equal(self._spec, column, value, self._standing.get(column))
        }
        if columns:
            raise NeedsPerson(Part("manual", "manual", columns, [step]))

    def _left_to_person(self, run: Sequence[Step], nets: Mapping[str, Net]) -> Part | None:
        """Return what both sides changed and a person must decide."""
        names: dict[str, Sides] = {}
        policies: set[str] = set()
        notes = []
        for net in nets.values():
            policy = self._policy(net.column)
            if net.overlaps and policy in ("merge", "manual"):
                names.update(net.overlaps)
                notes += [self._failed[net.column]] if net.column in self._failed else []
                policies.add("callable" if net.column in self._failed else str(policy))
        if not names:
            return None
        label = min(policies, key=("callable", "manual", "merge").index)
        note = notes[0] if notes else None
        return Part("manual", label, names, setters(run, nets, names), note=note)

    def _write(
        self,
        step: Step,
        previous: Row,
        nets: Mapping[str, Net],
        answers: dict[int, list[Answer]],
    ) -> None:
        values: Row = {}
        derived: Row = {}
        asked: dict[int, tuple[Callable[..., Any], Row]] = {}
        for column, value in step.values.items():
            standing, policy = self._standing.get(column), self._policy(column)
            fate, made = decided(nets[column], policy, value, previous[column], standing)
            if fate == "ask" and callable(policy):
                asked.setdefault(id(policy), (policy, {}))[1][column] = made
            elif fate == "keep":
                values[column] = made
        for number, (policy, mine) in asked.items():
            answer = self._ask(step, policy, mine)
            answers.setdefault(number, []).append(answer)
            values |= answer.values
            for column, value in answer.own.items():
                values.pop(column, None)
                if not equal(self._spec, column, value, self._standing.get(column)):
                    values[column] = value
            derived |= answer.derived
            self.plan.edits.update({(step.txn, at): new for at, new in answer.edits.items()})
        self.plan.written[step.txn, step.op] = self._written(step, values, nets)
        self.plan.row = {**self._standing, **values, **derived}

    def _written(self, step: Step, values: Row, nets: Mapping[str, Net]) -> Written | None:
        manual = self.plan.manual
        disputed: set[str] = set()
        if manual is not None and step.txn == manual.txn:
            disputed = {name for name in values if nets[name].overlaps.keys() & manual.columns}
        if step.kind == "insert" and disputed:
            return Written("insert", values, None)  # as it was meant, for a person to see
        if step.kind == "insert":  # what the row has already came another way
            said = self._standing
            values = {c: v for c, v in values.items() if not equal(self._spec, c, v, said.get(c))}
        # What is disputed goes on saying what its author knew, or it would look agreed.
        before = {c: self._standing.get(c) for c in values if c not in disputed}
        before |= {c: step.before[c] for c in disputed if c in step.before}
        return Written("update", values, before) if values else None

    def _ask(self, step: Step, policy: Callable[..., Any], mine: Row) -> Answer:
        conflict = RowConflict(
            table=self._meeting.table,
            id=self._meeting.id,
            base={column: step.before[column] for column in step.values if column in step.before},
            mine={**step.values, **mine},
            theirs=self._standing,
            columns=frozenset(mine),
            siblings=self._meeting.siblings(step.txn),
        )
        try:
            return ask(self._meeting.tables, policy, conflict, step.op)
        except Exception as error:
            # A policy is the application's code: whatever it raises must not stop the delivery of
            # everybody's work. The type only, because a message may quote what users wrote.
            raise PolicyFailed(mine.keys(), type(error).__name__) from error

    def _tell_overlaps(
        self,
        run: Sequence[Step],
        nets: Mapping[str, Net],
        net: Net,
        answers: Mapping[int, Sequence[Answer]],
    ) -> None:
        policy = self._policy(net.column)
        if not net.overlaps or policy in ("merge", "manual"):
            return
        outcome, label = ("local" if policy == "local_wins" else "remote"), str(policy)
        if callable(policy):
            given = answers.get(id(policy), ())
            if not any(answer.surfaced for answer in given):
                return
            # Nothing of mine written: what stands is theirs, whoever decided it.
            outcome = "merged" if any(answer.values for answer in given) else "remote"
            label = "callable"
        self._tell(Part(outcome, label, net.overlaps, setters(run, nets, net.overlaps)))

    def _delete(self, step: Step) -> None:
        """Delete their row unless they changed it: the delete was meant for what its author saw."""
        changed = self._changed_for(step)
        part = Part("deleted", "local_wins", changed, [step])
        if changed and self._spec.on_delete == "manual":
            raise NeedsPerson(replace(part, outcome="manual", policy="manual"))
        if changed and self._spec.on_delete == "keep_remote":
            self.plan.written[step.txn, step.op] = None
            self._tell(replace(part, outcome="remote", policy="remote_wins"))
            self._met, self._first, self._returned = dict(self._standing), {}, True
            return
        if changed:
            self._tell(part)
        unsaid = (self._spec.key, self._spec.owner, self._spec.version)
        body = {name: value for name, value in self._standing.items() if name not in unsaid}
        self.plan.written[step.txn, step.op] = Written("delete", {}, body)
        self.plan.row, self._own = None, True

    def _ask_for_delete(self, following: Sequence[Step]) -> None:
        """Let the record of a run that waits for a person tell what a delete behind it would take.

        The delete follows its run without meeting the row again, so nothing else would tell.
        """
        if self.plan.manual is None or not following or following[0].kind != "delete":
            return
        part, taken = self.plan.manual, self._changed_for(following[0])
        columns = dict(part.columns)
        for name, sides in taken.items():
            by_key = any(known.startswith(f"{name}.") for known in part.columns)
            for known, found in keys_of(name, sides).items() if by_key else [(name, sides)]:
                columns.setdefault(known, found)
        if taken:
            self.plan.manual = replace(part, columns=columns, steps=[*part.steps, following[0]])

    def _changed_for(self, step: Step) -> dict[str, Sides]:
        """Return the user columns that somebody else changed since the author knew the row."""
        found = {}
        for column in filter(self._spec.writable, self._spec.columns):
            was = self._first.get(column, ABSENT)
            if was is ABSENT:
                was = step.before.get(column, ABSENT)
            if was is ABSENT:
                continue  # left to the server's default, which isn't known here
            there, last = self._met.get(column), step.before.get(column, ABSENT)
            if not any(equal(self._spec, column, known, there) for known in (was, last)):
                found[column] = Sides(was, ABSENT, there)
        return found

    def _tell(self, part: Part) -> None:
        known = self.plan.parts.get(part.outcome)
        self.plan.parts[part.outcome] = part if known is None else joined(known, part)
