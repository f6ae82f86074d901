"""The three-way merge of pending chains with the rows that somebody else changed meanwhile.

Per row, over all that is pending on it: what only one side changed is taken from that side without
a word. What both changed to different values goes to its policy, and a record keeps both sides.
`net_effect` compares, `row_merge` goes along one row's chain, `conflict_records` keeps the records
few; here the rows' results are put together per transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from local_store.ops import Rewritten, Row, StoredTransaction, TableSpec, WireOp
from syncer.core.conflict_records import Part, record_of, take_over
from syncer.core.json_merge import ABSENT, same
from syncer.core.meeting import Meeting
from syncer.core.net_effect import Step
from syncer.core.row_merge import merge_row

Place = tuple[int, int]
"""Where an op stands: its transaction, and its index there."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge asks for.

    `rewritten` are the transactions that changed. `manual` maps the txn_id of those that a person
    must decide to their records; the caller parks them. One may be in both: its columns in conflict
    are as its author wrote them, and what nobody disputes is merged.
    """

    rewritten: tuple[Rewritten, ...] = ()
    manual: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)


def merge(
    tables: Mapping[str, TableSpec],
    transactions: Sequence[StoredTransaction],
    theirs: Mapping[str, Row | None],
    *,
    moved: Collection[str] | None = None,
) -> Merged:
    """Merge the pending chains of some rows with `theirs`: "table/id" to row, None: deleted there.

    `transactions` are in order and complete for these rows. Parked ones, and those whose records
    leave a row to a person, stay untouched there, and so does what follows them on that row.
    `moved` are the rows that somebody else changed for certain (default: all of `theirs`); it
    matters only to tables whose policy is "manual" as a whole. Policies that are callables are
    asked; the rest is a function of the arguments, and merging its result with the same `theirs`
    changes nothing.
    """
    merging = _Merging(tables, transactions, theirs)
    for key in merging.met():
        merging.settle(key, moved is None or key in moved)
    return merging.merged()


class _Merging:
    """The transactions while they are rewritten: each op in its slot, None once it vanished."""

    def __init__(
        self,
        tables: Mapping[str, TableSpec],
        transactions: Sequence[StoredTransaction],
        theirs: Mapping[str, Row | None],
    ) -> None:
        self._tables, self._all, self._theirs = tables, transactions, theirs
        self._txn_ids = [item.txn_id for item in transactions]
        self._ops: list[list[WireOp | None]] = [list(item.ops) for item in transactions]
        self._before = [list(item.before) for item in transactions]
        self._records = [list(item.records) for item in transactions]
        self._manual: dict[str, tuple[Row, ...]] = {}
        self._waits = [item.parked or _left_to_person(item) for item in transactions]
        self._chains: dict[str, list[Place]] = {}
        for txn, item in enumerate(transactions):
            for index, op in enumerate(item.ops):
                self._chains.setdefault(f"{op.table}/{op.id}", []).append((txn, index))

    def met(self) -> list[str]:
        """Return the rows to merge: those given, and children whose parent is gone."""
        return [
            key
            for key, places in self._chains.items()
            if self._all[places[0][0]].ops[places[0][1]].table in self._tables
            and (key in self._theirs or any(self._is_orphan(place) for place in places))
        ]

    def settle(self, key: str, moved: bool) -> None:
        """Merge one row and write the result into the slots."""
        table, _, row_id = key.partition("/")
        meeting = Meeting(
            tables=self._tables,
            table=table,
            id=row_id,
            steps=self._steps(key),
            theirs=self._theirs.get(key, ABSENT),
            moved=moved,
            orphan=lambda step: self._is_orphan((step.txn, step.op)),
            siblings=self._siblings,
        )
        plan = merge_row(meeting)
        for (txn, index), written in plan.written.items():
            op = self._ops[txn][index]
            if written is None or op is None:
                self._ops[txn][index] = None
                continue
            self._ops[txn][index] = op._replace(kind=written.kind, values=written.values)
            self._before[txn][index] = written.before
        for place, values in plan.edits.items():
            self._edit(place, values)
        for part in plan.parts.values():
            self._keep_record(table, row_id, part)
        if plan.manual is not None:
            self._leave_to_person(table, row_id, plan.manual)

    def merged(self) -> Merged:
        """Return what changed."""
        rewritten = []
        for txn, item in enumerate(self._all):
            kept = [
                (op, before)
                for op, before in zip(self._ops[txn], self._before[txn], strict=True)
                if op is not None
            ]
            new = Rewritten(
                item.txn_id,
                tuple(op for op, _ in kept),
                tuple(before for _, before in kept),
                tuple(self._records[txn]),
            )
            if not _is_unchanged(item, new):
                rewritten.append(new)
        return Merged(tuple(rewritten), self._manual)

    def _steps(self, key: str) -> list[Step]:
        """Return a row's chain up to what is left alone."""
        steps = []
        for txn, index in self._chains[key]:
            if self._is_left_alone(txn, key):
                break
            op = self._ops[txn][index]
            if op is not None:
                before = self._before[txn][index] or {}
                steps.append(Step(txn, index, op.kind, op.values, before))
        return steps

    def _is_left_alone(self, txn: int, key: str) -> bool:
        """Tell whether a transaction stays as it is on a row.

        One that is left to a person for another row only meets this one yet: parked as it is, it
        would go over what somebody else changed here, once that person has decided the other.
        """
        item = self._all[txn]
        return item.parked or any(
            record["outcome"] == "manual" and f"{record['table']}/{record['id']}" == key
            for record in item.records
        )

    def _siblings(self, txn: int) -> tuple[WireOp, ...]:
        """Return a transaction's ops as they are; one that vanished as it was: it still tells."""
        return tuple(
            now or was for now, was in zip(self._ops[txn], self._all[txn].ops, strict=True)
        )

    def _edit(self, place: Place, values: Row) -> None:
        """Give an op other values, and let what follows on its row know what it replaces."""
        txn, index = place
        op = self._ops[txn][index]
        if op is None:
            return
        news = {name: new for name, new in values.items() if not same(op.values.get(name), new)}
        self._ops[txn][index] = op._replace(values=values)
        chain = self._chains[f"{op.table}/{op.id}"]
        for at, slot in chain[chain.index(place) + 1 :]:
            later, before = self._ops[at][slot], self._before[at][slot]
            if later is None:
                continue
            if before is None or self._waits[at]:
                return
            told = news if later.kind == "delete" else {n: news[n] for n in news if n in before}
            self._before[at][slot] = {**before, **told}
            news = {name: new for name, new in news.items() if name not in told}

    def _keep_record(self, table: str, row_id: str, part: Part) -> None:
        record = record_of(table, row_id, part, self._txn_ids)
        at = take_over(self._held(f"{table}/{row_id}"), record, part.txn, self._txn_ids)
        self._records[at].append(record)

    def _held(self, key: str) -> list[list[Row] | None]:
        return [
            None if self._is_left_alone(txn, key) else records
            for txn, records in enumerate(self._records)
        ]

    def _leave_to_person(self, table: str, row_id: str, part: Part) -> None:
        record = record_of(table, row_id, part, self._txn_ids)
        # What precedes is sent as it was merged, so its records stay.
        held = [None] * part.txn + self._held(f"{table}/{row_id}")[part.txn :]
        take_over(held, record, part.txn, self._txn_ids)
        txn_id = self._txn_ids[part.txn]
        self._manual[txn_id] = (*self._manual.get(txn_id, ()), record)

    def _is_orphan(self, place: Place) -> bool:
        """Tell whether an op puts its row under a parent that is gone."""
        op = self._all[place[0]].ops[place[1]]
        spec = self._tables.get(op.table)
        if spec is None or spec.parent is None or op.values.get(spec.parent[0]) is None:
            return False
        return self._is_gone(f"{spec.parent[1]}/{op.values[spec.parent[0]]}", place)

    def _is_gone(self, key: str, place: Place) -> bool:
        """Tell whether a row isn't there when an op's turn comes: deleted, or never made."""
        made = [
            at
            for at in self._chains.get(key, ())
            if at < place and self._all[at[0]].ops[at[1]].kind == "insert"
        ]
        if made:
            return self._is_orphan(made[-1])
        return key in self._theirs and self._theirs[key] is None


def _left_to_person(transaction: StoredTransaction) -> bool:
    return any(record["outcome"] == "manual" for record in transaction.records)


def _is_unchanged(old: StoredTransaction, new: Rewritten) -> bool:
    """Compare exactly: 1 and 1.0, or 1 and true, are different on their way to the server."""
    were = [[op.to_json() for op in old.ops], list(old.before), list(old.records)]
    are = [[op.to_json() for op in new.ops], list(new.before), list(new.records)]
    return same(were, are, exact=True)
