"""Prompt-refinement sessions as the application sees them: mutable, made of plain JSON values.

Timestamps are the client's strings and stay as they are, whatever their form (`Z`, `+00:00`, even
`+00:00Z`): nothing here rewrites them. An IR is an opaque JSON object but for its lists named
`holes`, whose items carry an `identifier`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from local_store.clock import SystemClock, isoformat, new_id

SessionStatus = Literal["active", "finalized", "abandoned"]
SessionSource = Literal["prompt", "reverse_mode"]
RevisionType = Literal["initial", "hole_fill", "constraint_add", "manual_edit"]
ValidationStatus = Literal["pending", "valid", "contradictory", "incomplete"]
ResolutionType = Literal["clarify_intent", "add_constraint", "refine_signature", "specify_effect"]


def timestamp_now() -> str:
    """Return the wall time as sessions write it: ISO 8601, UTC, microseconds, `+00:00`."""
    return isoformat(SystemClock().now())


def moment_of(timestamp: object) -> datetime | None:
    """Read a client's timestamp leniently; None when it names no moment.

    `…+00:00Z`, which `isoformat() + "Z"` makes of an aware datetime, counts as UTC; so does a
    timestamp without an offset.
    """
    if not isinstance(timestamp, str):
        return None
    text = timestamp
    if text.endswith("Z") and "+" in text:
        text = text[:-1]
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def hole_ids(ir: Mapping[str, Any]) -> list[str]:
    """Return the identifiers of the holes left in `ir`, each once, in document order."""
    return list(dict.fromkeys(_walk_holes(ir)))


def _walk_holes(ir: Mapping[str, Any]) -> Iterator[str]:
    # A stack instead of recursion: how deep a client's document goes must not matter here.
    stack: list[Any] = [ir]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            holes = node.get("holes")
            for hole in holes if isinstance(holes, list) else ():
                identifier = hole.get("identifier") if isinstance(hole, Mapping) else hole
                if isinstance(identifier, str):
                    yield identifier
            stack.extend(value for key, value in reversed(node.items()) if key != "holes")
        elif isinstance(node, list):
            stack.extend(reversed(node))


class _Document(BaseModel):
    # A validation error must not print what a user wrote.
    model_config = ConfigDict(hide_input_in_errors=True)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, copied."""
        return self.model_dump(warnings=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s result; unknown keys are ignored."""
        return cls.model_validate(dict(data))


class PromptRevision(_Document):
    """One thing a user said while refining."""

    timestamp: str = Field(default_factory=timestamp_now)
    content: str
    revision_type: RevisionType
    target_hole: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class IRDraft(_Document):
    """One version of the IR. Versions may repeat: rolling back and refilling are ordinary."""

    version: int
    ir: dict[str, Any]
    validation_status: ValidationStatus = "pending"
    smt_results: list[dict[str, Any]] = Field(default_factory=list)
    ambiguities: list[str] = Field(default_factory=list)
    created_at: str = Field(default_factory=timestamp_now)
    metadata: dict[str, Any] = Field(default_factory=dict)

    def get_unresolved_holes(self) -> list[str]:
        """Return the open holes: those named as ambiguities first, then others found in the IR.

        The ambiguities' order is the translator's; the IR's own may have changed on its way,
        because jsonb reorders the keys of objects.
        """
        return list(dict.fromkeys([*self.ambiguities, *hole_ids(self.ir)]))


class HoleResolution(_Document):
    """A user's answer to one hole. A hole may be answered more than once."""

    hole_id: str
    resolution_text: str
    resolution_type: ResolutionType = "clarify_intent"
    applied: bool = False
    timestamp: str = Field(default_factory=timestamp_now)
    metadata: dict[str, Any] = Field(default_factory=dict)


class PromptSession(_Document):
    """A prompt-refinement session with its whole history.

    Each changing method also moves `updated_at`. Two sessions are equal when their fields are;
    what a store remembers about the copy it handed out doesn't count.
    """

    session_id: str
    user_id: str | None = None
    created_at: str = Field(default_factory=timestamp_now)
    updated_at: str = Field(default_factory=timestamp_now)
    status: SessionStatus = "active"
    source: SessionSource = "prompt"
    revisions: list[PromptRevision] = Field(default_factory=list)
    ir_drafts: list[IRDraft] = Field(default_factory=list)
    current_draft: IRDraft | None = None
    pending_resolutions: list[HoleResolution] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)

    # What the store read or wrote last for this very object: the base of its next update. It
    # travels with copies, so that a stale copy is known to be stale.
    _base: Any = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptSession) and self.to_dict() == other.to_dict()

    @classmethod
    def create_new(
        cls,
        source: SessionSource = "prompt",
        initial_draft: IRDraft | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return a new active session with a fresh UUIDv7; `initial_draft` becomes the current."""
        now = timestamp_now()
        session = cls(
            session_id=new_id(),
            created_at=now,
            updated_at=now,
            source=source,
            metadata=dict(metadata or {}),
        )
        if initial_draft is not None:
            session.ir_drafts.append(initial_draft)
            session.current_draft = initial_draft
        return session

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s result; `current_draft` is again one of `ir_drafts` if equal."""
        session = super().from_dict(data)
        for draft in session.ir_drafts:
            if draft == session.current_draft:
                session.current_draft = draft
        return session

    def add_revision(self, revision: PromptRevision) -> None:
        """Append to the history."""
        self.revisions.append(revision)
        self._touch()

    def add_draft(self, draft: IRDraft) -> None:
        """Append a draft and make it the current one."""
        self.ir_drafts.append(draft)
        self.current_draft = draft
        self._touch()

    def add_resolution(self, resolution: HoleResolution) -> None:
        """Append an answer to a hole, applied or not."""
        self.pending_resolutions.append(resolution)
        self._touch()

    def mark_resolution_applied(self, hole_id: str) -> None:
        """Mark the oldest answer to `hole_id` that isn't applied yet; nothing if there is none."""
        for resolution in self.pending_resolutions:
            if resolution.hole_id == hole_id and not resolution.applied:
                resolution.applied = True
                self._touch()
                return

    def finalize(self) -> None:
        """Declare the session done."""
        self.status = "finalized"
        self._touch()

    def abandon(self) -> None:
        """Declare the session given up."""
        self.status = "abandoned"
        self._touch()

    def get_unresolved_holes(self) -> list[str]:
        """Return the holes of the current draft that no applied answer has filled.

        An answer older than the current draft doesn't count: a draft made later that still has
        the hole, by a rollback for instance, has opened it again.
        """
        draft = self.current_draft
        if draft is None:
            return []
        made = moment_of(draft.created_at)
        filled = {
            answer.hole_id
            for answer in self.pending_resolutions
            if answer.applied and not _is_before(moment_of(answer.timestamp), made)
        }
        return [hole for hole in draft.get_unresolved_holes() if hole not in filled]

    def _touch(self) -> None:
        self.updated_at = timestamp_now()


def _is_before(moment: datetime | None, other: datetime | None) -> bool:
    return moment is not None and other is not None and moment < other


def draft_of(ir: dict[str, Any], version: int) -> IRDraft:
    """Return a draft of an IR: incomplete while it has holes, which it names."""
    holes = hole_ids(ir)
    status: ValidationStatus = "incomplete" if holes else "pending"
    return IRDraft(version=version, ir=ir, validation_status=status, ambiguities=holes)
