"""The proof: what was acknowledged against the server's ledger against the rows themselves.

Every acknowledged transaction must be in exactly one state. `acknowledged` is the highest seq that
is known, from the buffer or from the server; the server says what is applied, parked or discarded,
the buffer says what is still on its way; what neither knows is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any

from local_store import LocalStore
from local_store.ops import HeldRow, LogEntry, Row
from syncer.remote import Remote, TableRead

PAGE = 2_000  # entries or rows per call: a few hundred KB, well under any body limit
ROWS_PER_CALL = 100  # reads in one RPC when rows are compared
SERVER_STATES = ("applied", "discarded", "dead", "conflict", "held", "superseded")


@dataclass(frozen=True, slots=True)
class LogAudit:
    """The account of one log; `acknowledged` equals the sum of the states plus `lost`."""

    log_id: str
    acknowledged: int = 0
    applied: int = 0
    pending: int = 0
    held: int = 0
    conflict: int = 0
    dead: int = 0
    discarded: int = 0
    superseded: int = 0
    lost: int = 0
    duplicated: int = 0
    content_mismatch: int = 0

    @property
    def balanced(self) -> bool:
        """True when nothing is lost, doubled or different."""
        return self.lost == self.duplicated == self.content_mismatch == 0


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All logs and their sum."""

    logs: tuple[LogAudit, ...]

    @property
    def total(self) -> LogAudit:
        """The sum over all logs."""
        counted = [item.name for item in fields(LogAudit) if item.name != "log_id"]
        sums = {name: sum(getattr(log, name) for log in self.logs) for name in counted}
        return LogAudit(log_id="total", **sums)

    @property
    def balanced(self) -> bool:
        """True when every log balances."""
        return all(log.balanced for log in self.logs)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `syncer audit --json` prints."""
        total = asdict(self.total)
        del total["log_id"]
        return {
            "logs": [asdict(log) for log in self.logs],
            "total": total,
            "balanced": self.balanced,
        }


def audit(
    remote: Remote, store: LocalStore | None = None, *, rows: Sequence[HeldRow] | None = None
) -> AuditReport:
    """Audit every log the server knows and those of `store`. Raises SyncError when unreachable.

    The store's clean rows are compared with the server's: all of them, or just `rows`. A log whose
    buffer isn't at hand is judged by the server alone: what it acknowledged and the server doesn't
    know counts as lost, because nobody here can show it.
    """
    known = {str(log["log_id"]): log for log in remote.audit()["logs"]}
    audits: list[LogAudit] = []
    if store is not None:
        pages = _all_clean(store) if rows is None else _pages(rows)
        mismatches = sum(_compare(remote, store, page) for page in pages)
        for log in store.logs():
            log_id = log["log_id"]
            found = _audit_held(remote, store, log_id, known.pop(log_id, {}), log["last_seq"])
            audits.append(replace(found, content_mismatch=found.content_mismatch + mismatches))
            mismatches = 0  # rows belong to the buffer, not to one of its logs
    audits += [_audit_remote_only(log_id, log) for log_id, log in sorted(known.items())]
    return AuditReport(tuple(audits))


def _audit_remote_only(log_id: str, log: Row) -> LogAudit:
    states = {name: int(log.get(name, 0)) for name in SERVER_STATES}
    known, acknowledged = sum(states.values()), int(log["acknowledged_seq"])
    return LogAudit(
        log_id,
        acknowledged=max(acknowledged, known),
        lost=max(0, acknowledged - known),
        duplicated=int(log["duplicated"]),
        **states,
    )


def _audit_held(
    remote: Remote, store: LocalStore, log_id: str, log: Row, last_seq: int
) -> LogAudit:
    # The buffer is read first: what it calls pending may be applied a moment later, and the server,
    # read second, then says so; the other way round a transaction could be in neither.
    local = list(_local_entries(store, log_id))
    listed = {str(entry["txn_id"]): entry for entry in _server_entries(remote, log_id)}
    applied = sum(entry["state"] == "applied" for entry in listed.values())
    forgotten, floor = int(log.get("applied", 0)) - applied, int(log.get("floor_seq", 0))
    states: Counter[str] = Counter()
    mismatched = 0
    for entry in local:
        found = listed.pop(entry.txn_id, None)
        state = _state(entry, found, floor)
        states[state] += 1
        forgotten -= found is None and state == "applied"
        mismatched += found is not None and (
            found["digest"] not in (None, entry.digest) or int(found["seq"]) != entry.seq
        )
    # Known there and not in this buffer: an older life of the log, or compacted away.
    states.update(str(entry["state"]) for entry in listed.values())
    states["applied"] += max(0, forgotten)
    acknowledged = max(int(log.get("acknowledged_seq", 0)), last_seq, sum(states.values()))
    lost = states.pop("lost", 0)
    missing = acknowledged - sum(states.values()) - lost
    return LogAudit(
        log_id,
        acknowledged=acknowledged,
        lost=lost + missing,
        duplicated=int(log.get("duplicated", 0)),
        content_mismatch=mismatched,
        **states,
    )


def _state(entry: LogEntry, found: Row | None, floor_seq: int) -> str:
    """Return the state to count: the server's word outranks the buffer's."""
    if found is not None:
        return str(found["state"])
    if entry.state == "applied" and entry.seq > floor_seq:
        return "lost"  # the buffer was told so, yet the server doesn't know it
    return entry.state


def _local_entries(store: LocalStore, log_id: str) -> Iterator[LogEntry]:
    after_seq = 0
    while page := store.entries(log_id=log_id, after_seq=after_seq, limit=PAGE):
        yield from page
        after_seq = page[-1].seq


def _server_entries(remote: Remote, log_id: str) -> Iterator[Row]:
    after_seq = 0
    while True:
        page = remote.audit(log_id, after_seq=after_seq, limit=PAGE).get("entries") or []
        yield from page
        if len(page) < PAGE:
            return
        after_seq = int(page[-1]["seq"])


def _all_clean(store: LocalStore) -> Iterator[list[HeldRow]]:
    after = 0
    while page := store.clean_rows(after=after, limit=ROWS_PER_CALL):
        after = page[-1][0]
        yield [row for _, row in page]


def _pages(rows: Sequence[HeldRow]) -> Iterator[Sequence[HeldRow]]:
    for start in range(0, len(rows), ROWS_PER_CALL):
        yield rows[start : start + ROWS_PER_CALL]


def _compare(remote: Remote, store: LocalStore, held: Sequence[HeldRow]) -> int:
    """Count clean local rows that the server shows differently at the same version.

    A row that somebody else changed since has another version there and is no mismatch; one that is
    missing here or there because of a delete in between is found by the version too.
    """
    mismatches = 0
    for user_id in sorted({row.user_id for row in held}):
        mine = [row for row in held if row.user_id == user_id]
        reads = [TableRead(row.table, {store.tables[row.table].key: row.id}) for row in mine]
        for row, found in zip(mine, remote.read(user_id, reads), strict=True):
            mismatches += _differs(store, row, found[0] if found else None)
    return mismatches


def _differs(store: LocalStore, row: HeldRow, found: Row | None) -> bool:
    spec = store.tables[row.table]
    if row.deleted or found is None:
        # Deleted here and applied: it must be gone. Absent there: deleted by another container.
        return row.deleted and found is not None and found[spec.version] == row.base
    if found[spec.version] != row.base:
        return False
    return any(
        not _same(spec.columns[column].type, value, found.get(column))
        for column, value in row.values.items()
        if spec.writable(column)
    )


def _same(column_type: str, mine: Any, theirs: Any) -> bool:
    """Compare as values: the server writes timestamps and numbers in its own form."""
    if column_type == "timestamp" and mine is not None and theirs is not None:
        return _moment(mine) == _moment(theirs)
    return bool(mine == theirs)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
