"""What stands there after quiet: rows, ledger, buffers, parked work; and how to read it.

An observation may be partial; parts are joined with `joined`. Read buffers first, then the server:
what a buffer calls pending may be applied a moment later, and the ledger then says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from local_store import LocalStore, TableSpec
from local_store.ops import LogEntry, Row, user_uuid
from syncer.remote import Remote, TableRead

if TYPE_CHECKING:
    import psycopg

Key = tuple[str, str]
"""Table and id of a row."""

PAGE = 2_000  # log entries or ledger rows per call: a few hundred KB
READ_MAX = 1_000  # rows per read: the server caps it there


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One row on the server, without its key, owner and version in `values`."""

    user_id: str
    values: Row
    version: str | None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What the server remembers of one delivered transaction.

    `versions` maps `table/id` to what it left (None: the row went); None when it isn't known.
    `number` grows with the order in which transactions took effect; None when nobody looked.
    """

    txn_id: str
    log_id: str
    seq: int
    user_id: str | None
    digest: str
    verdict: str = "applied"
    versions: Mapping[str, str | None] | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class BufferSeen:
    """One buffer: its identity and its op log, settled entries may be gone."""

    log_id: str
    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class ParkedRecord:
    """What is kept about a transaction that needed a decision.

    `state` is conflict, dead or held; `outcome` is manual while it waits for a person (then it has
    no effect), else what was done: merged, remote, local, deleted. `columns` None means all.
    `log_id` and `seq` say where it came from, when that is known.
    """

    txn_id: str
    state: str
    rows: frozenset[Key] = frozenset()
    columns: frozenset[str] | None = None
    outcome: str = "manual"
    log_id: str | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class CounterSeen:
    """A stored counter beside a recount of what it counts."""

    name: str
    stored: int
    recounted: int


@dataclass(frozen=True, slots=True)
class Visible:
    """A row that `viewer` could read with their own token, and whose it is."""

    viewer: str
    owner: str
    table: str
    id: str


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything read back after quiet. `ledger` None means that nobody looked."""

    rows: Mapping[Key, SeenRow]
    ledger: tuple[LedgerRow, ...] | None = None
    buffers: tuple[BufferSeen, ...] = ()
    records: tuple[ParkedRecord, ...] = ()
    quarantined: frozenset[str] = frozenset()
    counters: tuple[CounterSeen, ...] = ()
    visible: tuple[Visible, ...] = ()


def joined(*parts: Observation) -> Observation:
    """Put partial observations together."""
    ledgers = [part.ledger for part in parts if part.ledger is not None]
    return Observation(
        rows={key: row for part in parts for key, row in part.rows.items()},
        ledger=tuple(entry for ledger in ledgers for entry in ledger) if ledgers else None,
        buffers=tuple(buffer for part in parts for buffer in part.buffers),
        records=tuple(record for part in parts for record in part.records),
        quarantined=frozenset().union(*(part.quarantined for part in parts)),
        counters=tuple(counter for part in parts for counter in part.counters),
        visible=tuple(row for part in parts for row in part.visible),
    )


def observe_store(store: LocalStore) -> Observation:
    """Read one buffer: its log, and the server's evidence kept with what was not applied."""
    buffers = tuple(
        BufferSeen(log["log_id"], tuple(_log_entries(store, log["log_id"]))) for log in store.logs()
    )
    entries = [entry for buffer in buffers for entry in buffer.entries]
    parked = [entry for entry in entries if entry.state in ("conflict", "dead", "held")]
    replies = [(entry, store.reply(entry.txn_id)) for entry in parked]
    return Observation(
        rows={},
        buffers=buffers,
        records=tuple(
            ParkedRecord(entry.txn_id, entry.state, _keys_of(reply.get("rows") or {}))
            for entry, reply in replies
            if reply
        ),
    )


def observe_remote(
    remote: Remote, tables: Sequence[TableSpec], users: Sequence[str]
) -> Observation:
    """Read rows as each user sees them, and the ledger without versions, through the RPCs.

    Raises ValueError when a user has more rows in a table than one read carries, SyncError when
    the server can't be asked. `observe_database` has neither limit.
    """
    rows: dict[Key, SeenRow] = {}
    visible: list[Visible] = []
    for user in (user_uuid(user) for user in users):
        reads = [TableRead(spec.name, {}, limit=READ_MAX) for spec in tables]
        for spec, found in zip(tables, remote.read(user, reads), strict=True):
            if len(found) >= READ_MAX:
                raise ValueError(f"{spec.name}: {READ_MAX} rows or more; use observe_database")
            for row in found:
                key, seen = _seen_row(spec, row)
                rows[key] = seen
                visible.append(Visible(user, seen.user_id, *key))
    positions = [
        (str(log["log_id"]), entry)
        for log in remote.audit()["logs"]
        for entry in _ledger_entries(remote, str(log["log_id"]))
    ]
    ledger = [
        LedgerRow(
            str(entry["txn_id"]),
            log_id,
            int(entry["seq"]),
            entry.get("user_id"),
            str(entry["digest"]),
            str(entry["state"]),
            entry.get("versions"),
        )
        for log_id, entry in positions
        if entry["state"] in ("applied", "discarded")
    ]
    parked = [
        ParkedRecord(
            str(entry["txn_id"]), str(entry["state"]), log_id=log_id, seq=int(entry["seq"])
        )
        for log_id, entry in positions
        if entry["state"] not in ("applied", "discarded")
    ]
    return Observation(
        rows=rows, ledger=tuple(ledger), visible=tuple(visible), records=tuple(parked)
    )


def observe_database(
    connection: psycopg.Connection[Any], tables: Sequence[TableSpec], users: Sequence[str] = ()
) -> Observation:
    """Read all rows and the whole ledger as the database's owner, and what each user may see.

    The tables are in `public`. Nothing is changed: role and claims are rolled back.
    """
    rows: dict[Key, SeenRow] = {}
    visible: list[Visible] = []
    with connection.transaction(force_rollback=True):
        for spec in tables:
            rows.update(_seen_row(spec, row) for row in _every_row(connection, spec))
            for user in (user_uuid(user) for user in users):
                found = [_seen_row(spec, row) for row in _every_row(connection, spec, user)]
                visible += [Visible(user, row.user_id, *key) for key, row in found]
        ledger = connection.execute(
            "select txn_id::text, log_id::text, seq, user_id::text, digest, verdict, versions,"
            " row_number() over (order by applied_at) from sync.ledger order by log_id, seq"
        ).fetchall()
        records = (*_parked_there(connection), *_conflicts_there(connection))
    entries = tuple(LedgerRow(*found) for found in ledger)
    return Observation(rows=rows, ledger=entries, visible=tuple(visible), records=records)


def _parked_there(connection: psycopg.Connection[Any]) -> Iterator[ParkedRecord]:
    found = connection.execute(
        "select txn_id::text, state, log_id::text, seq from sync.parked"
    ).fetchall()
    return (
        ParkedRecord(txn_id, state, log_id=log_id, seq=seq) for txn_id, state, log_id, seq in found
    )


DECIDED = {"mine": "local", "theirs": "remote", "edited": "merged", "discarded": "remote"}
"""What a person's decision came to, in the words of automatic outcomes."""


def _conflicts_there(connection: psycopg.Connection[Any]) -> Iterator[ParkedRecord]:
    found = connection.execute(
        "select txn_id::text, table_name, row_id, columns, theirs, policy, outcome, resolution"
        " from sync.conflicts"
    ).fetchall()
    for txn_id, table, row_id, columns, theirs, policy, outcome, resolution in found:
        taken_along = _keys_of(theirs or {}) if policy == "delete" else frozenset()
        yield ParkedRecord(
            txn_id,
            "conflict",
            frozenset({(table, row_id), *taken_along}),
            frozenset(column.partition(".")[0] for column in columns) or None,
            DECIDED.get(resolution, outcome),
        )


def count_children(
    observation: Observation,
    parent: str,
    counter: str,
    child: TableSpec,
    counts: Callable[[Row], bool] = lambda values: True,
) -> tuple[CounterSeen, ...]:
    """Recount a stored counter: how many rows of `child` hang on each row of `parent`."""
    if child.parent is None:
        raise ValueError(f"{child.name} has no parent")
    column = child.parent[0]
    counted: dict[Any, int] = {}
    for (table, _), row in observation.rows.items():
        if table == child.name and counts(row.values):
            counted[row.values.get(column)] = counted.get(row.values.get(column), 0) + 1
    return tuple(
        CounterSeen(f"{table}/{id_}.{counter}", row.values[counter], counted.get(id_, 0))
        for (table, id_), row in sorted(observation.rows.items())
        if table == parent
    )


def _every_row(
    connection: psycopg.Connection[Any], spec: TableSpec, user: str | None = None
) -> list[Row]:
    """Return all rows of a table, or those that row-level security shows to `user`."""
    from psycopg import sql

    statement = sql.SQL("select to_jsonb(t) from public.{} t").format(sql.Identifier(spec.name))
    with connection.transaction(force_rollback=True):  # takes role and claims back
        if user is not None:
            claims = orjson.dumps({"sub": user, "role": "authenticated"}).decode()
            connection.execute(
                "select set_config('request.jwt.claims', %s, true),"
                " set_config('request.jwt.claim.sub', %s, true)",
                (claims, user),
            )
            connection.execute("set local role authenticated")
        return [row for (row,) in connection.execute(statement).fetchall()]


def _seen_row(spec: TableSpec, row: Mapping[str, Any]) -> tuple[Key, SeenRow]:
    own = (spec.key, spec.owner, spec.version)
    values = {column: value for column, value in row.items() if column not in own}
    version = row.get(spec.version)
    seen = SeenRow(str(row[spec.owner]), values, None if version is None else str(version))
    return (spec.name, str(row[spec.key])), seen


def _keys_of(rows: Mapping[str, Any]) -> frozenset[Key]:
    keys = (name.partition("/") for name in rows)
    return frozenset((table, row_id) for table, _, row_id in keys)


def _log_entries(store: LocalStore, log_id: str) -> Iterator[LogEntry]:
    after_seq = 0
    while page := store.entries(log_id=log_id, after_seq=after_seq, limit=PAGE):
        yield from page
        after_seq = page[-1].seq


def _ledger_entries(remote: Remote, log_id: str) -> Iterator[Row]:
    after_seq = 0
    while page := remote.audit(log_id, after_seq=after_seq, limit=PAGE).get("entries") or []:
        yield from page
        after_seq = int(page[-1]["seq"])
