"""Sessions as the API's lists show them: JSON that is made once and kept while it stands.

A list of a thousand sessions is some megabytes of JSON, of which next to nothing changed since the
last one. A document is kept with the stamp of the rows it was made of, and made again for another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from local_store import Aggregate, LocalStore, Row, Stamp, Unsettled
from syncer.sessions.aggregate import (
    CURRENT,
    PARTS,
    SESSION_COLUMNS,
    SESSION_VERBATIM,
    Snapshot,
    rows_of,
    snapshot_of,
)
from syncer.sessions.server_reads import versions_in
from syncer.sessions.store_api import RowVersions, SyncInfo
from syncer.sessions.tables import SESSIONS

PLACE = ("id", "created_at", "status")  # what decides whether and where a session is listed
KEPT_BYTES_MAX = 32 * 1024 * 1024  # of JSON: about 12,000 sessions of 2.6 KB


@dataclass(frozen=True, slots=True)
class Document:
    """One session's JSON without its last brace, as of a stamp: its `sync` comes behind.

    `place` has the columns that decide where it is listed.

    `versions` are its rows' as the server is known to have them, None while changes of its author's
    are on their way.
    """

    stamp: Stamp
    text: bytes
    place: Row
    versions: RowVersions | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A session's document and what of it isn't settled."""

    document: Document
    unsettled: Sequence[Unsettled]


class Documents:
    """The documents of all users of a process, the latest used kept. Thread-safe."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Document] = OrderedDict()
        self._bytes = 0

    def look(self, store: LocalStore, user_id: str, session_ids: Sequence[str]) -> dict[str, Shown]:
        """Return by id the documents of those sessions that this user has in the local copy."""
        with self._lock:
            kept = {i: d for i in session_ids if (d := self._kept.get((user_id, i))) is not None}
        known = {row_id: document.stamp for row_id, document in kept.items()}
        found = store.aggregates(SESSIONS, session_ids, user_id=user_id, known=known)
        shown: dict[str, Shown] = {}
        for row_id, aggregate in found.items():
            document = kept.get(row_id) if aggregate.rows is None else _document(aggregate)
            if document is not None:
                shown[row_id] = Shown(document, aggregate.unsettled)
        self._keep({(user_id, row_id): item.document for row_id, item in shown.items()})
        return shown

    def _keep(self, documents: dict[tuple[str, str], Document]) -> None:
        with self._lock:
            for key, document in documents.items():
                before = self._kept.get(key)
                if before is document:
                    self._kept.move_to_end(key)
                    continue
                if before is not None:
                    del self._kept[key]
                self._bytes += len(document.text) - (len(before.text) if before else 0)
                self._kept[key] = document
            while self._bytes > self._bytes_max:
                self._bytes -= len(self._kept.popitem(last=False)[1].text)


def array_of(shown: Sequence[tuple[Document, bytes]]) -> bytes:
    """Return the JSON array of documents, each with its end, which `end_of` made."""
    # One join: each copy of a long list takes a millisecond.
    parts = [part for document, end in shown for part in (b",", document.text, end)]
    return b"".join((b"[", *parts[1:], b"]"))


def end_of(info: SyncInfo) -> bytes:
    """Return what ends a document: where its session stands."""
    return b',"sync":%b}' % orjson.dumps(info.to_dict())


def content_of(session_id: str, snapshot: Snapshot) -> dict[str, Any]:
    """Return what `to_dict` of the snapshot's session returns, without making the session."""
    lists: dict[str, list[Any]] = {
        part.attribute: [child.fields for child in snapshot.children[part.table]] for part in PARTS
    }
    fields = snapshot.fields
    current = fields[CURRENT]
    for part in PARTS:
        for child in snapshot.children[part.table]:
            if child.id == current:
                current = child.fields
    named = (*SESSION_VERBATIM, *SESSION_COLUMNS)
    own = {name: fields[name] for name in named}
    return {"session_id": session_id, **own, **lists, CURRENT: current}


def _document(aggregate: Aggregate) -> Document | None:
    rows = rows_of(aggregate)
    if rows is None:
        return None
    content = content_of(rows.session["id"], snapshot_of(rows))
    versions: RowVersions | None = None
    if not aggregate.has_changes:
        versions = versions_in(rows)
    place = {column: rows.session[column] for column in PLACE}
    return Document(aggregate.stamp, orjson.dumps(content)[:-1], place, versions)
