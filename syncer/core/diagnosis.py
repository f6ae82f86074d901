"""What the facts of a server mean: one check per thing that delivery relies on.

The facts are the reply of `sync_doctor_v1`; nothing is asked here. A failed check of severity
`error` means that writes aren't delivered or users aren't kept apart; a `warning` is slow, risky or
unclear. Each failed check names its remedy.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Facts = Mapping[str, Any]

PROTOCOL = 1
CLIENT_FUNCTIONS: tuple[str, ...] = (
    "sync_apply_batch_v1",
    "sync_read_v1",
    "sync_audit_v1",
    "sync_prune_v1",
    "sync_park_v1",
    "sync_retry_v1",
    "sync_discard_v1",
    "sync_edit_v1",
    "sync_resolve_v1",
    "sync_list_parked_v1",
    "sync_list_conflicts_v1",
    "sync_doctor_v1",
)
"""What this version of the client may call."""

CLOCK_SKEW_WARN_S = 5.0  # alarms by age begin to mislead
CLOCK_SKEW_MAX_S = 300.0  # the moment of acceptance is capped by the server's clock: order suffers


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. A passed check has severity `info`; `remedy` is empty unless it failed."""

    name: str
    ok: bool
    severity: Severity
    detail: str
    remedy: str = ""


def passed(name: str, detail: str) -> Check:
    """Return a check that is as it should be."""
    return Check(name, True, "info", detail)


def failed(name: str, detail: str, remedy: str, severity: Severity = "error") -> Check:
    """Return a check that isn't, with what mends it."""
    return Check(name, False, severity, detail, remedy)


def key_role(key: str) -> str:
    """Tell what a Supabase key is for, without repeating any of it.

    `service_role`, `anon`, another role of a JWT, or `unknown` for a form that says nothing.
    """
    if key.startswith("sb_secret_"):
        return "service_role"
    if key.startswith("sb_publishable_"):
        return "anon"
    parts = key.split(".")
    if len(parts) != 3:
        return "unknown"
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return "unknown"
    role = claims.get("role") if isinstance(claims, dict) else None
    return role if role in ("service_role", "anon", "authenticated") else "unknown"


def judge_key(key: str) -> Check:
    """Judge the secret key by its form."""
    role = key_role(key)
    if role in ("service_role", "unknown"):
        told = "a secret (service_role) key" if role == "service_role" else "of an unknown form"
        return passed("server.key", f"SUPABASE_SECRET_KEY is {told}")
    return failed(
        "server.key",
        f"SUPABASE_SECRET_KEY holds a key of role {role}, which may not deliver",
        "put the project's secret (service_role) key there; the anon key is SUPABASE_ANON_KEY",
    )


def judge_clock(facts: Facts, asked: datetime, answered: datetime) -> Check:
    """Compare the clocks; what the call itself may have taken doesn't count as skew."""
    server = datetime.fromisoformat(facts["now"])
    skew_s = max((asked - server).total_seconds(), (server - answered).total_seconds(), 0.0)
    if skew_s <= CLOCK_SKEW_WARN_S:
        return passed("clock", f"this clock and the server's differ by {skew_s:.1f} s at most")
    return failed(
        "clock",
        f"this clock and the server's differ by {skew_s:.0f} s",
        "synchronise this machine's clock (NTP); accepted_at is capped by the server's",
        "error" if skew_s > CLOCK_SKEW_MAX_S else "warning",
    )


def judge_server(facts: Facts, migrations: Mapping[str, str]) -> list[Check]:
    """Judge functions, migrations and views.

    `migrations` maps the names of this version's files to their SHA-256.
    """
    return [
        _functions(facts["functions"]),
        _exposure(facts["functions"]),
        *_migrations(facts["migrations"], migrations),
        _views(facts["views"]),
    ]


def _functions(found: Mapping[str, Mapping[str, bool]]) -> Check:
    missing = [
        name for name in CLIENT_FUNCTIONS if not found.get(name, {}).get("service_role", False)
    ]
    if not missing:
        return passed("server.functions", f"all {len(CLIENT_FUNCTIONS)} functions may be called")
    return failed(
        "server.functions",
        "missing, or not granted to service_role: " + ", ".join(missing),
        "run `syncer migrate`",
    )


def _exposure(found: Mapping[str, Mapping[str, bool]]) -> Check:
    open_ones = sorted(n for n, may in found.items() if may["anon"] or may["authenticated"])
    if not open_ones:
        return passed("server.exposure", "no sync function may be called by anon or by users")
    return failed(
        "server.exposure",
        "anon or authenticated may call, and so act as anybody: " + ", ".join(open_ones),
        "; ".join(
            f"revoke execute on function public.{name} from public, anon, authenticated"
            for name in open_ones
        ),
    )


def _migrations(applied: Mapping[str, str] | None, known: Mapping[str, str]) -> Iterator[Check]:
    name = "server.migrations"
    if applied is None:
        yield failed(
            name, "were applied by hand: nobody noted which", "run `syncer migrate`", "warning"
        )
        return
    missing = sorted(set(known) - set(applied))
    changed = sorted(n for n in known if n in applied and applied[n] != known[n])
    newer = sorted(set(applied) - set(known))
    if missing:
        yield failed(name, "not applied: " + ", ".join(missing), "run `syncer migrate`")
    if changed:
        detail = "other than this version's: " + ", ".join(changed)
        yield failed(name, detail, "run `syncer migrate` from the newest version", "warning")
    if newer:
        detail = "unknown to this version: " + ", ".join(newer)
        yield failed(name, detail, "update the package here", "warning")
    if not (missing or changed or newer):
        yield passed(name, f"all {len(known)} are applied")


def _views(unguarded: list[str]) -> Check:
    if not unguarded:
        return passed("server.views", "no view shows rows past row-level security")
    return failed(
        "server.views",
        "show everybody's rows to API roles: " + ", ".join(unguarded),
        "alter view … set (security_invoker = true); a materialised view: revoke select on it"
        " from anon, authenticated",
    )
