"""Deliver acknowledged writes to Supabase: exactly once in effect, in order, as their author."""

from syncer.errors import (
    NotAuthorized,
    NotSent,
    OutcomeUnknown,
    ProtocolMismatch,
    Refused,
    RemoteUnavailable,
    SettingsError,
    SyncError,
)
from syncer.flusher import Flusher, FlushReport
from syncer.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "FlushReport",
    "Flusher",
    "NotAuthorized",
    "NotSent",
    "OutcomeUnknown",
    "ProtocolMismatch",
    "Refused",
    "RemoteUnavailable",
    "Settings",
    "SettingsError",
    "SyncError",
    "__version__",
]
