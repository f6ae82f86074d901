"""What is to be sent next: whose turn it is, and what each op builds on.

Authors take turns, so that one who floods the buffer doesn't delay the others; each author's own
transactions stay in order. Functions take the open connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from local_store.adopting import Sealed
from local_store.decoding import RecordDamaged, decode_before, decode_ops
from local_store.op_log import DUE_AHEAD_MAX_S, narrowing, read_marks, touched_by
from local_store.ops import DueWork, PendingTransaction, Selection, TableSpec, WireOp
from local_store.rows import standing
from local_store.schema import SETTLED, intact
from local_store.views import Key

USERS_MAX = 50  # in one batch: the server changes its role once for each
QUOTA_MIN = 10  # and several transactions of one author in a row are what it is fast at
PARKED_MAX = 50  # questions about parked work in one batch

_COLUMNS = (
    "l.position, l.seq, l.txn_id, l.user_id, l.digest, l.accepted_at, l.ops, l.before, l.children,"
    " l.records, l.bases, l.size_bytes, l.attempts, l.parked, l.held_since, l.schemas,"
    f" l.sealed, {intact('l.')}"
)
_IS_DUE = "(t.due_at <= ? OR t.due_at > ?)"
_ASKS = "l.parked = 1 AND (l.due_at <= ? OR l.due_at > ?)"
_TURNS = "turns t CROSS JOIN op_log l ON l.position = t.position"
Found = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """Where the rows of a transaction stand: version and last merge, as they are known here.

    `stored` bases are those of a transaction that was applied before and is sent again. What
    another buffer `sealed` outranks what is known here: it was there.
    """

    stood: Mapping[Key, tuple[str | None, str | None]]
    stored: Mapping[str, str | None] | None
    sealed: Sealed

    def base(self, key: Key) -> str | None:
        """Return the version that a change of a row is made on."""
        return self.stood[key][0] if self.stored is None else self.stored.get("/".join(key))

    def met(self) -> dict[str, str | None]:
        """Return for each row what a merge last met on it, here or in the buffer that sealed it."""
        named = {"/".join(key): met for key, (_, met) in self.stood.items()}
        return {name: self.sealed.met.get(name, met) for name, met in named.items()}


class Due:
    """One question of what is due; collects rows until a limit is reached."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        now_s: float,
        selection: Selection | None,
        transactions_max: int,
        bytes_max: int,
    ) -> None:
        self._connection = connection
        self._when = (now_s, now_s + DUE_AHEAD_MAX_S)
        self._narrowed, self._values = narrowing(selection)
        self._transactions_max = transactions_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._full = False
        self.found: list[Found] = []

    def log(self) -> int | None:
        """Return the log of the oldest due transaction, parked ones last; None when none is due."""
        for source, condition, order in (
            (_TURNS, _IS_DUE, "t.position"),
            ("op_log l", _ASKS, "l.log, l.position"),
        ):
            found = self._connection.execute(
                f"SELECT l.log FROM {source} WHERE {condition}{self._narrowed}"
                f" ORDER BY {order} LIMIT 1",
                (*self._when, *self._values),
            ).fetchone()
            if found is not None:
                return int(found[0])
        return None

    def collect(self, log: int, after_user: str) -> None:
        """Take from each author in turn, then what is left of the room from those with more."""
        hungry: list[tuple[str, int]] = []
        served = 0
        quota = max(QUOTA_MIN, -(-self._transactions_max // USERS_MAX))
        for user_id in self._users(log, after_user):
            last = self._take(log, user_id, 0, quota)
            served += last is not None
            if last is not None:
                hungry.append((user_id, last))
            if self._full or served == USERS_MAX:
                break
        left = self._transactions_max - len(self.found)
        for number, (user_id, last) in enumerate(hungry):
            if self._full or left <= 0:
                return
            taken = len(self.found)
            self._take(log, user_id, last, -(-left // (len(hungry) - number)))
            left -= len(self.found) - taken

    def ask_about_parked(self, log: int) -> None:
        """Fill the room that is left with parked transactions: what became of them?"""
        room = min(PARKED_MAX, self._transactions_max - len(self.found))
        if room > 0 and not self._full:
            self._add(
                f"op_log l WHERE l.log = ? AND {_ASKS}{self._narrowed} ORDER BY l.position",
                (log, *self._when, *self._values),
                room,
            )

    def without_gaps(self, found: list[PendingTransaction]) -> list[PendingTransaction]:
        """Leave out what would be held only because a due predecessor found no room here.

        An author's own are taken in order, so this meets what builds on another author's row, or on
        a transaction that was freed in an older log. When nothing else is left it goes all the
        same: the server holds it, and the turn moves on.
        """
        taken: set[str] = set()
        kept: list[PendingTransaction] = []
        for transaction in found:
            missing = [txn_id for txn_id in transaction.after if txn_id not in taken]
            if not any(self._is_due(txn_id) for txn_id in missing):
                kept.append(transaction)
                taken.add(transaction.txn_id)
        return kept or found

    def _is_due(self, txn_id: str) -> bool:
        found = self._connection.execute(
            f"SELECT 1 FROM names n CROSS JOIN {_TURNS} WHERE n.txn_id = ?"
            f" AND t.position = n.position AND {_IS_DUE}{self._narrowed}",
            (txn_id, *self._when, *self._values),
        ).fetchone()
        return found is not None

    def _users(self, log: int, after_user: str) -> Iterator[str]:
        """Yield the authors with undelivered work, from after `after_user` round to it.

        Each step is one look into the index, however much an author has queued.
        """
        for low, high in ((after_user, None), ("", after_user)):
            user_id = low
            while True:
                found = self._connection.execute(
                    "SELECT min(user_id) FROM turns WHERE log = ? AND user_id > ?", (log, user_id)
                ).fetchone()
                user_id = found[0]
                if user_id is None or (high is not None and user_id > high):
                    break
                yield user_id

    def _take(self, log: int, user_id: str, after: int, count: int) -> int | None:
        """Take an author's next `count` due ones; returns the last's position, None for none."""
        known = len(self.found)
        count = min(count, self._transactions_max - known)
        self._add(
            f"{_TURNS} WHERE t.log = ? AND t.user_id = ? AND t.position > ? AND {_IS_DUE}"
            f"{self._narrowed} ORDER BY t.position",
            (log, user_id, after, *self._when, *self._values),
            count,
        )
        return None if len(self.found) == known else int(self.found[-1][0])

    def _add(self, source: str, values: Sequence[object], count: int) -> None:
        """At least one transaction is taken: one that is larger than the limit goes alone."""
        statement = f"SELECT {_COLUMNS} FROM {source} LIMIT ?"
        for row in self._connection.execute(statement, (*values, count)):
            if not row[17]:
                raise RecordDamaged
            self._bytes += row[11]
            if self.found and self._bytes > self._bytes_max:
                self._full = True
                return
            self.found.append(row)
        self._full = self._full or len(self.found) >= self._transactions_max


def work(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    due: Due,
    after_user: str,
) -> DueWork:
    """Return what is due of one log, by position, each with what it builds on.

    When nothing is, the newest log stands for itself.
    """
    log, marks = due.log(), read_marks(connection)
    ordinal = marks.log if log is None else log
    log_id, end = connection.execute(
        "SELECT log_id, last_seq FROM logs WHERE ordinal = ?", (ordinal,)
    ).fetchone()
    end = marks.seq if ordinal == marks.log else end
    if log is None:
        return DueWork(log_id, end)
    due.collect(log, after_user)
    due.ask_about_parked(log)
    found = [_complete(connection, tables, log_id, row) for row in sorted(due.found)]
    return DueWork(log_id, end, tuple(due.without_gaps(found)))


def undelivered(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    selection: Selection | None,
    limit: int,
) -> list[PendingTransaction]:
    """Return what is undelivered of all logs, due or not, by position; parked work isn't."""
    narrowed, values = narrowing(selection)
    found = connection.execute(
        f"SELECT {_COLUMNS}, (SELECT log_id FROM logs WHERE ordinal = l.log) FROM {_TURNS}"
        f" WHERE true{narrowed} ORDER BY t.position LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [_complete(connection, tables, row[-1], row[:-1]) for row in found]


def sealable(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    after: int,
    transactions_max: int,
    bytes_max: int,
) -> list[PendingTransaction]:
    """Return the undelivered ones behind a position, due or not, of one log."""
    found: list[PendingTransaction] = []
    size = 0
    for row in connection.execute(
        f"SELECT {_COLUMNS}, (SELECT log_id FROM logs WHERE ordinal = l.log) FROM {_TURNS}"
        " WHERE t.position > ? ORDER BY t.position LIMIT ?",
        (after, transactions_max),
    ).fetchall():
        size += row[11]
        if found and (row[-1] != found[0].log_id or size > bytes_max):
            break
        found.append(_complete(connection, tables, row[-1], row[:-1]))
    return found


def seal_from(connection: sqlite3.Connection, after: int) -> int:
    """Return the position behind which to seal: `after`, or less when a merge reached behind it.

    What was merged together has one record, which its first transaction carries. A segment that has
    only the later ones would let the older form of that one tell of itself alone.
    """
    # Asked first, of what is new: the records of a long backlog are read only after a merge.
    is_merged = (
        "l.ops = '[]' OR EXISTS (SELECT 1 FROM touches x JOIN rows r ON r.tbl = x.tbl"
        " AND r.id = x.id WHERE x.position = t.position AND r.met IS NOT NULL)"
    )
    (first,) = connection.execute(
        f"SELECT min(t.position) FROM {_TURNS}, json_each(l.records) e"
        " JOIN names n ON n.txn_id = e.value ->> 'through'"
        " WHERE t.position <= ?1 AND l.records <> '[]' AND n.position > ?1"
        f" AND EXISTS (SELECT 1 FROM {_TURNS} WHERE t.position > ?1 AND ({is_merged}))",
        (after,),
    ).fetchone()
    return after if first is None else int(first) - 1


def _complete(
    connection: sqlite3.Connection, tables: Mapping[str, TableSpec], log_id: str, row: Found
) -> PendingTransaction:
    position, seq, txn_id, user_id, digest, accepted_at, encoded, before, children = row[:9]
    records, stored, size_bytes, attempts, parked, held_since, schemas, sealed, is_intact = row[9:]
    if not is_intact:
        raise RecordDamaged
    ops = decode_ops(encoded, schemas, tables)
    taken_along = orjson.loads(children)
    _check_touches(connection, tables, position, ops, taken_along)
    known = None if stored is None else orjson.loads(stored)
    told = Sealed.decode(sealed)
    stood = {key: standing(connection, key) for key in {(op.table, op.id): None for op in ops}}
    ground = Ground(stood, known, told)
    bases, chained, after = _predecessors(connection, tables, position, ops, ground)
    return PendingTransaction(
        seq=seq,
        txn_id=txn_id,
        user_id=user_id,
        digest=digest,
        accepted_at=accepted_at,
        ops=ops,
        bases=bases,
        chained=chained,
        after=after,
        size_bytes=size_bytes,
        attempts=attempts,
        position=position,
        log_id=log_id,
        before=decode_before(before, ops, schemas, tables),
        children=tuple(taken_along),
        met=ground.met(),
        records=tuple(orjson.loads(records)),
        parked=bool(parked),
        held_since=held_since,
    )


def _check_touches(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    position: int,
    ops: Sequence[WireOp],
    children: Sequence[Mapping[str, str | None] | None],
) -> None:
    """Send nothing whose touches don't say what the record says: what goes before it may be wrong.

    Touches have no checksum of their own; they can be made again from the log.
    """
    found = connection.execute(
        f"SELECT tbl, id FROM touches WHERE position = ? AND stage <> {SETTLED}", (position,)
    ).fetchall()
    if set(found) != touched_by(tables, ops, children).keys():
        raise RecordDamaged


def _predecessors(
    connection: sqlite3.Connection,
    tables: Mapping[str, TableSpec],
    position: int,
    ops: Sequence[WireOp],
    ground: Ground,
) -> tuple[tuple[str | None, ...], tuple[bool, ...], tuple[str, ...]]:
    """Find what each op builds on: a server version, or an unsettled change that goes first."""
    sealed = ground.sealed
    bases: list[str | None] = []
    chained: list[bool] = []
    after: dict[str, None] = dict.fromkeys(sealed.after)  # ordered and without doubles
    seen: set[tuple[str, str]] = set()
    for op in ops:
        key, name = (op.table, op.id), f"{op.table}/{op.id}"
        if key not in seen and op.kind != "insert" and sealed.speaks_of(name):
            bases.append(sealed.bases.get(name))
            chained.append(name in sealed.chained)
            seen.add(key)
            continue
        earlier = _last_touch(connection, key, position)
        spec = tables.get(op.table)  # None: no longer registered, and still to be delivered
        parent = spec.parent if spec else None
        parent_id = op.values.get(parent[0]) if parent else None
        if parent is not None and parent_id is not None:
            parent_key = (parent[1], parent_id)
            after.update(dict.fromkeys(_last_touch(connection, parent_key, position)))
        after.update(dict.fromkeys(earlier))
        follows = bool(earlier) or key in seen
        chained.append(follows and op.kind != "insert")
        if follows or op.kind == "insert":
            bases.append(None)
        else:
            bases.append(ground.base(key))
        seen.add(key)
    return tuple(bases), tuple(chained), tuple(after)


def _last_touch(connection: sqlite3.Connection, key: tuple[str, str], position: int) -> list[str]:
    found = connection.execute(
        "SELECT l.txn_id FROM touches t JOIN op_log l ON l.position = t.position"
        f" WHERE t.tbl = ? AND t.id = ? AND t.position < ? AND t.stage <> {SETTLED}"
        " ORDER BY t.position DESC LIMIT 1",
        (*key, position),
    ).fetchone()
    return [] if found is None else [found[0]]
