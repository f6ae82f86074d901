"""The three-way merge of a row's pending chain with the row that somebody else made of it.

Per column three values count: what stood there before the chain, what the chain makes of it in the
end, and theirs. What only one side changed is taken from that side, without a word. What both
changed to different values is a conflict: its policy decides, and a record keeps both sides.

All pending changes of the row are judged together, by their net effect: five edits of a field are
one change, a change taken back is none. The rewritten transactions keep their order and ids; the
first of them is then based on their row, the later ones on their predecessors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from local_store.ops import Rewritten, Row, StoredTransaction, TableSpec, WireOp
from syncer.core.columns import Link, merge_columns
from syncer.core.values import same

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge asks for: transactions to rewrite, and those a person must decide.

    `manual` maps txn_id to the records of what a person must decide; such a transaction may be in
    `rewritten` too, its columns in conflict still as its author wrote them.
    """

    rewritten: tuple[Rewritten, ...] = ()
    manual: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)


def merge(
    tables: Mapping[str, TableSpec],
    transactions: Sequence[StoredTransaction],
    theirs: Mapping[str, Row | None],
) -> Merged:
    """Merge all that is pending on some rows with what stands there (None: deleted there).

    Transactions that are parked, or already wait for a person, are left alone.
    """
    work = Work(tables, transactions)
    for name, row in theirs.items():
        table, _, row_id = name.partition("/")
        if table in tables:
            _merge_row(work, (table, row_id), row)
            if row is None:
                _lose_children(work, (table, row_id))
    return work.merged()


def waits_for_person(transaction: StoredTransaction) -> bool:
    """Tell whether an earlier merge left this transaction to a person."""
    return any(record["outcome"] == "manual" for record in transaction.records)


class Work:
    """The transactions while they are rewritten: each op in its slot, None once it vanished."""

    def __init__(
        self, tables: Mapping[str, TableSpec], transactions: Sequence[StoredTransaction]
    ) -> None:
        self.tables = tables
        self._all = transactions
        self.slots: dict[str, list[Link | None]] = {
            item.txn_id: [
                Link(item.txn_id, index, op, before)
                for index, (op, before) in enumerate(zip(item.ops, item.before, strict=True))
            ]
            for item in transactions
        }
        self._records = {item.txn_id: list(item.records) for item in transactions}
        self._manual: dict[str, list[Row]] = {}

    def chain(self, key: Key) -> list[Link]:
        """Return the ops on a row, in order, up to what the server or a person decides about."""
        found: list[Link] = []
        for item in self._all:
            links = [
                link
                for link in self.slots[item.txn_id]
                if link is not None and (link.op.table, link.op.id) == key
            ]
            if links and (item.parked or waits_for_person(item)):
                break
            found += links
        return found

    def inserts_under(self, parent: Key) -> list[Link]:
        """Return the inserts of children under a row, but those that are left alone."""
        return [
            link
            for item in self._all
            if not item.parked and not waits_for_person(item)
            for link in self.slots[item.txn_id]
            if link is not None and link.op.kind == "insert" and self._parent(link.op) == parent
        ]

    def _parent(self, op: WireOp) -> Key | None:
        spec = self.tables.get(op.table)
        if spec is None or spec.parent is None:
            return None
        return spec.parent[1], op.values.get(spec.parent[0]) or ""

    def put(self, link: Link, op: WireOp | None, before: Row | None = None) -> None:
        """Write an op back into its slot; None lets it vanish."""
        made = None if op is None else replace(link, op=op, before=before)
        self.slots[link.txn_id][link.index] = made

    def record(self, link: Link, record: Row) -> None:
        """Attach a record to a transaction; a newer one takes the place of an older on its row.

        The older one's base stays: it is what the author knew when the change was made.
        """
        if record["outcome"] == "manual":
            self._manual.setdefault(link.txn_id, []).append(record)
            return
        records = self._records[link.txn_id]
        for index, old in enumerate(records):
            if all(old[name] == record[name] for name in ("table", "id", "outcome")):
                record = {
                    **record,
                    "columns": sorted({*old["columns"], *record["columns"]}),
                    "base": {**record["base"], **old["base"]},
                    "mine": {**old["mine"], **record["mine"]},
                    "theirs": {**(old["theirs"] or {}), **(record["theirs"] or {})},
                }
                records[index] = record
                return
        records.append(record)

    def merged(self) -> Merged:
        """Return what changed."""
        rewritten = []
        for item in self._all:
            kept = [link for link in self.slots[item.txn_id] if link is not None]
            new = Rewritten(
                item.txn_id,
                tuple(link.op for link in kept),
                tuple(link.before for link in kept),
                tuple(self._records[item.txn_id]),
            )
            if (new.ops, new.before, new.records) != (item.ops, item.before, item.records):
                rewritten.append(new)
        manual = {txn_id: tuple(records) for txn_id, records in self._manual.items()}
        return Merged(tuple(rewritten), manual)


def _merge_row(work: Work, key: Key, theirs: Row | None) -> None:
    spec, chain = work.tables[key[0]], work.chain(key)
    if not chain:
        return
    if theirs is None:
        _row_is_gone(work, spec, chain)
        return
    end = next((n for n, link in enumerate(chain) if link.op.kind == "delete"), len(chain))
    changes = chain[:end]
    if end < len(chain) and not _delete_stands(work, spec, chain, end, theirs):
        return  # the row goes, or a person decides whether it does
    if changes:
        merge_columns(work, spec, changes, theirs)


def _row_is_gone(work: Work, spec: TableSpec, chain: Sequence[Link]) -> None:
    """Their delete meets my changes: the row stays gone, unless I insert it again."""
    again = next((n for n, link in enumerate(chain) if link.op.kind == "insert"), len(chain))
    lost = chain[:again]
    updates = [link for link in lost if link.op.kind == "update"]
    if updates and len(updates) == len(lost):  # a delete of my own makes it no conflict
        first, final = net_values(updates)
        manual = spec.policy == "manual"
        record = record_of(spec, updates, sorted(final), "manual" if manual else "deleted")
        work.record(updates[0], {**record, "base": first, "mine": final, "theirs": None})
        if manual:
            return
    for link in lost:
        work.put(link, None)


def _lose_children(work: Work, parent: Key) -> None:
    """Children that I added under a row which they deleted."""
    for link in work.inserts_under(parent):
        spec, key = work.tables[link.op.table], (link.op.table, link.op.id)
        chain = work.chain(key)
        manual = spec.policy == "manual"
        _, final = net_values([item for item in chain if item.op.kind != "delete"])
        record = record_of(spec, chain, sorted(final), "manual" if manual else "deleted")
        work.record(link, {**record, "base": {}, "mine": final, "theirs": None})
        for item in () if manual else chain:
            work.put(item, None)


def _delete_stands(
    work: Work, spec: TableSpec, chain: Sequence[Link], end: int, theirs: Row
) -> bool:
    """Decide my delete against their change; False when the changes before it needn't be merged."""
    delete = chain[end]
    first, _ = net_values(chain[:end])
    known = {**(delete.before or {}), **first}
    changed = sorted(
        column
        for column in spec.columns
        if column in known
        and spec.writable(column)
        and not same(spec, column, known[column], theirs.get(column))
    )
    if not changed or chain[0].op.kind == "insert":
        return True
    outcome = {"keep_remote": "remote", "delete": "deleted", "manual": "manual"}[spec.on_delete]
    record = record_of(spec, [delete], changed, outcome, policy=spec.on_delete)
    base, there = ({c: row.get(c) for c in changed} for row in (known, theirs))
    work.record(delete, {**record, "base": base, "mine": {}, "theirs": there})
    if spec.on_delete != "keep_remote":
        return False
    work.put(delete, None)
    if end + 1 < len(chain):  # inserted again after a delete that didn't happen: nobody can tell
        again = chain[end + 1]
        told = record_of(spec, chain[end + 1 :], sorted(again.op.values), "manual")
        work.record(again, {**told, "base": {}, "mine": again.op.values, "theirs": theirs})
    return True


def net_values(links: Sequence[Link]) -> tuple[Row, Row]:
    """Return what stood in each column before a chain, and what it makes of it in the end."""
    first: Row = {}
    final: Row = {}
    for link in links:
        for column, value in link.op.values.items():
            if column not in final and column in (link.before or {}):
                first[column] = (link.before or {})[column]
            final[column] = value
    return first, final


def record_of(
    spec: TableSpec,
    links: Sequence[Link],
    columns: Sequence[str],
    outcome: str,
    policy: str | None = None,
) -> Row:
    """Return a conflict record without its values."""
    return {
        "table": spec.name,
        "id": links[0].op.id,
        "columns": list(columns),
        "policy": policy or (spec.policy if isinstance(spec.policy, str) else "merge"),
        "outcome": outcome,
        "through": links[-1].txn_id,
    }
