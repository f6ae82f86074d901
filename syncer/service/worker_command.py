"""`syncer worker`: deliver until told to stop, a buffer's transactions or a Volume's segments."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from local_store import LocalStore
from local_store.clock import SystemClock
from syncer.errors import NotSent, OutcomeUnknown, SettingsError
from syncer.flusher import Flusher, drain
from syncer.remote import SupabaseRemote
from syncer.service.buffers import DataDir, Json, VolumeDir, given
from syncer.service.output import show_document, show_flush, told
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings, store_limits
from syncer.volume import Volume
from syncer.worker import Worker, WorkReport

EXIT_TROUBLE, EXIT_UNREACHABLE = 1, 3
FLUSH_BUDGET_S = 3_600.0  # a replay of a long outage fits; an endless one is a supervisor's matter
PRUNE_INTERVAL_S = 3_600.0
PASS_INTERVAL_S = 60.0  # as often as a scheduled worker comes
PASS_BUDGET_S = 45.0  # a pass ends before the next one is due


def worker(
    data_dir: DataDir = None,
    volume_dir: VolumeDir = None,
    once: Annotated[
        bool, typer.Option("--once", help="With a Volume: one pass, then end with its result.")
    ] = False,
    json: Json = False,
) -> None:
    """Deliver until told to stop (SIGINT or SIGTERM): a Volume's segments, else a buffer.

    Once an hour the server's ledger is pruned to SYNCER_LEDGER_RETENTION_S.
    """
    settings = Settings.load(**given(data_dir=data_dir, volume_dir=volume_dir))
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    if settings.volume_dir is not None:
        _work(settings, stopping, once, json)
    elif once:
        raise SettingsError(
            "--once", "is for a Volume", hint="name it with --volume-dir, or use `syncer flush`"
        )
    else:
        _deliver(settings, stopping)


def _work(settings: Settings, stopping: threading.Event, once: bool, json: bool) -> None:
    folder, _ = settings.require_volume()
    volume = Volume(folder)
    with tempfile.TemporaryDirectory(prefix="syncer-worker-") as scratch:
        made = Worker.from_settings(volume, SESSION_TABLES, Path(scratch), settings)
        if not json:
            told(f"delivering the segments in {folder} to {settings.supabase_url}")
        while True:
            report = made.work(budget_s=PASS_BUDGET_S)
            _show(report, json)
            if once:
                raise typer.Exit(_exit_of(report))
            if stopping.wait(PASS_INTERVAL_S):
                return


def _deliver(settings: Settings, stopping: threading.Event) -> None:
    with LocalStore.open(
        settings.data_dir, tables=SESSION_TABLES, **store_limits(settings)
    ) as store:
        flusher = flusher_of(store, settings)
        told(f"delivering {settings.data_dir} to {settings.supabase_url}")
        clock, prune_at = SystemClock(), 0.0
        while not stopping.is_set():
            report = drain(
                flusher, clock, budget_s=FLUSH_BUDGET_S, keep_going=lambda: not stopping.is_set()
            )
            if report.sent or report.error:
                show_flush(report, as_json=False)
            if report.stopped == "empty" and clock.monotonic() >= prune_at:
                prune_at = clock.monotonic() + PRUNE_INTERVAL_S
                _prune(settings)
            stopping.wait(max(settings.flush_interval_s, flusher.wait_s()))


def flusher_of(store: LocalStore, settings: Settings) -> Flusher:
    """Build the flusher of a buffer; raises SettingsError naming what keeps it from delivering."""
    if not settings.use_supabase:
        raise SettingsError(
            "USE_SUPABASE",
            "is false, so nothing is delivered",
            hint="set it to true to deliver; the buffer keeps everything meanwhile",
        )
    return Flusher.from_settings(store, settings)


def _prune(settings: Settings) -> None:
    """Let the server forget; another pass does what this one couldn't."""
    try:
        SupabaseRemote.from_settings(settings).prune(settings.ledger_retention_s)
    except (NotSent, OutcomeUnknown) as error:
        print(f"syncer: pruning the ledger: {error}", file=sys.stderr)


def _show(report: WorkReport, json: bool) -> None:
    if json:
        show_document(report.to_json())
        return
    if not report.leased and not report.errors:
        told("another worker is at it")
    if report.adoption is not None:
        found = report.adoption
        told(
            f"{found.segments} segments, {found.adopted} transactions taken in,"
            f" {found.remaining} left, {found.collected} segments done"
        )
        for path in (*found.quarantined, *found.left):
            told(f"set aside or left: {path}")
    for table in report.leaks or ():
        told(f"row-level security lets a stranger see rows of {table}")
    for error in report.errors:
        told(error)


def _exit_of(report: WorkReport) -> int:
    stopped = report.adoption.flush.stopped if report.adoption is not None else "empty"
    if stopped == "outage" or (report.errors and not report.leased):
        return EXIT_UNREACHABLE
    return 0 if report.ok else EXIT_TROUBLE
