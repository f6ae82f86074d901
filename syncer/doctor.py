"""Look at everything delivery relies on, change nothing, and say what to mend.

Settings, the buffer's folder and file, the clock, the server: each check is a small function, each
failed one names its remedy. Nothing secret is ever part of an answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo

from local_store.clock import Clock, SystemClock
from local_store.ops import Row, TableSpec
from syncer.core.diagnosis import (
    PROTOCOL,
    Check,
    Facts,
    failed,
    judge_clock,
    judge_key,
    judge_server,
    passed,
)
from syncer.core.spec_diagnosis import judge_specs
from syncer.core.table_diagnosis import judge_table
from syncer.doctor_local import local_checks
from syncer.errors import NotAuthorized, ProtocolMismatch, SettingsError, SyncError
from syncer.migrate import load_migrations
from syncer.settings import Settings


class Examined(Protocol):
    """A server that answers the doctor."""

    def doctor(self) -> Row:
        """Return the reply of `sync_doctor_v1`. Raises SyncError."""
        ...


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All checks, in the order they were made."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when no check of severity `error` failed."""
        return not any(check.severity == "error" and not check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `syncer doctor --json` prints."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def examine(
    settings: Settings | SettingsError,
    store_folder: Path,
    tables: Sequence[TableSpec],
    *,
    remote: Examined | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] | None = None,
) -> DoctorReport:
    """Make every check; never raises for what it finds.

    `settings` may be the error that loading them raised: the rest is examined all the same.
    Without `remote` the server's checks are left out, with a warning.
    """
    checks = list(settings_checks(settings, os.environ if environ is None else environ))
    limit = _buffer_bytes_max(settings)
    checks += local_checks(store_folder, limit)
    checks += server_checks(settings, remote, tables, clock or SystemClock())
    return DoctorReport(tuple(checks))


# -- settings --


def settings_checks(
    settings: Settings | SettingsError, environ: Mapping[str, str]
) -> Iterator[Check]:
    """Name each setting with its value; secrets only as `set` or `not set`."""
    known: set[str] = set()
    for field, info in Settings.model_fields.items():
        names = _names(field, info)
        known.update(names)
        if isinstance(settings, Settings):
            yield passed(f"setting.{names[0]}", _told(field, info, getattr(settings, field)))
    if isinstance(settings, SettingsError):
        name = _canonical(settings.setting)
        yield failed(f"setting.{name}", settings.reason, settings.hint or f"mend {name}")
    for name in sorted(environ):
        if name.startswith("SYNCER_") and name not in known:
            yield failed(
                f"setting.{name}",
                "no setting has this name, so it has no effect",
                "check its spelling, or unset it",
                "warning",
            )


def _names(field: str, info: FieldInfo) -> list[str]:
    """Return a setting's names in the environment, the documented one first."""
    alias = info.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [field]
    return [str(choice) for choice in choices if str(choice).isupper()] or [field]


def _canonical(name: str) -> str:
    for field, info in Settings.model_fields.items():
        if name.lower() in (field, *(other.lower() for other in _names(field, info))):
            return _names(field, info)[0]
    return name


def _told(field: str, info: FieldInfo, value: Any) -> str:
    if (
        isinstance(value, SecretStr)
        or field.endswith(("_key", "_secret"))
        or field == "database_url"
    ):
        return "set" if value is not None else "not set"
    shown = "not set" if value is None else str(value)
    default = "not set" if info.default is None else str(info.default)
    return f"{shown} (default {default}{_unit(field)})"


def _unit(field: str) -> str:
    for ending, unit in (("_ms", "ms"), ("_s", "s"), ("_bytes_max", "bytes"), ("_bytes", "bytes")):
        if field.endswith(ending):
            return f", in {unit}"
    return ""


def _buffer_bytes_max(settings: Settings | SettingsError) -> int:
    if isinstance(settings, Settings):
        return settings.buffer_bytes_max
    return int(Settings.model_fields["buffer_bytes_max"].default)


# -- the server --


def server_checks(
    settings: Settings | SettingsError,
    remote: Examined | None,
    tables: Sequence[TableSpec],
    clock: Clock,
) -> list[Check]:
    """Ask the server once and judge its answer; without an answer the reason is the only check."""
    checks: list[Check] = []
    if isinstance(settings, Settings) and settings.supabase_secret_key is not None:
        checks.append(judge_key(settings.supabase_secret_key.get_secret_value()))
    if remote is None:
        return [*checks, _not_configured()]
    asked = clock.now()
    try:
        facts = remote.doctor()
    except SyncError as error:
        return [*checks, _unanswered(error)]
    answered = clock.now()
    checks.append(passed("server.reachable", "the server answers"))
    try:
        if facts["protocol"] != PROTOCOL:
            return [*checks, _other_protocol(facts)]
        checks += [judge_clock(facts, asked, answered), *judge_server(facts, _known_migrations())]
        for table in facts["tables"]:
            checks += judge_table(table)
        checks += judge_specs(tables, facts["tables"])
    except (KeyError, TypeError, ValueError) as error:
        checks.append(_unreadable(error))
    return checks


def _known_migrations() -> dict[str, str]:
    return {item.name: item.sha256 for item in load_migrations()}


def _not_configured() -> Check:
    return failed(
        "server.configured",
        "not configured: nothing is delivered, and the server wasn't examined",
        "set SUPABASE_URL and SUPABASE_SECRET_KEY",
        "warning",
    )


def _unanswered(error: SyncError) -> Check:
    if isinstance(error, NotAuthorized):
        remedy = error.hint or "check SUPABASE_SECRET_KEY"
        return failed("server.authorized", error.message, remedy)
    if isinstance(error, ProtocolMismatch):
        remedy = "run `syncer migrate`, or reload the API's schema cache"
        return failed("server.functions", f"sync_doctor_v1 isn't there: {error.message}", remedy)
    remedy = "check SUPABASE_URL and the project's state; what is written meanwhile is kept"
    return failed("server.reachable", error.message, remedy)


def _other_protocol(facts: Facts) -> Check:
    return failed(
        "server.protocol",
        f"the server speaks protocol {facts['protocol']}, this version {PROTOCOL}",
        "update the older of the two",
    )


def _unreadable(error: Exception) -> Check:
    return failed(
        "server.facts",
        f"the server's answer lacks what this version reads ({type(error).__name__})",
        "run `syncer migrate`",
    )
