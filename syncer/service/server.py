"""`syncer serve`: one process with the API, its buffer and its flusher, and its clean end."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import uvicorn

from syncer.service.log_setup import secrets_of, set_up_logging
from syncer.service.output import told
from syncer.service.runtime import Runtime
from syncer.settings import Settings

SWITCH_INTERVAL_S = 0.0005
GRACEFUL_S = 8  # for requests in flight; runtime.py has the other parts of a shutdown's 25 s


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; then end requests, close the gate, ship, flush, close.

    Raises SettingsError before anything is opened when a needed setting is missing.
    """
    set_up_logging_of(settings)
    runtime = Runtime.start(settings)
    tune_interpreter()
    try:
        _run(runtime.app, settings)
    finally:
        runtime.stop()


def tune_interpreter() -> None:
    """Set Python up for many short requests beside a flusher (benchmarks/RESULTS.md).

    A thread that computes is interrupted after 0.5 ms instead of 5: a write changes threads some
    ten times until it is answered. And the garbage collector is spared what lives as long as the
    process: looking through all imported modules stops every thread for 100 ms, once in twenty
    requests.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


def set_up_logging_of(settings: Settings) -> None:
    """Log as the settings say, without the secrets that they hold."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    set_up_logging(json=not sys.stderr.isatty(), level=level, secrets=secrets_of(settings))


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
