"""The questions about sessions that a server is asked: a page of them, their versions, all of them.

One read returns at most ROWS_MAX rows. Children are asked for by many sessions at once; an answer
that may have been cut is asked for again by fewer, because a cut list would look as if the rest
had been deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from local_store import Row
from syncer.errors import RemoteUnavailable
from syncer.remote import TableRead, keys_of
from syncer.sessions.aggregate import PARTS, SessionRows, rows_by_session
from syncer.sessions.cursor import Position
from syncer.sessions.models import SessionStatus
from syncer.sessions.store_api import RowVersions
from syncer.sessions.tables import SESSIONS

ROWS_MAX = 1_000  # one read returns no more, but for the row that tells of another page
SESSIONS_PER_READ = 100  # some 300 children in an answer, far from the cap
LISTED = ("id", "created_at", "status", "updated_at")
VERSIONS = ("id", "updated_at")

Ask = Callable[[Sequence[TableRead]], list[list[Row]]]
Versions = Mapping[str, RowVersions]
"""By session; nothing for a session that isn't there."""


class Reads(Protocol):
    """The part of a Remote that reads."""

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read tables as `user_id`; one list of rows per read. Raises SyncError."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some session rows in the order of the list; with `more`, others follow the last one."""

    rows: list[Row]
    more: bool


def page_of(
    status: SessionStatus | None,
    limit: int | None,
    after: Position | None,
    columns: Sequence[str] | None = None,
) -> TableRead:
    """Return the read of a page and of one row more, which tells whether another page follows."""
    return TableRead(
        SESSIONS,
        {} if status is None else {"status": status},
        order_by="created_at",
        descending=True,
        limit=ROWS_MAX if limit is None else limit + 1,
        columns=columns,
        after=None if after is None else {"created_at": after[0], "id": after[1]},
    )


def stretch_of(
    ask: Ask,
    status: SessionStatus | None,
    limit: int | None,
    after: Position | None,
    columns: Sequence[str] | None = None,
) -> Stretch:
    """Return a page of sessions from the server; without a limit, all that follow."""
    [rows] = ask([page_of(status, limit, after, columns)])
    while limit is None and len(rows) % ROWS_MAX == 0 and rows:
        behind = (str(rows[-1]["created_at"]), str(rows[-1]["id"]))
        [more] = ask([page_of(status, limit, behind, columns)])
        if not more:
            break
        rows += more
    return as_stretch(rows, limit)


def as_stretch(rows: list[Row], limit: int | None) -> Stretch:
    """Return what the answer to `page_of` tells."""
    return Stretch(rows if limit is None else rows[:limit], limit is not None and len(rows) > limit)


def digests_of(
    status: SessionStatus | None,
    limit: int | None,
    after: Position | None,
    but: Sequence[str] = (),
) -> list[TableRead]:
    """Return the reads of one digest per table over a page's rows and those of one session more,
    with some sessions left out.
    """
    page = page_of(status, limit, after)
    return [
        replace(page, limit=None if limit is None else page.limit, but=but, digest=True),
        *(
            TableRead(part.table, {"session_id": keys_of(0)}, limit=None, digest=True)
            for part in PARTS
        ),
    ]


def is_digest_of(answers: Sequence[list[Row]] | None, versions: Versions) -> bool:
    """Tell whether the answers to `digests_of` are those of rows that have these versions."""
    if answers is None:
        return False
    lines: dict[str, list[str]] = {SESSIONS: [], **{part.table: [] for part in PARTS}}
    for told in versions.values():
        for table, row_id, version in told:
            lines[table].append(f"{row_id} {version}")
    mine = [hashlib.sha256("\n".join(sorted(of)).encode()).hexdigest() for of in lines.values()]
    return [[{"digest": digest}] for digest in mine] == list(answers)


def versions_of(session_ids: Sequence[str]) -> list[list[TableRead]]:
    """Return by chunk of sessions the reads of their rows' versions; see `told_versions`."""
    return [_reads_of(ids, light=True) for ids in _chunks(session_ids)]


def versions_in(rows: SessionRows) -> RowVersions:
    """Return the versions of a session's rows."""
    return frozenset((table, str(row["id"]), str(row["updated_at"])) for table, row in rows.all())


def told_versions(ask: Ask, session_ids: Sequence[str], answers: Sequence[list[Row]]) -> Versions:
    """Return the versions that the answers to `versions_of` tell; asks again for what was cut."""
    found: dict[str, frozenset[tuple[str, str, str]]] = {}
    for ids, chunk in zip(_chunks(session_ids), _parts(answers), strict=True):
        for rows in _whole(ask, ids, chunk, light=True):
            found[str(rows.session["id"])] = versions_in(rows)
    return found


def whole_sessions(ask: Ask, session_ids: Sequence[str]) -> list[SessionRows]:
    """Return sessions with their children, in the order asked; what isn't there is left out.

    Raises RemoteUnavailable for a session that one read can't return.
    """
    found: list[SessionRows] = []
    for ids in _chunks(session_ids):
        found += _whole(ask, ids, ask(_reads_of(ids)))
    place = {row_id: number for number, row_id in enumerate(session_ids)}
    return sorted(found, key=lambda rows: place[str(rows.session["id"])])


def _whole(
    ask: Ask, ids: Sequence[str], answers: Sequence[list[Row]], light: bool = False
) -> list[SessionRows]:
    sessions, *children = answers
    if all(len(rows) < ROWS_MAX for rows in children):
        tables = {part.table: rows for part, rows in zip(PARTS, children, strict=True)}
        return rows_by_session(sessions, tables)
    if len(ids) == 1:
        raise RemoteUnavailable(
            f"a session has {ROWS_MAX} children or more, which one read can't return",
            hint="it is readable where it was written",
        )
    halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    return [
        rows for half in halves for rows in _whole(ask, half, ask(_reads_of(half, light)), light)
    ]


def _reads_of(session_ids: Sequence[str], light: bool = False) -> list[TableRead]:
    """Return the reads of whole sessions: their rows, then their children by part.

    In this order, so that a draft that a session names is among the drafts read after it.
    """
    ids = list(session_ids)
    return [
        TableRead(SESSIONS, {"id": ids}, limit=ROWS_MAX, columns=VERSIONS if light else None),
        *(
            TableRead(
                part.table,
                {"session_id": ids},
                limit=ROWS_MAX,
                columns=("session_id", *VERSIONS) if light else None,
            )
            for part in PARTS
        ),
    ]


def _chunks(ids: Sequence[str]) -> list[Sequence[str]]:
    return [
        ids[start : start + SESSIONS_PER_READ] for start in range(0, len(ids), SESSIONS_PER_READ)
    ]


def _parts(answers: Sequence[list[Row]]) -> list[Sequence[list[Row]]]:
    width = 1 + len(PARTS)
    return [answers[start : start + width] for start in range(0, len(answers), width)]
