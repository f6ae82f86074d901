"""What containers know of the server's rows, told to the history as they learn it."""

from __future__ import annotations

from collections.abc import Callable

from local_store import LocalStore
from syncer.testkit.history import History
from tests.simulation.machine import Container
from tests.simulation.remote_model import RemoteModel


class Knowledge:
    """Looks at the containers' local copies after each reply and after each crash."""

    def __init__(self, server: RemoteModel, history: History, step: Callable[[str], None]) -> None:
        self._server, self._history, self._step = server, history, step

    def note(self, container: Container) -> None:
        """Record what this container knows of the server now, if it was told anything."""
        store, line = container.store, container.line
        told, line.told_rows = line.told_rows, False
        if not told:
            return
        log_id = store.log_id
        for _, row in store.clean_rows(limit=-1):
            version = self._server.version(row.table, row.id)
            if version is not None and row.base == version:
                self._history.saw(log_id, row.table, row.id, version)
        for name, shown in line.told.items():
            table, _, row_id = name.partition("/")
            version = self._server.version(table, row_id)
            # What is pending on a row was merged with what a reply showed, once it stands on that.
            if version is None or version != shown.get("updated_at"):
                continue
            if version == base_of(store, table, row_id):
                self._history.saw(log_id, table, row_id, version)

    def after_crash(self, container: Container) -> None:
        """Record what a container that has risen still knows."""
        if container.disk is not None and container.disk.power_lost:
            self._step("power lost")
            self._forget(container)
        self.note(container)

    def _forget(self, container: Container) -> None:
        store, events = container.store, self._history.events()
        log_id = store.log_id
        durable = [c.end for c in events.calls if c.told == "ok" and c.log_id == log_id]
        durable += [
            c.begin
            for c in events.calls
            if c.told == "unknown" and store.state(c.txn_id) is not None
        ]
        # What came before the last write that is there was synced with it.
        self._history.forgot(log_id, since=max(durable, default=0.0))
        known = {(s.table, s.id, s.version) for s in events.seen if s.log_id == log_id}
        for _, row in store.clean_rows(limit=-1):
            if (row.table, row.id, row.base) in known:
                self._history.saw(log_id, row.table, row.id, row.base)


def base_of(store: LocalStore, table: str, row_id: str) -> str | None:
    """Return the server's version that a row stands on here, whether changes are pending or not."""
    asked = "SELECT base FROM rows WHERE tbl = ? AND id = ?"
    found = store._file.read(lambda c: c.execute(asked, (table, row_id)).fetchone())
    return found[0] if found else None
