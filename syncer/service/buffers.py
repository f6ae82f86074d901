"""What the commands share: options, settings, and the buffer they are pointed at."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from local_store import LocalStore
from local_store.clock import isoformat
from syncer.errors import SettingsError
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings, store_limits

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The buffer's folder [SYNCER_DATA_DIR].")
]
VolumeDir = Annotated[
    Path | None,
    typer.Option("--volume-dir", help="The Volume's folder of segments [SYNCER_VOLUME_DIR]."),
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


def moment(option: str, text: str | None) -> str | None:
    """Read a moment of an option; without an offset it is UTC, as everything here."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(
            option, "is no ISO 8601 time", hint="write it as 2026-01-31T23:59:59+00:00"
        ) from None
    return isoformat(found if found.tzinfo else found.replace(tzinfo=UTC))
