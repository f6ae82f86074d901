"""People at the modelled server: they retry, discard, edit and decide what is parked.

The history is told what they meant, worked out here from what their author wrote and what the
person was shown. Of the server's own idea only how far a record reaches is asked, which the tests
of decisions hold against examples. A method named like an action of the world is that action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from local_store import Delete, Insert, Update
from local_store.ops import Op, Row
from syncer.errors import ProtocolMismatch
from syncer.testkit.history import History
from tests.simulation.model_entries import is_open
from tests.simulation.model_people import OperatedModel

CHOICES = ("mine", "mine", "theirs", "theirs", "edited")


class People:
    """Those who look after dead letters and conflicts."""

    def __init__(
        self,
        server: OperatedModel,
        history: History,
        dice: Random,
        text: Callable[[], str],
        ids: Callable[[], str],
    ) -> None:
        self._server, self._history, self._dice = server, history, dice
        self._text, self._ids = text, ids

    def _open(self, *states: str) -> str | None:
        """Return some parked transaction that a person could decide about."""
        found = [txn_id for txn_id, entry in self._server.parked.items() if entry.state in states]
        return self._dice.choice(sorted(found)) if found else None

    def discard(self) -> None:
        """Decide that a parked transaction comes to nothing."""
        txn_id = self._open("dead", "held")
        if txn_id is not None:
            self._history.person(txn_id, "discard")
            self._server.discard([txn_id])

    def retry(self) -> None:
        """Try dead letters again; that decides nothing, so nothing may be overwritten by it."""
        txn_id = self._open("dead", "held", "conflict")
        if txn_id is not None:
            self._server.retry([txn_id])

    def cure(self) -> None:
        """Change a constraint, so that what was refused would be taken now."""
        self._server.poison = None

    def amend(self) -> None:
        """Put a dead letter right; it is tried later, if ever."""
        txn_id = self._open("dead", "held")
        if txn_id is None:
            return
        item, new_txn_id = self._server.parked[txn_id].item, self._ids()
        op = self._dice.choice(item["ops"]) if item["ops"] else None
        if op is None or not op["values"]:
            return
        column = self._dice.choice(sorted(op["values"].keys() & {"text", "title"}) or [""])
        values = {**op["values"], **({column: self._text()} if column else {})}
        key = op["table"], op["id"]
        self._server.edit_parked(txn_id, {"/".join(key): values}, new_txn_id, new_txn_id)
        ops = [
            with_values(one, values) if key_of(one) == key else one
            for one in self._history.ops_of(txn_id)
        ]
        self._history.decided(txn_id, "edit", ops, replaced_by=new_txn_id)

    def decide(self) -> None:
        """Decide a conflict for one side, or write a third version."""
        found = sorted(key for key, record in self._server.records.items() if is_open(record))
        if not found:
            return
        txn_id, table, row_id, _ = key = self._dice.choice(found)
        choice, named = self._dice.choice(CHOICES), self._server.records[key]
        open_ones = [r for k, r in self._server.records.items() if k[0] == txn_id and is_open(r)]
        row = {self._dice.choice(["text", "title"]): self._text()} if table == "notes" else {}
        row = row or {"text": self._text()}
        new_txn_id = self._ids()
        edited: Row = {"row": row, "new_txn_id": new_txn_id, "digest": new_txn_id}
        behind = self._behind(txn_id, open_ones) if choice != "mine" else {}
        try:
            more = edited if choice == "edited" else {}
            self._server.resolve(txn_id, f"{table}/{row_id}", choice, **more)
        except ProtocolMismatch:
            return  # their row is gone, or the transaction is
        ops = self._history.ops_of(txn_id)
        for record in open_ones:
            if choice == "theirs" or record.get("theirs_version") is None:
                ops = tuple(without(ops, record, gone=record.get("theirs_version") is None))
        if choice == "edited":
            ops = tuple(Update(*key_of(o), row) if key_of(o) == (table, row_id) else o for o in ops)
            shown = {f"{table}/{row_id}": named["theirs_version"]}
            self._history.decided(txn_id, choice, ops, replaced_by=new_txn_id, shown=shown)
        else:
            self._history.decided(txn_id, choice, ops)
        for other, records in behind.items():
            left = self._history.ops_of(other)
            for record in records:
                left = tuple(without(left, record, gone=False))
            self._history.decided(other, "theirs", left)

    def _behind(self, txn_id: str, records: list[Row]) -> dict[str, list[Row]]:
        """Return what waits behind a transaction and was shown to the person together with it."""
        first = self._server.parked.get(txn_id)
        found: dict[str, list[Row]] = {}
        for record in records if first is not None else ():
            last = self._server.covered_through(first, record.get("through"))
            for entry in self._server.behind(first):
                other = entry.item["txn_id"]
                is_shown = entry.place[1] <= last
                if is_shown and any(_about(op, record) for op in self._history.ops_of(other)):
                    found.setdefault(other, []).append(record)
        return found


def key_of(op: Op) -> tuple[str, str]:
    """Return the table and the id of the row that an op is about."""
    return op.table, str(op.values["id"]) if isinstance(op, Insert) else op.id


def with_values(op: Op, values: Mapping[str, Any]) -> Op:
    """Return an op with other values."""
    if isinstance(op, Insert):
        return Insert(op.table, {**values, "id": op.values["id"]})
    return op if isinstance(op, Delete) else Update(op.table, op.id, values)


def _about(op: Op, record: Row) -> bool:
    if key_of(op) != (record["table"], record["id"]):
        return False
    changes = op.changes if isinstance(op, Update) else ()
    return isinstance(op, Delete) or not set(record["columns"]).isdisjoint(changes)


def without(ops: tuple[Op, ...], record: Row, *, gone: bool) -> list[Op]:
    """Return what is left of ops when their side of a record was taken."""
    left: list[Op] = []
    for op in ops:
        if key_of(op) != (record["table"], record["id"]):
            left.append(op)
        elif isinstance(op, Update) and not gone:
            rest = {c: v for c, v in op.changes.items() if c not in record["columns"]}
            left += [Update(op.table, op.id, rest)] if rest else []
    return left
