"""What a store of sessions promises, and the values it speaks in."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from local_store import Row, TransactionState, user_uuid
from local_store.ops import UNSETTLED, Durability
from syncer.sessions.models import PromptSession, SessionStatus

RowVersions = frozenset[tuple[str, str, str]]
"""(table, id, version) of each row of a session."""
SessionState = Literal["synced", "pending", "held", "conflict", "rejected"]


@dataclass(frozen=True, slots=True)
class SyncInfo:
    """Where a session stands: `synced` only when the server confirmed all of it.

    `durability` is what the least safe part of it survives; `stale` says that the server may have
    a fresher version and couldn't be asked.
    """

    state: SessionState
    pending_transactions: int
    durability: Durability
    stale: bool

    @classmethod
    def of(
        cls, unsettled: Sequence[TransactionState], durability: Durability, *, stale: bool
    ) -> SyncInfo:
        """Sum up the states of a session's transactions that aren't settled; the worst one names.

        What has pending changes is this user's own latest state, so it isn't stale.
        """
        undelivered = sum(state in UNSETTLED for state in unsettled)
        return cls(_worst(unsettled), undelivered, durability, stale and not unsettled)

    def to_dict(self) -> Row:
        """Return the document the API shows."""
        return {
            "state": self.state,
            "pending_transactions": self.pending_transactions,
            "durability": self.durability,
            "stale": self.stale,
        }


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Some sessions, newest first. Unless `complete`, the server may have more of them."""

    sessions: list[PromptSession]
    complete: bool
    next: str | None


@dataclass(frozen=True, slots=True)
class DocumentPage:
    """A page of sessions as a JSON array, each with its `sync`; otherwise as a SessionPage."""

    sessions: bytes
    complete: bool
    next: str | None


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A keyed request: its transaction's id and a fingerprint of what it asks for."""

    txn_id: str
    fingerprint: str

    @classmethod
    def derive(cls, user_id: str, key: str, fingerprint: str) -> RequestKey:
        """Derive the transaction's id from the user and the client's key."""
        name = f"syncer:txn:{user_uuid(user_id)}:{key}"
        return cls(str(uuid.uuid5(uuid.NAMESPACE_URL, name)), fingerprint)

    def row_id(self, table: str, number: int = 0) -> str:
        """Return the id of the request's n-th new row of a table: the same for each repeat.

        They ascend with `number`: rows accepted at one moment are ordered by their ids.
        """
        first = uuid.uuid5(uuid.UUID(self.txn_id), f"{table}:0")
        return str(uuid.UUID(int=first.int + number))


class SessionStore(Protocol):
    """Where sessions live, for one user. Returned objects are copies."""

    @property
    def user_id(self) -> str:
        """The user whose sessions these are, as given."""

    def create(self, session: PromptSession, *, request: RequestKey | None = None) -> str:
        """Store a new session with its history; returns its id."""

    def get(self, session_id: str) -> PromptSession | None:
        """Return the session, or None when there is none; a malformed id names none."""

    def load(self, session_id: str) -> PromptSession | None:
        """Return the session to change it: a copy held at hand is good enough."""

    def update(self, session: PromptSession, *, request: RequestKey | None = None) -> None:
        """Store what the caller changed; raises ConcurrentModificationError, SessionNotFound."""

    def list_active(self) -> list[PromptSession]:
        """Return all active sessions, newest first."""

    def list_all(self) -> list[PromptSession]:
        """Return all sessions, newest first."""

    def list_page(
        self, status: SessionStatus | None = None, limit: int = 50, cursor: str | None = None
    ) -> SessionPage:
        """Return at most `limit` sessions, newest first, from after `cursor` on."""

    def delete(self, session_id: str, *, request: RequestKey | None = None) -> None:
        """Delete the session with its history; nothing happens when there is none."""

    def knows(self, request: RequestKey) -> bool:
        """Tell whether the key was used before, for whatever."""

    def is_repeat(self, request: RequestKey, session: PromptSession | None, known: bool) -> bool:
        """Tell whether `session` carries this request; `known` is from before it was read.

        Raises IdempotencyMismatch when the key was used for anything else.
        """

    def created_by(self, request: RequestKey) -> PromptSession | None:
        """Return the session that this very request created, if it was made before."""


def at_host(seqs: Collection[int]) -> Durability:
    """Return what undelivered transactions survive that are in the buffer and nowhere else."""
    return "host" if seqs else "remote"


def _worst(states: Sequence[TransactionState]) -> SessionState:
    if "conflict" in states:
        return "conflict"
    if "dead" in states:
        return "rejected"
    if "held" in states:
        return "held"
    return "pending" if states else "synced"
