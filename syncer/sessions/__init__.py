"""Prompt-refinement sessions: the first domain on the buffer.

store = open_session_store("github:42")
session = PromptSession.create_new(metadata={"client": "cli"})
store.create(session)
"""

from __future__ import annotations

from pathlib import Path

from local_store import LocalStore
from syncer.remote import SupabaseRemote
from syncer.sessions.errors import (
    ConcurrentModificationError,
    DraftNotFound,
    IdempotencyMismatch,
    InvalidCursor,
    SessionNotFound,
)
from syncer.sessions.guarded_reads import GuardedReads
from syncer.sessions.manager import SpecSessionManager
from syncer.sessions.memory_store import InMemorySessionStore, MemoryRows
from syncer.sessions.models import HoleResolution, IRDraft, PromptRevision, PromptSession
from syncer.sessions.session_store import BufferedSessionStore
from syncer.sessions.store_api import RequestKey, SessionPage, SessionStore, SyncInfo
from syncer.sessions.supabase_store import SupabaseSessionStore
from syncer.sessions.tables import SESSION_TABLES
from syncer.sessions.translate import SketchTranslator, Translator
from syncer.settings import Settings, store_limits

__all__ = [
    "SESSION_TABLES",
    "BufferedSessionStore",
    "ConcurrentModificationError",
    "DraftNotFound",
    "GuardedReads",
    "HoleResolution",
    "IRDraft",
    "IdempotencyMismatch",
    "InMemorySessionStore",
    "InvalidCursor",
    "MemoryRows",
    "PromptRevision",
    "PromptSession",
    "RequestKey",
    "SessionNotFound",
    "SessionPage",
    "SessionStore",
    "SketchTranslator",
    "SpecSessionManager",
    "SupabaseSessionStore",
    "SyncInfo",
    "Translator",
    "open_session_store",
]


def open_session_store(
    user_id: str, data_dir: str | Path | None = None, settings: Settings | None = None
) -> BufferedSessionStore:
    """Open one user's sessions on the buffer in `data_dir`; `close` it when done.

    Starts no thread and no flusher: `syncer worker` or `Flusher` delivers what is written. With a
    project configured reads go through to it; without one the local copy is all there is.
    """
    settings = settings or Settings.load()
    local = LocalStore.open(
        settings.data_dir if data_dir is None else data_dir,
        tables=SESSION_TABLES,
        **store_limits(settings),
    )
    reads = guarded_reads(settings)
    return BufferedSessionStore(
        local,
        user_id,
        reads,
        lambda: reads is not None and reads.usable(),
        settings.read_through_ms / 1_000,
        owns_store=True,
    )


def guarded_reads(settings: Settings) -> GuardedReads | None:
    """Return the reads of the configured project, None when there is no project to ask.

    A project that is switched off or whose key isn't here can't be asked, which is another thing:
    what isn't held locally is then unknown.
    """
    if settings.supabase_url is None:
        return None
    remote = None
    if settings.use_supabase and settings.supabase_secret_key is not None:
        remote = SupabaseRemote.from_settings(settings)
    return GuardedReads(remote, interval_s=settings.breaker_interval_s)
