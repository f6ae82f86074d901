"""`syncer demo`: the outage drill with a face."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from syncer.service.output import show_document
from syncer.testkit.drill import DrillResult, DrillSize, run_drill


class _Bar:
    """Draws the drill's progress on stderr; plain lines when nobody watches."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Say what happens now."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=text)
        else:
            self._console.print(text)

    def steps(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total)


def play(sessions: int, outage_seconds: float, seed: int, keep: Path | None, as_json: bool) -> int:
    """Run the drill and print its result; returns the exit code, 0 only when it balances."""
    with _Bar(Console(file=sys.stderr)) as bar:
        result = run_drill(DrillSize(sessions, outage_seconds, seed), progress=bar, keep=keep)
    if as_json:
        show_document(result.to_json())
    else:
        _show(result, outage_seconds)
    return 0 if result.passed else 1


def _show(result: DrillResult, outage_seconds: float) -> None:
    console = Console(highlight=False)
    total = result.audit.total
    table = Table(title=f"Outage drill (seed {result.seed})", show_header=False)
    table.add_row("writes acknowledged", str(result.acknowledged))
    table.add_row("  of them during the outage", str(result.acknowledged_during_outage))
    table.add_row("calls repeated after the kill", str(result.repeated))
    table.add_row("replies lost after the commit", str(result.replies_lost))
    table.add_row("API errors and refusals", str(len(result.errors)))
    table.add_row("acknowledge p50 / p99", f"{result.ack_ms['p50']} / {result.ack_ms['p99']} ms")
    table.add_row("drained in", f"{result.drain_s} s")
    table.add_row("in the ledger, once each", str(total.applied))
    table.add_row("lost / doubled", f"{result.lost} / {result.duplicated}")
    table.add_row("false conflicts / refused by Supabase", f"{total.conflict} / {total.dead}")
    table.add_row("content or counters that differ", _differing(result))
    table.add_row("rows a stranger can see", str(result.cross_user_rows))
    console.print(table)
    for error in result.errors[:5]:
        console.print(f"  {error}", markup=False)
    if result.passed:
        console.print(
            f"Supabase was gone for {outage_seconds:g} s and the API was killed in the middle: all "
            f"{result.acknowledged} acknowledged writes arrived exactly once, none was refused."
        )
    else:
        console.print("The drill did NOT balance: see the table above.", style="bold red")


def _differing(result: DrillResult) -> str:
    return str(result.audit.total.content_mismatch + result.counter_mismatches)
