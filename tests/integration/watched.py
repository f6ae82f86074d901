"""A whole API as `serve` wires it, on a real Supabase behind a fault proxy, with its metrics.

The buffer's time is moved by hand, and with it the time of the scrapes; calls take real time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from local_store import Insert, LocalStore, TableSpec, Update
from local_store.clock import ManualClock, new_id
from syncer.flusher import Flusher, FlushReport
from syncer.remote import SupabaseRemote
from syncer.service.app import create_app
from syncer.service.health import SyncState
from syncer.service.metrics import Metrics
from syncer.service.watch import Watch
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from tests.promql import Scrapes

USER = "github:42"
STEP_S = 30.0


def _loosened(spec: TableSpec) -> TableSpec:
    """The table as older code knew it: any status passes the door, the server refuses some."""
    columns = dict(spec.columns)
    if "status" in columns:
        columns["status"] = replace(columns["status"], enum=None)
    return replace(spec, columns=columns, policy="merge")


class Watched:
    """The API, its flusher and its watch, each moved by hand."""

    def __init__(self, folder: Path, supabase: Any, proxy: Any, **settings: Any) -> None:
        env = {name.lower(): value for name, value in supabase.env().items()}
        given = {**env, "supabase_url": proxy.url, "data_dir": folder, **settings}
        self.settings = Settings.load(**given)
        self.supabase, self.proxy = supabase, proxy
        self.clock = ManualClock()
        self.counted, self.sync = Metrics(), SyncState(clock=self.clock)
        self.scrapes, self.at_s = Scrapes(), 0.0
        self.store = self._opened()
        self.use_key(supabase.secret_key)
        self.app = create_app(
            self.settings,
            self.store,
            remote=self.remote,
            flusher_state=self.sync,
            counted=self.counted,
        )
        token = supabase.user_token(USER)
        headers = {"Authorization": f"Bearer {token}"}
        self.client = TestClient(self.app, raise_server_exceptions=False, headers=headers)

    def _opened(self) -> LocalStore:
        return LocalStore.open(
            self.settings.data_dir,
            tables=[_loosened(spec) for spec in SESSION_TABLES],
            clock=self.clock,
            buffer_bytes_max=self.settings.buffer_bytes_max,
            buffer_transactions_max=self.settings.buffer_transactions_max,
        )

    def use_key(self, key: str) -> None:
        """Speak to Supabase with this key from now on."""
        self.remote = SupabaseRemote(self.proxy.url, key, on_call=self.counted.called)
        self.flusher = Flusher(self.store, self.remote, clock=self.clock, jitter=lambda: 0.0)
        self.watch = Watch(
            self.settings, self.store, self.remote, self.sync, self.counted, self.clock
        )

    def close(self) -> None:
        self.proxy.clear()
        self.store.close()
        self.remote.close()

    def insert(self, **values: Any) -> str:
        row_id = new_id()
        self.store.write([Insert("sessions", {"id": row_id, **values})], user_id=USER)
        return row_id

    def update(self, row_id: str, **values: Any) -> None:
        self.store.write([Update("sessions", row_id, values)], user_id=USER)

    def flush(self) -> FlushReport:
        report = self.flusher.flush_once()
        self.sync.record(report)
        self.counted.flushed(report)
        return report

    def scrape(self, times: int = 1) -> None:
        """Scrape now, and again each STEP_S."""
        for _ in range(times):
            text = self.client.get("/metrics").text
            self.scrapes.add(self.at_s, text)
            self.at_s += STEP_S
            self.clock.advance(STEP_S)

    @property
    def last_s(self) -> float:
        """When it was scraped last."""
        return self.at_s - STEP_S


@contextmanager
def watched(folder: Path, supabase: Any, proxy: Any, **settings: Any) -> Iterator[Watched]:
    """Have one inside the block."""
    made = Watched(folder, supabase, proxy, **settings)
    try:
        with made.client:
            yield made
    finally:
        made.close()


def series_of(scrapes: Scrapes) -> Sequence[tuple[str, list[float | None]]]:
    """Return each scraped series as Prometheus writes its name, with a value or None per scrape."""
    times = sorted(scrapes.by_time)
    names = {labels for vector in scrapes.by_time.values() for labels in vector}
    found = []
    for labels in names:
        known = dict(labels)
        name = known.pop("__name__")
        inside = ",".join(f'{key}="{value}"' for key, value in sorted(known.items()))
        found.append((f"{name}{{{inside}}}", [scrapes.by_time[at].get(labels) for at in times]))
    return sorted(found)
