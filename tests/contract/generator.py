"""Random steps for the contract suite: batches, parked work, decisions, changes from outside."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from local_store.door import digest_of
from local_store.ops import Row, WireOp
from tests.contract.batches import (
    Base,
    Call,
    Decision,
    Edit,
    Parking,
    Step,
    SymbolicOp,
    SymbolicTransaction,
    key_of,
)

STATUSES = ("active", "finalized", "abandoned")


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
        self._parked: list[SymbolicTransaction] = []
        self._disputes: list[tuple[SymbolicTransaction, str]] = []
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
            return self._parking()
        if self._disputes and self._dice.random() < 0.2:
            return self._decision(*self._dice.choice(self._disputes[-4:]))
        if self._parked and self._dice.random() < 0.12:
            return self._decision(self._dice.choice(self._parked[-6:]))
        log_id = self._dice.choice(self._logs)
        size = self._dice.choice((1, 1, 2, 3, 5))
        return Call(log_id, tuple(self._transaction(log_id) for _ in range(size)))

    def _parking(self) -> Parking:
        sender, transaction = self._dice.choice(self._sent[-8:])
        kind = self._dice.random()
        if kind < 0.4:
            transaction = self._plain(sender)
        elif kind < 0.6:  # one that never took effect
            transaction = self._transaction(sender)
        state = "held" if transaction.after else self._dice.choice(("dead", "conflict"))
        columns: tuple[tuple[str, ...], ...] = ()
        if state == "conflict":
            columns = tuple(map(self._disputed, transaction.ops))
            named = [
                key_of(op) for op, about in zip(transaction.ops, columns, strict=True) if about
            ]
            self._disputes += [(transaction, name) for name in named]
        self._parked.append(transaction)
        through = self._dice.choice(self._sent[-4:])[1].txn_id
        return Parking(sender, transaction, state, columns, through)

    def _disputed(self, symbolic: SymbolicOp) -> tuple[str, ...]:
        """Return what a conflict on an op's row may be about: columns, or a key of a document."""
        if self._dice.random() < 0.2:
            return ()
        columns = sorted(symbolic.op.values)
        if "metadata" in columns and self._dice.random() < 0.3:
            return ("metadata.n",)
        return tuple(self._dice.sample(columns, min(len(columns), self._dice.choice((1, 1, 2)))))

    def _plain(self, log_id: str) -> SymbolicTransaction:
        """Return a change of a document or two with nothing wrong about it but its moment."""
        ops: list[SymbolicOp] = []
        user = self._dice.choice(self._users)
        mine = [row for row, owner in self._sessions.items() if owner == user]
        for row_id in self._dice.sample(mine, min(len(mine), self._dice.choice((1, 1, 2)))):
            values = {"status": self._dice.choice(STATUSES), "metadata": self._metadata()}
            ops.append(SymbolicOp(WireOp("sessions", "update", row_id, values), Base(10**6)))
        return self._made(log_id, user, ops)

    def _decision(self, parked: SymbolicTransaction, name: str = "") -> Decision:
        choices = ("mine", "theirs", "edited") if name else ("retry", "retry", "discard", "edit")
        action: Any = self._dice.choice(choices)
        decision = Decision(action, parked.txn_id, name)
        if action == "edit":
            ops = [self._edited(symbolic) for symbolic in parked.ops]
            values = {key_of(symbolic): symbolic.op.values for symbolic in ops}
        elif action == "edited":
            ops, values = list(parked.ops), {name: self._values(name.partition("/")[0])}
        else:
            return decision
        new = replace(parked, txn_id=self._uuid(), ops=tuple(ops))
        self._parked.append(new)
        return replace(decision, values=values, new_txn_id=new.txn_id)

    def _edited(self, symbolic: SymbolicOp) -> SymbolicOp:
        """Return an op with values that a person put right, or made worse."""
        op = symbolic.op
        if op.kind == "delete" or self._dice.random() < 0.3:
            return symbolic
        given = self._values(op.table)
        values = {**op.values, **given}
        return replace(symbolic, op=WireOp(op.table, op.kind, op.id, values))

    def _values(self, table: str) -> Row:
        if table == "sessions":
            status = self._dice.choice((*STATUSES, "bogus"))
            return {"status": status, "metadata": self._metadata()}
        return {"content": f"decided {self._dice.randrange(10**6)}"}

    def _transaction(self, log_id: str) -> SymbolicTransaction:
        if self._sent and self._dice.random() < 0.15:
            return self._again(log_id)
        user = self._dice.choice(self._users)
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
        return self._made(log_id, user, ops, after)

    def _made(
        self, log_id: str, user: str, ops: list[SymbolicOp], after: tuple[str, ...] = ()
    ) -> SymbolicTransaction:
        self._seq[log_id] += 1
        transaction = SymbolicTransaction(
            self._uuid(),
            self._seq[log_id],
            user,
            digest_of([symbolic.op for symbolic in ops]),
            tuple(ops),
            after,
            # Rows that a merge put on other ground, so that chains break there.
            {key: "merged" for key in map(key_of, ops) if self._dice.random() < 0.15},
        )
        self._sent.append((log_id, transaction))
        self._last |= {key: transaction.txn_id for key in map(key_of, ops)}
        return transaction

    def _follow(self, ops: list[SymbolicOp]) -> tuple[list[SymbolicOp], tuple[str, ...]]:
        """Let ops build on the last change that was sent of their rows."""
        after: dict[str, None] = {}
        followed = list(ops)
        for index, symbolic in enumerate(ops):
            last = self._last.get(key_of(symbolic))
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
