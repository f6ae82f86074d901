"""`syncer serve`: one process with the API, its buffer and its flusher, and its clean end."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from local_store import LocalStore
from syncer.flusher import Flusher, FlushLimits, FlushReport
from syncer.remote import SupabaseRemote
from syncer.service.app import create_app
from syncer.service.health import SyncState
from syncer.service.log_setup import secrets_of, set_up_logging
from syncer.service.metrics import Metrics
from syncer.service.output import told
from syncer.service.scheduler import FlushScheduler
from syncer.service.watch import watching
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings, store_limits

GRACEFUL_S = 12  # for requests in flight; the platform grants 25 to 30 s in all
LAST_PASS_S = 5.0  # for a flush under way; what it doesn't finish stays in the buffer

log = structlog.get_logger("syncer.server")


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; then let requests end, close the gate, close the buffer.

    Raises SettingsError before anything is opened when a needed setting is missing.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    set_up_logging(json=not sys.stderr.isatty(), level=level, secrets=secrets_of(settings))
    counted = Metrics()
    remote = None
    if settings.use_supabase:
        remote = SupabaseRemote.from_settings(settings, on_call=counted.called)
    sync = SyncState(enabled=remote is not None)
    with LocalStore.open(
        settings.data_dir, tables=SESSION_TABLES, **store_limits(settings)
    ) as store:
        app = create_app(settings, store, remote=remote, flusher_state=sync, counted=counted)
        scheduler = _scheduler(store, remote, settings, sync, counted)
        try:
            with watching(settings, store, remote, sync, counted):
                _run(app, settings)
        finally:
            if scheduler is not None and remote is not None:
                _end(scheduler, remote)
    log.info("stopped")


def serve_on_local_supabase(overrides: dict[str, Any]) -> None:
    """Start a local Supabase in .syncer/supabase and serve on it; both end together."""
    from syncer.testkit.local_supabase import LocalSupabase

    told("starting a local Supabase (Postgres, PostgREST, gateway)")
    with LocalSupabase.start(Path(".syncer/supabase").resolve()) as stack:
        env = {name.lower(): value for name, value in stack.env().items()}
        settings = Settings.load(**{**env, **overrides})
        told(f"API on http://{settings.host}:{settings.port}, Supabase on {stack.url}")
        told(f"a token for trying it out:\n{stack.user_token('demo:alice')}")
        serve(settings)


def _scheduler(
    store: LocalStore,
    remote: SupabaseRemote | None,
    settings: Settings,
    sync: SyncState,
    counted: Metrics,
) -> FlushScheduler | None:
    if remote is None or not settings.embedded_flusher:
        return None
    flusher = Flusher(store, remote, limits=FlushLimits.from_settings(settings))

    def on_report(report: FlushReport) -> None:
        sync.record(report)
        counted.flushed(report)

    scheduler = FlushScheduler(
        store, flusher, interval_s=settings.flush_interval_s, on_report=on_report
    )
    scheduler.start()
    return scheduler


def _run(app: Any, settings: Settings) -> None:
    # uvicorn raises the signal it caught once more after it has shut down. The default action would
    # end the process there, before the flusher has stopped; these handlers let it go on.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        log_config=None,  # by the process's own set-up, which takes out what mustn't be written
        timeout_graceful_shutdown=GRACEFUL_S,
    )
    uvicorn.Server(config).run()


def _end(scheduler: FlushScheduler, remote: SupabaseRemote) -> None:
    """Stop the flusher within LAST_PASS_S, then without waiting for the call under way."""
    stopping = threading.Thread(target=scheduler.stop, name="syncer-stop")
    stopping.start()
    stopping.join(LAST_PASS_S)
    while stopping.is_alive():
        remote.give_up_calls()
        stopping.join(0.1)
    remote.close()
