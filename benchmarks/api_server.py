"""The API as a process for benchmarks/api.py: on the buffer, or straight on Supabase.

python -m benchmarks.api_server buffered|supabase
"""

from __future__ import annotations

import sys
from typing import Any

import orjson
import uvicorn

from syncer.remote import SupabaseRemote
from syncer.service.runtime import Runtime
from syncer.service.server import set_up_logging_of, tune_interpreter
from syncer.sessions import PromptSession, SupabaseSessionStore
from syncer.sessions.models import SessionStatus
from syncer.sessions.store_api import DocumentPage, SyncInfo
from syncer.settings import Settings


class DirectSessions(SupabaseSessionStore):
    """The store without a buffer, with what the routes ask besides: all of it is the server's."""

    last_receipt = None
    last_sync = SyncInfo("synced", 0, "remote", stale=False)

    def sync_info(self, session: PromptSession) -> SyncInfo:
        """Return that nothing waits."""
        return self.last_sync

    def get_document(self, session_id: str) -> bytes | None:
        """Return a session as the routes send it."""
        session = self.get(session_id)
        return None if session is None else orjson.dumps(self._document(session))

    def list_documents(
        self, status: SessionStatus | None, limit: int, cursor: str | None
    ) -> DocumentPage:
        """Return a page as the routes send it."""
        page = self.list_page(status, limit, cursor)
        shown = [self._document(session) for session in page.sessions]
        return DocumentPage(orjson.dumps(shown), page.complete, page.next)

    def _document(self, session: PromptSession) -> dict[str, Any]:
        return {**session.to_dict(), "sync": self.last_sync.to_dict()}


def main() -> None:
    """Serve until a signal."""
    settings = Settings.load()
    set_up_logging_of(settings)
    runtime = Runtime.start(settings)
    tune_interpreter()
    if sys.argv[1] == "supabase":
        remote, stores = SupabaseRemote.from_settings(settings), {}

        def sessions_of(user_id: str) -> DirectSessions:
            if user_id not in stores:
                stores[user_id] = DirectSessions(remote, user_id)
            return stores[user_id]

        runtime.app.state.sessions_of = sessions_of
    uvicorn.run(
        runtime.app,
        host=settings.host,
        port=settings.port,
        log_level="critical",
        access_log=False,
        log_config=None,
    )


if __name__ == "__main__":
    main()
