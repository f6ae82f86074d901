"""What a row's merge is given and what it comes to: values only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from local_store.ops import Kind, Row, TableSpec, WireOp
from syncer.core.conflict_records import Part
from syncer.core.net_effect import Step


@dataclass(frozen=True, slots=True)
class Meeting:
    """A row that is met: its chain, and what stands there.

    `theirs` is None when the row was deleted there, ABSENT when nothing is known about it. `moved`:
    somebody else changed it for certain. `orphan` tells whether a step puts the row under a parent
    that is gone; `siblings` returns the ops of a transaction.
    """

    tables: Mapping[str, TableSpec]
    table: str
    id: str
    steps: Sequence[Step]
    theirs: Any
    moved: bool
    orphan: Callable[[Step], bool]
    siblings: Callable[[int], tuple[WireOp, ...]]


@dataclass(frozen=True, slots=True)
class Written:
    """What an op became."""

    kind: Kind
    values: Row
    before: Row | None


@dataclass(slots=True)
class RowPlan:
    """What becomes of the chain, by (transaction, op): None vanishes, what isn't named stays.

    `row` is what stands there while it is worked out. `manual` is what is left to a person;
    `edits` are new values of ops on other rows.
    """

    row: Row | None
    written: dict[tuple[int, int], Written | None] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    edits: dict[tuple[int, int], Row] = field(default_factory=dict)
    manual: Part | None = None


class NeedsPerson(Exception):
    """Ends the merge of a row at a transaction that a person must decide."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.policy)
        self.part = part


class PolicyFailed(Exception):
    """A callable raised, or its answer was of no use; `note` names the exception's type."""

    def __init__(self, columns: Collection[str], note: str) -> None:
        super().__init__(note)
        self.columns, self.note = columns, note
