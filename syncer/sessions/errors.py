"""What can go wrong with a session; an id that can't be asked for is RemoteUnavailable instead."""

from __future__ import annotations

from collections.abc import Sequence


class SessionNotFound(KeyError):
    """The session is known not to exist for this user."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id} not found")
        self.session_id = session_id

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class ConcurrentModificationError(Exception):
    """Somebody changed the same fields since the caller read them. Nothing was written."""

    def __init__(self, session_id: str, fields: Sequence[str]) -> None:
        super().__init__(
            f"session {session_id} changed since it was read ({', '.join(fields)}); read it again"
        )
        self.session_id = session_id
        self.fields = tuple(fields)


class IdempotencyMismatch(Exception):
    """The idempotency key was used before for another request. Nothing was written."""

    def __init__(self) -> None:
        super().__init__("the idempotency key was used before for another request; use a new key")


class DraftNotFound(LookupError):
    """The session has no draft of that version."""

    def __init__(self, session_id: str, version: int) -> None:
        super().__init__(f"session {session_id} has no draft of version {version}")
        self.session_id = session_id
        self.version = version


class InvalidCursor(ValueError):
    """The cursor of a list isn't one that was handed out."""

    def __init__(self) -> None:
        super().__init__("isn't a cursor that a list returned")
