"""What the commands share: options, settings, and the buffer they are pointed at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from local_store import LocalStore
from syncer.errors import SettingsError
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings, store_limits

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The buffer's folder [SYNCER_DATA_DIR].")
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def settings_for(data_dir: Path | None) -> Settings:
    """Read the settings; the option wins over the environment."""
    return Settings.load(**given(data_dir=data_dir))


def holds_buffer(folder: Path) -> bool:
    """Tell whether there is a buffer in a folder."""
    return (folder / "buffer.db").exists()


def existing_store(settings: Settings) -> LocalStore:
    """Open the buffer without creating one: a typing error must not look like an empty buffer."""
    if not holds_buffer(settings.data_dir):
        raise SettingsError(
            "SYNCER_DATA_DIR",
            f"{os.fspath(settings.data_dir)} holds no buffer",
            hint="name the folder the API writes to, with --data-dir",
        )
    return LocalStore.open(settings.data_dir, tables=SESSION_TABLES, **store_limits(settings))
