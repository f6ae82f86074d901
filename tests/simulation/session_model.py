"""The modelled server with what the session schema's triggers derive."""

from __future__ import annotations

from local_store.ops import Row
from syncer.sessions.tables import SESSION_TABLES
from tests.simulation.model_rows import Key, ServerRow
from tests.simulation.remote_model import RemoteModel


class SessionModel(RemoteModel):
    """A session shows the IR and version of the draft that it names."""

    def __init__(self) -> None:
        super().__init__({spec.name: spec for spec in SESSION_TABLES})

    def _shown(self, key: Key, row: ServerRow) -> Row:
        shown = super()._shown(key, row)
        if key[0] == "sessions":
            draft = self.rows.get(("session_drafts", row.values.get("current_draft_id") or ""))
            shown["current_ir"] = None if draft is None else draft.values["ir"]
            shown["current_draft_version"] = 0 if draft is None else draft.values["version"]
        return shown
