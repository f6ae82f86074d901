"""Settings from the environment: one name, default, unit and reason each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from syncer.errors import SettingsError

AckMode = Literal["local", "volume", "remote", "adaptive"]
"""When a write is acknowledged; docs/SUPABASE_SETUP.md says what each costs and loses."""
KEY_BYTES_MIN = 16

_MIB = 1024 * 1024


def _syncer(name: str, default: Any, **rules: Any) -> Any:
    return Field(default, validation_alias=AliasChoices(f"SYNCER_{name.upper()}", name), **rules)


def _plain(name: str, default: Any = None, *others: str) -> Any:
    return Field(default, validation_alias=AliasChoices(name, *others, name.lower()))


class Settings(BaseSettings):
    """Everything that can be set from outside; `Settings.load()` names a bad value.

    Durations are in seconds, sizes in bytes unless the name says otherwise.
    """

    model_config = SettingsConfigDict(
        extra="ignore", hide_input_in_errors=True, env_ignore_empty=True, frozen=True
    )

    supabase_url: str | None = _plain("SUPABASE_URL")
    supabase_secret_key: SecretStr | None = _plain(
        "SUPABASE_SECRET_KEY", None, "SUPABASE_SERVICE_ROLE_KEY"
    )
    supabase_anon_key: str | None = _plain("SUPABASE_ANON_KEY")
    supabase_jwt_secret: SecretStr | None = _plain("SUPABASE_JWT_SECRET")
    database_url: SecretStr | None = _plain("DATABASE_URL")
    use_supabase: bool = _plain("USE_SUPABASE", True)

    data_dir: Path = _syncer("data_dir", Path(".syncer/data"))
    volume_dir: Path | None = _syncer("volume_dir", None)
    segment_key: SecretStr | None = _syncer("segment_key", None)
    # After a rotation, until the segments sealed with the old key are collected.
    segment_key_previous: SecretStr | None = _syncer("segment_key_previous", None)
    # Segments of another environment are left alone; unset, the project's host name tells.
    environment: str | None = _syncer("environment", None, min_length=1, max_length=64)
    ack: AckMode = _syncer("ack", "local")
    # How long a write waits for the server in mode `remote` before it is acknowledged as it is.
    ack_timeout_s: float = _syncer("ack_timeout_s", 5.0, gt=0, le=60)
    # A healthy delivery takes a tenth of it; from here on a container's loss would cost writes.
    adaptive_after_s: float = _syncer("adaptive_after_s", 1.0, gt=0, le=3600)
    # The container delivers by itself meanwhile; doing it twice is harmless, and costs calls.
    adopt_after_s: float = _syncer("adopt_after_s", 120.0, ge=0, le=86_400)
    embedded_flusher: bool = _syncer("embedded_flusher", True)
    # The nudge after each write makes the interval matter only for retries and other processes.
    flush_interval_s: float = _syncer("flush_interval_s", 2.0, gt=0, le=3600)
    # Larger batches gain little once the RPC's fixed cost is spread; smaller ones retry cheaper.
    batch_ops_max: int = _syncer("batch_ops_max", 500, ge=1, le=5_000)
    batch_bytes_max: int = _syncer("batch_bytes_max", 4 * _MIB, ge=64 * 1024)
    buffer_bytes_max: int = _syncer("buffer_bytes_max", 2048 * _MIB, ge=_MIB)
    buffer_transactions_max: int = _syncer("buffer_transactions_max", 2_000_000, ge=1)
    # Rows for reads in an outage; the server has them all, so the least recently changed may go.
    cache_bytes_max: int = _syncer("cache_bytes_max", 512 * _MIB, ge=_MIB)
    # How far back `replay --settled` can tell a server that was restored from a backup.
    settled_retention_s: float = _syncer("settled_retention_s", 86_400.0, ge=0)
    op_bytes_max: int = _syncer("op_bytes_max", 4 * _MIB, ge=1024)
    # One probe per interval in an outage: a struggling project isn't hammered by its own clients.
    breaker_interval_s: float = _syncer("breaker_interval_s", 5.0, gt=0, le=600)
    # Another container's buffer brings a missing parent within minutes once Supabase is back.
    parent_wait_s: float = _syncer("parent_wait_s", 3_600.0, ge=0, le=30 * 86_400)
    # Longer than any buffer is offline: a transaction older than the ledger's memory is fenced.
    ledger_retention_s: float = _syncer("ledger_retention_s", 90 * 86_400.0, ge=3_600)
    # A reader waits this long for fresher rows before the local copy is shown as stale: a session
    # is to be shown within 200 ms however slow Supabase is.
    read_through_ms: int = _syncer("read_through_ms", 150, ge=0, le=10_000)
    # One small read: a table that lies open is noticed within it. 0: never.
    watch_interval_s: float = _syncer("watch_interval_s", 60.0, ge=0, le=86_400)
    # Compares this buffer's account with the server's, and a part of its rows. 0: never.
    audit_interval_s: float = _syncer("audit_interval_s", 3_600.0, ge=0, le=30 * 86_400)
    log_level: Literal["debug", "info", "warning", "error"] = _syncer("log_level", "info")
    host: str = _syncer("host", "127.0.0.1")
    port: int = _syncer("port", 8000, ge=0, le=65_535)

    @field_validator("supabase_url")
    @classmethod
    def _is_project_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a project URL such as https://<ref>.supabase.co")
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
            raise ValueError("must be the bare project URL, without path, query or credentials")
        return value.rstrip("/")

    @field_validator("segment_key", "segment_key_previous")
    @classmethod
    def _is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < KEY_BYTES_MIN:
            raise ValueError(f"needs at least {KEY_BYTES_MIN} bytes, such as openssl rand -hex 32")
        return value

    @property
    def environment_name(self) -> str:
        """What segments are marked with: the environment, else the project's host name."""
        return self.environment or urlsplit(self.supabase_url or "").hostname or "local"

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment; `overrides` win. Raises SettingsError naming the setting."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            reason = first["msg"].removeprefix("Value error, ")
            raise SettingsError(name, reason, hint="see the settings table in the README") from None

    def require_supabase(self) -> tuple[str, str]:
        """Return (project URL, secret key); raises SettingsError naming what is missing."""
        if self.supabase_url is None:
            raise SettingsError("SUPABASE_URL", "is not set", hint="set it to the project's URL")
        if self.supabase_secret_key is None:
            raise SettingsError(
                "SUPABASE_SECRET_KEY",
                "is not set (nor SUPABASE_SERVICE_ROLE_KEY)",
                hint="the worker needs the secret key; find it in the project's API settings",
            )
        return self.supabase_url, self.supabase_secret_key.get_secret_value()

    def require_volume(self) -> tuple[Path, str]:
        """Return (the Volume's folder, the segments' key); raises SettingsError."""
        if self.volume_dir is None:
            raise SettingsError(
                "SYNCER_VOLUME_DIR", "is not set", hint="name a folder that outlives the container"
            )
        if self.segment_key is None:
            raise SettingsError(
                "SYNCER_SEGMENT_KEY",
                "is not set",
                hint="set the same secret for containers and workers: openssl rand -hex 32",
            )
        return self.volume_dir, self.segment_key.get_secret_value()

    @property
    def ships(self) -> bool:
        """Tell whether acknowledgements may need the Volume."""
        return self.ack in ("volume", "adaptive")


def store_limits(settings: Settings) -> dict[str, Any]:
    """Return the limits that `LocalStore.open` takes."""
    return {
        "buffer_bytes_max": settings.buffer_bytes_max,
        "buffer_transactions_max": settings.buffer_transactions_max,
        "op_bytes_max": settings.op_bytes_max,
        "cache_bytes_max": settings.cache_bytes_max,
        "settled_retention_s": settings.settled_retention_s,
        "file_bytes_max": 2 * settings.buffer_bytes_max,
    }
