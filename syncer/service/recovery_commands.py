"""`syncer replay` and `syncer doctor`: what is run after an outage, and before one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from local_store import LocalStore
from local_store.clock import SystemClock
from local_store.ops import Selection
from syncer import operators
from syncer.doctor import examine
from syncer.errors import SettingsError
from syncer.flusher import Flusher, FlushLimits
from syncer.remote import SupabaseRemote
from syncer.replay import Difference, ReplayReport, differences
from syncer.replay import replay as run_replay
from syncer.service.buffers import DataDir, Json, existing_store, given, moment, settings_for
from syncer.service.output import show_doctor, show_document, told
from syncer.service.volume_replay import opened_volume
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from syncer.volume import Volume

EXIT_TROUBLE, EXIT_UNREACHABLE = 1, 3
DEFAULT_DATA_DIR: Path = Settings.model_fields["data_dir"].default


def replay(
    data_dir: DataDir = None,
    volume_dir: Annotated[
        Path | None,
        typer.Option("--volume-dir", help="Deliver this Volume's segments instead of a buffer."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only what was accepted at or after this ISO 8601 time.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only what was accepted before it.")] = None,
    table: Annotated[str | None, typer.Option(help="Only what touches this table.")] = None,
    user: Annotated[str | None, typer.Option(help="Only this author's.")] = None,
    settled: Annotated[
        bool, typer.Option("--settled", help="Send what was confirmed again too.")
    ] = False,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Retry this buffer's dead letters first.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would change, against live rows.")
    ] = False,
    json: Json = False,
) -> None:
    """Deliver everything undelivered in a buffer, or on a Volume, until it is empty."""
    if dry_run and (settled or dead_letters):
        raise typer.BadParameter("--dry-run shows what is undelivered; leave the other option out")
    if volume_dir is not None and data_dir is not None:
        raise typer.BadParameter("replay a buffer or a Volume; run it twice for both")
    settings = Settings.load(**given(data_dir=data_dir, volume_dir=volume_dir))
    selection = Selection(moment("--since", since), moment("--until", until), table, user)
    if volume_dir is not None:
        volume = Volume(settings.require_volume()[0])
        with opened_volume(settings, volume) as found:
            if dry_run:
                _show_differences(found.differences(selection), json)
                return
            report = found.replay(selection, settled=settled, dead_letters=dead_letters)
        _show(report, json)
        raise typer.Exit(_exit_of(report))
    remote = SupabaseRemote.from_settings(settings)
    with existing_store(settings) as store:
        if dry_run:
            _show_differences(list(differences(store, remote, selection)), json)
            return
        retried = _retry_dead_letters(store, remote) if dead_letters else Counter[str]()
        flusher = Flusher(
            store, remote, limits=FlushLimits.from_settings(settings), selection=selection
        )
        report = _run(store, flusher, selection, settled)
    # The flusher doesn't count what was parked before; refused once more, it is trouble again.
    report = replace(
        report,
        rejected=report.rejected + retried["rejected"],
        conflict=report.conflict + retried["conflict"],
    )
    _show(report, json)
    raise typer.Exit(_exit_of(report))


def backup(
    target: Annotated[Path, typer.Argument(help="The new file; it must not exist yet.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Copy the buffer, consistently and while it is in use, to one file."""
    settings = settings_for(data_dir)
    with existing_store(settings) as store:
        try:
            store.backup(target)
        except OSError as error:
            reason = f"{target}: {error.strerror}"
            raise SettingsError("TARGET", reason, hint="name a new file") from None
        pending = store.stats()["pending"]
    if json:
        show_document({"target": str(target), "bytes": target.stat().st_size, "pending": pending})
    else:
        told(f"copied to {target}: {target.stat().st_size:,} bytes, {pending:,} undelivered")


def _exit_of(report: ReplayReport) -> int:
    if report.complete:
        return 0
    return EXIT_TROUBLE if report.reachable else EXIT_UNREACHABLE


def _run(store: LocalStore, flusher: Flusher, selection: Selection, settled: bool) -> ReplayReport:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("delivering", total=None)

        def show(remaining: int) -> None:
            progress.update(task, description=f"{remaining} left")

        return run_replay(
            store, flusher, selection, SystemClock(), settled=settled, on_progress=show
        )


def _retry_dead_letters(store: LocalStore, remote: SupabaseRemote) -> Counter[str]:
    """Try again what this buffer's logs have parked as dead; returns the verdicts' counts."""
    verdicts: Counter[str] = Counter()
    for log in store.logs():
        found = operators.dead_letters(remote, log_id=log["log_id"])
        dead = [letter["txn_id"] for letter in found if letter["state"] == "dead"]
        verdicts.update(result["verdict"] for result in operators.retry(remote, dead))
        store.recheck([letter["txn_id"] for letter in found])
    return verdicts


def _show(report: ReplayReport, json: bool) -> None:
    document = report.to_json()
    if json:
        show_document(document)
        return
    told(", ".join(f"{count} {name}" for name, count in document.items()))
    if report.error:
        told(report.error)


def _show_differences(found: list[Difference], json: bool) -> None:
    if json:
        show_document([difference.to_json() for difference in found])
        return
    for difference in found:
        there = "" if difference.live else " (no such row yet)"
        told(f"{difference.seq}  {difference.kind} {difference.table}/{difference.id}{there}")
        for column, (live, mine) in sorted(difference.columns.items()):
            told(f"    {column}: {_short(live)} → {_short(mine)}")
    told(f"{len(found)} changes would be sent; nothing was")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """Check settings, disk and server; each failed check names its remedy."""
    settings: Settings | SettingsError
    remote: SupabaseRemote | None = None
    folder = data_dir or DEFAULT_DATA_DIR
    try:
        settings = settings_for(data_dir)
        folder = settings.data_dir
        if settings.supabase_url is not None and settings.supabase_secret_key is not None:
            remote = SupabaseRemote.from_settings(settings)
    except SettingsError as error:
        settings = error  # one of the findings, not the end of the examination
    report = examine(settings, folder, SESSION_TABLES, remote=remote)
    show_doctor(report.to_json(), json)
    raise typer.Exit(0 if report.ok else EXIT_TROUBLE)
