"""Random batches in symbols: one description that any server can be asked, versions left open.

Two servers give different version strings, so a base is written down as "the n-th version of this
row" and filled in from what the asked server itself produced. Everything else is literal.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from local_store.door import digest_of
from local_store.ops import Row, WireOp
from syncer.errors import ProtocolMismatch

ACCEPTED_AT = "2026-01-01T00:00:00.000000+00:00"
STATUSES = ("active", "finalized", "abandoned")


class Server(Protocol):
    """A thing that answers the batch RPC."""

    def apply(self, p_batch: Row) -> Row:
        """Answer one batch."""
        ...

    def take(self, p: Row) -> Row:
        """Answer one call of the parking RPC."""
        ...

    def retry(self, txn_ids: Sequence[str]) -> list[Row]:
        """Try parked transactions again."""
        ...

    def discard(self, txn_ids: Sequence[str]) -> list[Row]:
        """Give parked transactions up."""
        ...

    def edit(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row from outside."""
        ...

    def version(self, table: str, row_id: str) -> str | None:
        """Return a row's version, None when there is none."""
        ...

    def row(self, table: str, row_id: str) -> Row | None:
        """Return a row, None when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Base:
    """The base of an op: the `index`-th version the row ever had, or a literal word."""

    index: int | None = None
    literal: str | None = None


@dataclass(frozen=True, slots=True)
class SymbolicOp:
    """An op whose base is still a symbol."""

    op: WireOp
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class SymbolicTransaction:
    """A transaction of symbolic ops."""

    txn_id: str
    seq: int
    user_id: str
    digest: str
    ops: tuple[SymbolicOp, ...]
    after: tuple[str, ...] = ()
    met: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One batch of one log."""

    log_id: str
    transactions: tuple[SymbolicTransaction, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """A change from outside between two batches."""

    table: str
    row_id: str
    values: Row


@dataclass(frozen=True, slots=True)
class Parking:
    """A container hands a transaction over."""

    log_id: str
    transaction: SymbolicTransaction
    state: str


@dataclass(frozen=True, slots=True)
class Decision:
    """A person decides about a transaction, whether it is parked or not."""

    action: Literal["retry", "discard"]
    txn_id: str


Step = Call | Parking | Edit | Decision


@dataclass
class Asked:
    """One server being asked: fills in versions and remembers those it produced."""

    server: Server
    history: dict[str, list[str | None]] = field(default_factory=dict)

    def call(self, call: Call) -> list[Row]:
        """Send a batch; returns its verdicts."""
        sent = {
            "protocol": 1,
            "log_id": call.log_id,
            "acknowledged_seq": max(t.seq for t in call.transactions),
            "transactions": [self._fill(t) for t in call.transactions],
        }
        verdicts = self.server.apply(sent)["verdicts"]
        for verdict in verdicts:
            if verdict["verdict"] == "applied":
                for key, version in verdict["versions"].items():
                    self._remember(key, version)
        return verdicts

    def park(self, parking: Parking) -> list[Row]:
        """Park a transaction; returns its verdict."""
        transaction = self._fill(parking.transaction)
        park = {
            "transaction": {
                **transaction,
                "before": [self._before(op) for op in transaction["ops"]],
            },
            "state": parking.state,
            "blocked_by": next(iter(parking.transaction.after), None),
        }
        asked = {"log_id": parking.log_id, "acknowledged_seq": 0, "parks": [park]}
        return self.server.take(asked)["verdicts"]

    def _before(self, op: Row) -> Row | None:
        """Return what an op replaces, as if its author had read the row just now."""
        row = None if op["kind"] == "insert" else self.server.row(op["table"], op["id"])
        return row and {column: row[column] for column in op["values"]}

    def decide(self, decision: Decision) -> list[Row]:
        """Decide as a person does; returns the results, none where there is nothing to decide."""
        try:
            results = getattr(self.server, decision.action)([decision.txn_id])
        except ProtocolMismatch:
            return []
        for result in results:
            if result["verdict"] == "applied":
                for key, version in result["versions"].items():
                    self._remember(key, version)
        return results

    def edit(self, edit: Edit) -> None:
        """Change a row from outside and remember its new version."""
        self.server.edit(edit.table, edit.row_id, **edit.values)
        key = f"{edit.table}/{edit.row_id}"
        self._remember(key, self.server.version(edit.table, edit.row_id))

    def _remember(self, key: str, version: str | None) -> None:
        seen = self.history.setdefault(key, [])
        if not seen or seen[-1] != version:
            seen.append(version)

    def _fill(self, transaction: SymbolicTransaction) -> Row:
        ops = []
        for symbolic in transaction.ops:
            op = symbolic.op.to_json()
            if symbolic.base is not None:
                op["base"] = self._base(symbolic)
            ops.append(op)
        return {
            "txn_id": transaction.txn_id,
            "seq": transaction.seq,
            "user_id": transaction.user_id,
            "digest": transaction.digest,
            "accepted_at": ACCEPTED_AT,
            "after": list(transaction.after),
            "met": transaction.met,
            "replaces": None,
            "ops": ops,
        }

    def _base(self, symbolic: SymbolicOp) -> str | None:
        assert symbolic.base is not None
        if symbolic.base.literal is not None:
            return symbolic.base.literal
        seen = self.history.get(f"{symbolic.op.table}/{symbolic.op.id}") or [None]
        version = seen[min(symbolic.base.index or 0, len(seen) - 1)]
        return version or "2001-01-01T00:00:00+00:00"


class Generator:
    """Makes random steps from a seed, steered so that every verdict is frequent.

    It keeps a rough idea of which rows exist; being wrong only makes the step more interesting.
    """

    def __init__(self, seed: int, users: int = 2, logs: int = 2) -> None:
        self._dice = random.Random(seed)
        self._users = [self._uuid() for _ in range(users)]
        self._logs = [self._uuid() for _ in range(logs)]
        self._seq = dict.fromkeys(self._logs, 0)
        self._sessions: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._revisions: dict[str, tuple[str, str]] = {}
        self._sent: list[tuple[str, SymbolicTransaction]] = []
        self._parked: list[str] = []
        self._last: dict[str, str] = {}  # by row, the last transaction that changed it

    def steps(self, count: int) -> list[Step]:
        """Return `count` steps."""
        return [self._step() for _ in range(count)]

    def _step(self) -> Step:
        if self._sessions and self._dice.random() < 0.12:
            session = self._dice.choice(sorted(self._sessions))
            self._versions[session] = self._versions.get(session, 0) + 1
            return Edit("sessions", session, {"metadata": {"outside": self._dice.randrange(10**6)}})
        if self._sent and self._dice.random() < 0.2:
            sender, transaction = self._dice.choice(self._sent[-8:])
            if self._dice.random() < 0.4:  # one that never took effect
                transaction = self._transaction(sender)
            state = "held" if transaction.after else self._dice.choice(("dead", "conflict"))
            self._parked.append(transaction.txn_id)
            return Parking(sender, transaction, state)
        if self._parked and self._dice.random() < 0.12:
            action: Literal["retry", "discard"] = self._dice.choice(["retry", "discard"])
            return Decision(action, self._dice.choice(self._parked[-6:]))
        log_id = self._dice.choice(self._logs)
        size = self._dice.choice((1, 1, 2, 3, 5))
        return Call(log_id, tuple(self._transaction(log_id) for _ in range(size)))

    def _transaction(self, log_id: str) -> SymbolicTransaction:
        if self._sent and self._dice.random() < 0.15:
            return self._again(log_id)
        user = self._dice.choice(self._users)
        self._seq[log_id] += 1
        ops: list[SymbolicOp] = []
        touched: set[str] = set()
        for _ in range(self._dice.choice((0, 1, 1, 1, 2, 3))):
            made = self._op(user, touched)
            if made is not None:
                ops.append(made)
        after: tuple[str, ...] = ()
        if self._dice.random() < 0.2:
            ops, after = self._follow(ops)
        elif self._sent and self._dice.random() < 0.15:
            after = (self._dice.choice(self._sent)[1].txn_id,)
        elif self._dice.random() < 0.04:
            after = (self._uuid(),)
        transaction = SymbolicTransaction(
            self._uuid(),
            self._seq[log_id],
            user,
            digest_of([symbolic.op for symbolic in ops]),
            tuple(ops),
            after,
            # Rows that a merge put on other ground, so that chains break there.
            {key: "merged" for key in map(_key, ops) if self._dice.random() < 0.15},
        )
        self._sent.append((log_id, transaction))
        self._last |= {key: transaction.txn_id for key in map(_key, ops)}
        return transaction

    def _follow(self, ops: list[SymbolicOp]) -> tuple[list[SymbolicOp], tuple[str, ...]]:
        """Let ops build on the last change that was sent of their rows."""
        after: dict[str, None] = {}
        followed = list(ops)
        for index, symbolic in enumerate(ops):
            last = self._last.get(_key(symbolic))
            if symbolic.base is not None and last is not None:
                followed[index] = SymbolicOp(symbolic.op, Base(literal="chained"))
                after[last] = None
        return followed, tuple(after)

    def _again(self, log_id: str) -> SymbolicTransaction:
        """Resend an earlier transaction: as it was, or with something about it forged."""
        _, earlier = self._dice.choice(self._sent)
        kind = self._dice.choice(("same", "same", "same", "digest", "user", "seq"))
        fields = {name: getattr(earlier, name) for name in earlier.__slots__}
        if kind == "digest":
            fields["digest"] = "0" * 64
        elif kind == "user":
            fields["user_id"] = self._dice.choice(self._users)
        elif kind == "seq":
            fields["txn_id"] = self._uuid()
        return SymbolicTransaction(**fields)

    def _op(self, user: str, touched: set[str]) -> SymbolicOp | None:
        makers: list[Callable[[str, set[str]], SymbolicOp | None]] = [
            self._insert_session,
            self._insert_session,
            self._update_session,
            self._update_session,
            self._update_session,
            self._delete_session,
            self._insert_revision,
            self._insert_revision,
            self._update_revision,
        ]
        return self._dice.choice(makers)(user, touched)

    def _insert_session(self, user: str, touched: set[str]) -> SymbolicOp:
        again = self._sessions and self._dice.random() < 0.08
        row_id = self._dice.choice(sorted(self._sessions)) if again else self._uuid()
        self._sessions.setdefault(row_id, user)
        touched.add(row_id)
        values: Row = {"status": "active", "source": "prompt", "metadata": self._metadata()}
        if self._dice.random() < 0.06:
            values["status"] = "bogus"
        return SymbolicOp(WireOp("sessions", "insert", row_id, values))

    def _update_session(self, user: str, touched: set[str]) -> SymbolicOp | None:
        row_id = self._pick_session(user)
        if row_id is None:
            return None
        values: Row = {}
        if self._dice.random() < 0.5:
            values["status"] = self._dice.choice(STATUSES)
        if not values or self._dice.random() < 0.5:
            values["metadata"] = self._metadata()
        poison = self._dice.random()
        if poison < 0.05:
            values["status"] = "bogus"
        elif poison < 0.08:
            values["metadata"] = None
        op = WireOp("sessions", "update", row_id, values)
        base = self._choose_base(row_id, touched)
        touched.add(row_id)
        return SymbolicOp(op, base)

    def _delete_session(self, user: str, touched: set[str]) -> SymbolicOp | None:
        row_id = self._pick_session(user)
        if row_id is None or self._dice.random() < 0.4:
            return None
        base = self._choose_base(row_id, touched)
        touched.add(row_id)
        return SymbolicOp(WireOp("sessions", "delete", row_id, {}), base)

    def _insert_revision(self, user: str, touched: set[str]) -> SymbolicOp | None:
        session = self._pick_session(user) or self._uuid()
        if self._dice.random() < 0.08:
            session = self._uuid()
        row_id = self._uuid()
        self._revisions[row_id] = (user, session)
        touched.add(row_id)
        values: Row = {"session_id": session, "content": "text", "revision_type": "initial"}
        poison = self._dice.random()
        if poison < 0.04:
            values["content"] = None
        elif poison < 0.08:
            values["revision_type"] = "bogus"
        return SymbolicOp(WireOp("session_revisions", "insert", row_id, values))

    def _update_revision(self, user: str, touched: set[str]) -> SymbolicOp | None:
        mine = [row for row, (owner, _) in self._revisions.items() if owner == user]
        if not mine:
            return None
        row_id = self._dice.choice(mine)
        base = self._choose_base(row_id, touched)
        touched.add(row_id)
        values = {"content": f"edited {self._dice.randrange(10**6)}"}
        return SymbolicOp(WireOp("session_revisions", "update", row_id, values), base)

    def _pick_session(self, user: str) -> str | None:
        mine = [row for row, owner in self._sessions.items() if owner == user]
        everyones = list(self._sessions)
        pool = everyones if self._dice.random() < 0.07 else mine
        return self._dice.choice(pool) if pool else None

    def _choose_base(self, row_id: str, touched: set[str]) -> Base:
        if row_id in touched:
            return Base(literal="chained")
        # A far index means "the newest the server has told of"; a small one is usually stale.
        return Base(index=0 if self._dice.random() < 0.2 else 10**6)

    def _metadata(self) -> Row:
        return {"n": self._dice.randrange(10**6)}

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._dice.getrandbits(128), version=4))


def _key(symbolic: SymbolicOp) -> str:
    return f"{symbolic.op.table}/{symbolic.op.id}"
