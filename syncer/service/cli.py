"""The `syncer` command.

With `--json` each command prints one document on stdout; logs and progress go to stderr. Exit
codes: 0 good, 1 found trouble, 2 usage or settings, 3 Supabase unreachable.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from local_store import LocalStoreError
from local_store.clock import SystemClock
from syncer.audit import audit as run_audit
from syncer.errors import NotSent, OutcomeUnknown, SettingsError, SyncError
from syncer.flusher import FlushReport, drain
from syncer.remote import SupabaseRemote
from syncer.service.bench_commands import bench_app
from syncer.service.buffers import (
    DataDir,
    Json,
    existing_store,
    given,
    holds_buffer,
    settings_for,
)
from syncer.service.log_setup import log_uncaught, set_up_logging
from syncer.service.operator_commands import conflicts_app, dead_letters_app
from syncer.service.output import show_audit, show_document, show_flush, show_status, told
from syncer.service.recovery_commands import backup, doctor, replay
from syncer.service.supabase_commands import supabase_app
from syncer.service.worker_command import FLUSH_BUDGET_S, flusher_of, worker
from syncer.settings import Settings

EXIT_TROUBLE, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

app = typer.Typer(
    name="syncer",
    help="A durable local write buffer that delivers to Supabase exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(supabase_app, name="supabase")
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(conflicts_app, name="conflicts")
app.add_typer(bench_app, name="bench")
app.command()(replay)
app.command()(backup)
app.command()(worker)
app.command()(doctor)


def main() -> None:
    """Run the command line; every expected error becomes one line on stderr and an exit code."""
    set_up_logging(json=not sys.stderr.isatty())
    log_uncaught()
    try:
        app()
    except SettingsError as error:
        _fail(error, EXIT_USAGE)
    except (NotSent, OutcomeUnknown) as error:
        _fail(error, EXIT_UNREACHABLE)
    except (SyncError, LocalStoreError) as error:
        _fail(error, EXIT_TROUBLE)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"syncer: {error}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    sessions: Annotated[int, typer.Option(min=10, max=100_000, help="Sessions to play.")] = 150,
    outage_seconds: Annotated[float, typer.Option(min=1, max=3600, help="Its length, s.")] = 8.0,
    seed: Annotated[int, typer.Option(help="The same seed plays the same traffic.")] = 7,
    keep: Annotated[Path | None, typer.Option(help="Keep all files in this folder.")] = None,
    json: Json = False,
) -> None:
    """Play an outage on real parts: local Supabase, the API, a kill, a recovery, a proof."""
    from syncer.service.demo import play

    raise typer.Exit(play(sessions, outage_seconds, seed, keep, json))


@app.command()
def serve(
    local: Annotated[
        bool, typer.Option("--local", help="Start a local Supabase and serve on it.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to bind [SYNCER_HOST].")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port to bind [SYNCER_PORT].")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Serve the HTTP API on a durable buffer, with the flusher inside."""
    from syncer.service.server import serve as run_server
    from syncer.service.server import serve_on_local_supabase

    overrides = given(host=host, port=port, data_dir=data_dir)
    if local:
        serve_on_local_supabase(overrides)
    else:
        run_server(Settings.load(**overrides))


@app.command()
def flush(data_dir: DataDir = None, json: Json = False) -> None:
    """Deliver what is pending in a buffer until it is empty or Supabase fails."""
    settings = settings_for(data_dir)
    with existing_store(settings) as store:
        flusher = flusher_of(store, settings)
        report = drain(flusher, SystemClock(), budget_s=FLUSH_BUDGET_S)
    show_flush(report, json)
    raise typer.Exit(_flush_exit(report))


@app.command()
def status(data_dir: DataDir = None, json: Json = False) -> None:
    """Show what waits in a buffer, and whether Supabase answers."""
    settings = settings_for(data_dir)
    with existing_store(settings) as store:
        logs = store.logs()
    supabase = _reachable(settings)
    # The flushers keep their breakers to themselves; this is what a flush from here would meet.
    breaker = "closed" if supabase == "up" else "open"
    document = {"supabase": supabase, "breaker": breaker, "logs": logs}
    show_status(document, json)
    raise typer.Exit(EXIT_TROUBLE if any(log["parked"] for log in logs) else 0)


@app.command()
def audit(data_dir: DataDir = None, json: Json = False) -> None:
    """Prove that every acknowledged transaction is in exactly one state."""
    settings = settings_for(data_dir)
    remote = SupabaseRemote.from_settings(settings)
    if data_dir is None and not holds_buffer(settings.data_dir):
        report = run_audit(remote)
    else:
        with existing_store(settings) as store:
            report = run_audit(remote, store)
    show_audit(report, json)
    raise typer.Exit(0 if report.balanced else EXIT_TROUBLE)


@app.command()
def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name what would run.")] = False,
    json: Json = False,
) -> None:
    """Apply the SQL migrations to DATABASE_URL; running it twice is harmless."""
    from syncer.migrate import migrate as run_migrations

    settings = Settings.load()
    if settings.database_url is None:
        raise SettingsError(
            "DATABASE_URL", "is not set", hint="find it under Connect in the project's dashboard"
        )
    names = run_migrations(settings.database_url.get_secret_value(), dry_run=dry_run)
    if json:
        show_document({"applied": [] if dry_run else names, "pending": names if dry_run else []})
    else:
        verb = "would apply" if dry_run else "applied"
        told("\n".join(f"{verb} {name}" for name in names) or "nothing to apply")


def _reachable(settings: Settings) -> str:
    if not settings.use_supabase:
        return "off"
    try:
        SupabaseRemote.from_settings(settings).audit()
    except (NotSent, OutcomeUnknown):
        return "down"
    return "up"


def _flush_exit(report: FlushReport) -> int:
    if report.stopped == "outage":
        return EXIT_UNREACHABLE
    trouble = report.conflict or report.rejected or report.fenced or report.stopped != "empty"
    return EXIT_TROUBLE if trouble else 0
