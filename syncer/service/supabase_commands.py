"""`syncer supabase`: a local Supabase data plane that stays up between commands."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from syncer.errors import SettingsError
from syncer.service.output import told
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.postgres import find_postgres

supabase_app = typer.Typer(
    help="A local Supabase data plane: Postgres, PostgREST, gateway; no Docker, no account.",
    no_args_is_help=True,
)

Dir = Annotated[Path, typer.Option("--dir", help="The folder that holds its state.")]
DEFAULT_DIR = Path(".syncer/supabase")


@supabase_app.command()
def start(dir: Dir = DEFAULT_DIR) -> None:
    """Start it, or start it again on its data; it keeps running until `stop`."""
    try:
        stack = LocalSupabase.start(dir.resolve(), reap_with_parent=False)
    except RuntimeError as error:
        print(f"syncer: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    told(f"Supabase is up at {stack.url}; `syncer supabase env --dir {dir}` prints its settings")


@supabase_app.command()
def stop(dir: Dir = DEFAULT_DIR) -> None:
    """Stop it; its data stay in the folder."""
    _attached(dir).stop()
    told("stopped")


@supabase_app.command()
def env(dir: Dir = DEFAULT_DIR) -> None:
    """Print its settings as KEY=VALUE lines, for `export $(syncer supabase env)`."""
    print("\n".join(f"{name}={value}" for name, value in _attached(dir).env().items()))


@supabase_app.command()
def psql(dir: Dir = DEFAULT_DIR) -> None:
    """Open a psql on its database."""
    stack = _attached(dir)
    beside = find_postgres() / "psql"
    program = shutil.which("psql") or (str(beside) if beside.exists() else None)
    if program is None:
        print(
            "syncer: no psql on PATH; DATABASE_URL of `syncer supabase env` works with any client",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    os.execv(program, [program, stack.database_url])


def _attached(dir: Path) -> LocalSupabase:
    try:
        return LocalSupabase.attach(dir.resolve())
    except FileNotFoundError:
        raise SettingsError(
            "--dir", f"{dir} holds no local Supabase", hint="`syncer supabase start` makes one"
        ) from None
