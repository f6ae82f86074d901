"""Positions in a list of sessions: the moment of acceptance and the id of the last one shown."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass

from local_store import Row
from local_store.door import canonical_uuid
from syncer.sessions.aggregate import acceptance_order
from syncer.sessions.errors import InvalidCursor
from syncer.sessions.models import SessionStatus, moment_of

Position = tuple[str, str]
# What the buffer stores: comparable as text, and parsing costs ten times as much.
_STORED_CHARS = 32


def position_of(row: Row) -> Position:
    """Return where a session row stands in the list; positions compare like their rows."""
    moment = str(row.get("created_at"))
    if len(moment) != _STORED_CHARS or not moment.endswith("+00:00"):
        moment = acceptance_order(row)[0].isoformat(timespec="microseconds")
    return moment, str(row["id"])


def cursor_of(row: Row) -> str:
    """Return the cursor that continues after `row`: opaque and safe in a URL."""
    return base64.urlsafe_b64encode("|".join(position_of(row)).encode()).decode().rstrip("=")


def after_cursor(cursor: str | None) -> Position | None:
    """Return the position that a cursor names, None for the start. Raises InvalidCursor."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        moment, _, row_id = base64.b64decode(padded, "-_", validate=True).decode().partition("|")
    except (ValueError, binascii.Error):
        raise InvalidCursor from None
    if moment_of(moment) is None or canonical_uuid(row_id) is None:
        raise InvalidCursor
    return moment, row_id


@dataclass(frozen=True, slots=True)
class Page:
    """Some session rows, newest first, and the cursor of what follows them."""

    rows: list[Row]
    next: str | None


def cut(
    rows: Iterable[Row],
    status: SessionStatus | None,
    limit: int | None,
    after: Position | None,
    known_to: Row | None = None,
) -> Page:
    """Return the page of matching rows, newest first, from after the cursor on.

    What lies behind the row `known_to`, if there is one, isn't known and belongs to a later page.
    """
    end = None if known_to is None else position_of(known_to)
    placed = sorted(
        ((position_of(row), row) for row in rows if status in (None, row["status"])),
        key=lambda item: item[0],
        reverse=True,
    )
    matching = [
        row
        for position, row in placed
        if (after is None or position < after) and (end is None or position >= end)
    ]
    chosen = matching if limit is None else matching[:limit]
    if len(chosen) < len(matching):
        return Page(chosen, cursor_of(chosen[-1]))
    return Page(chosen, None if known_to is None else cursor_of(known_to))
