"""Positions in a list of sessions: the moment of acceptance and the id of the last one shown."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from local_store import Row
from syncer.sessions.aggregate import acceptance_order
from syncer.sessions.errors import InvalidCursor
from syncer.sessions.models import SessionStatus

Position = tuple[str, str]


def position_of(row: Row) -> Position:
    """Return where a session row stands in the list; positions compare like their rows."""
    moment, row_id = acceptance_order(row)
    return moment.isoformat(timespec="microseconds"), row_id


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
    if not moment or not row_id:
        raise InvalidCursor
    return moment, row_id


@dataclass(frozen=True, slots=True)
class Page:
    """Some session rows, newest first, and the cursor of what follows them."""

    rows: list[Row]
    next: str | None


def cut(
    rows: list[Row], status: SessionStatus | None, limit: int | None, after: Position | None
) -> Page:
    """Return the page of matching rows, newest first, from after the cursor on."""
    matching = [
        row
        for row in sorted(rows, key=acceptance_order, reverse=True)
        if status in (None, row["status"]) and (after is None or position_of(row) < after)
    ]
    chosen = matching if limit is None else matching[:limit]
    more = len(chosen) < len(matching)
    return Page(chosen, cursor_of(chosen[-1]) if more else None)
