"""The worker's pass: one lease, one reload, what containers left, what the server may forget.

Scheduled every minute or so, by as many schedulers as like to: the lease in the database lets one
work at a time. A pass ends before the next is due, and what it didn't finish is still there then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from local_store import TableSpec
from local_store.clock import Clock, SystemClock, new_id
from local_store.segments import SegmentKey
from syncer.adopter import Adopter, AdoptionReport
from syncer.errors import SyncError
from syncer.flusher import FlushLimits
from syncer.remote import SupabaseRemote
from syncer.settings import Settings
from syncer.volume import Volume

LEASE_NAME = "worker"
LEASE_S = 120.0  # longer than any one call; a worker that died keeps the next from work so long
RENEW_S = 30.0
PRUNE_INTERVAL_S = 3_600.0  # a retention is in days


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What one pass did. `leased`: False when another worker was at it, and nothing was done.

    `leaks` are tables of which a reserved user saw rows that aren't its own; None when that wasn't
    asked. `errors` are what failed, without secrets; the next pass tries again.
    """

    leased: bool = False
    adoption: AdoptionReport | None = None
    leaks: tuple[str, ...] | None = None
    pruned: int | None = None
    errors: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing failed, leaked or had to be set aside."""
        found = self.adoption
        return not (self.errors or self.leaks or (found and (found.quarantined or found.left)))

    def to_json(self) -> dict[str, Any]:
        """Return the report as one object."""
        return {**asdict(self), "ok": self.ok}


class Lease:
    """The right to work on a project's segments, kept in its database. Not thread-safe."""

    def __init__(self, remote: SupabaseRemote, holder: str, clock: Clock) -> None:
        self._remote = remote
        self._holder = holder
        self._clock = clock
        self._renew_at = 0.0

    def take(self) -> bool:
        """Take or renew it for LEASE_S; False when another has it. Raises SyncError."""
        held = self._remote.lease(LEASE_NAME, self._holder, LEASE_S)
        self._renew_at = self._clock.monotonic() + RENEW_S
        return held

    def keep(self) -> bool:
        """Renew it when it is time to; False when it was lost. Whoever works on does no harm."""
        if self._clock.monotonic() < self._renew_at:
            return True
        try:
            return self.take()
        except SyncError:
            return True  # the work itself will find out soon

    def give_back(self) -> None:
        """Let the next one work at once; unreachable, it runs out by itself."""
        with suppress(SyncError):
            self._remote.lease(LEASE_NAME, self._holder, 0)


class Worker:
    """Does passes over one Volume. `holder` names this worker in the lease."""

    def __init__(
        self,
        remote: SupabaseRemote,
        volume: Volume,
        adopter: Adopter,
        *,
        adopt_after_s: float,
        ledger_retention_s: float,
        holder: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._remote = remote
        self._volume = volume
        self._adopter = adopter
        self._adopt_after_s = adopt_after_s
        self._retention_s = ledger_retention_s
        self._clock = clock or SystemClock()
        self._lease = Lease(remote, holder or new_id(), self._clock)
        self._prune_at = self._clock.monotonic()

    @classmethod
    def from_settings(
        cls,
        volume: Volume,
        tables: Sequence[TableSpec],
        scratch: Path,
        settings: Settings | None = None,
        *,
        remote: SupabaseRemote | None = None,
        clock: Clock | None = None,
    ) -> Worker:
        """Build a worker; raises SettingsError naming what is missing."""
        settings = settings or Settings.load()
        remote = remote or SupabaseRemote.from_settings(settings)
        return cls(
            remote,
            volume,
            adopter_of(volume, remote, tables, scratch, settings, clock=clock),
            adopt_after_s=settings.adopt_after_s,
            ledger_retention_s=settings.ledger_retention_s,
            clock=clock,
        )

    def work(self, *, budget_s: float) -> WorkReport:
        """Do one pass within about `budget_s`. What Supabase or the Volume refuses is reported."""
        end = self._clock.monotonic() + budget_s
        try:
            if not self._lease.take():
                return WorkReport()
        except SyncError as error:
            return WorkReport(errors=(f"lease: {error}",))
        report = WorkReport(leased=True)
        try:
            reloaded = self._volume.reload()
            if reloaded.state != "reloaded":
                return replace(report, errors=(f"{reloaded.reason}; {reloaded.hint}",))
            left_s = max(0.0, end - self._clock.monotonic())
            found = self._adopter.adopt(
                older_than_s=self._adopt_after_s, budget_s=left_s, keep_going=self._lease.keep
            )
            failed = () if found.flush.error is None else (found.flush.error,)
            report = replace(report, adoption=found, errors=failed)
            return self._look_after(report)
        finally:
            self._lease.give_back()

    def _look_after(self, report: WorkReport) -> WorkReport:
        """Ask the canary, and once an hour let the server forget."""
        try:
            report = replace(report, leaks=tuple(self._remote.canary()))
            if self._clock.monotonic() >= self._prune_at:
                report = replace(report, pruned=self._remote.prune(self._retention_s))
                self._prune_at = self._clock.monotonic() + PRUNE_INTERVAL_S
        except SyncError as error:
            report = replace(report, errors=(*report.errors, str(error)))
        return report


def adopter_of(
    volume: Volume,
    remote: SupabaseRemote,
    tables: Sequence[TableSpec],
    scratch: Path,
    settings: Settings,
    *,
    clock: Clock | None = None,
) -> Adopter:
    """Build the adopter that the settings describe; raises SettingsError naming what is missing."""
    _, secret = settings.require_volume()
    keys = [SegmentKey.derive(secret)]
    if settings.segment_key_previous is not None:
        keys.append(SegmentKey.derive(settings.segment_key_previous.get_secret_value()))
    return Adopter(
        volume,
        remote,
        scratch,
        tables=tables,
        keys=keys,
        environment=settings.environment_name,
        limits=FlushLimits.from_settings(settings),
        clock=clock,
    )
