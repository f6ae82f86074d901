"""`syncer replay --volume-dir`: what containers left on a Volume, delivered by command.

It takes the worker's lease, so that no scheduled pass works on the same segments meanwhile.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from local_store.clock import SystemClock, new_id
from local_store.ops import Selection
from syncer import operators
from syncer.adopter import Adopter
from syncer.errors import RemoteUnavailable, SettingsError
from syncer.remote import SupabaseRemote
from syncer.replay import Difference, ReplayReport, differences
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from syncer.volume import Volume
from syncer.worker import Lease, adopter_of

BUDGET_S = 3_600.0


@dataclass(frozen=True, slots=True)
class OpenedVolume:
    """A Volume's segments, with nobody else at work on them."""

    _adopter: Adopter
    _lease: Lease
    _remote: SupabaseRemote

    def replay(
        self, selection: Selection, *, settled: bool = False, dead_letters: bool = False
    ) -> ReplayReport:
        """Deliver what is selected, however young it is, within an hour. Raises SyncError."""
        retried = self._retry_dead_letters() if dead_letters else Counter[str]()
        report = self._adopter.adopt(
            older_than_s=0.0,
            budget_s=BUDGET_S,
            selection=selection,
            settled_too=settled,
            keep_going=self._lease.keep,
        )
        flush, trouble = report.flush, (*report.quarantined, *report.left)
        return ReplayReport(
            selected=report.adopted,
            applied=flush.applied + retried["applied"],
            duplicate=flush.duplicate,
            conflict=flush.conflict + retried["conflict"],
            rejected=flush.rejected + retried["rejected"],
            held=report.remaining,
            # A file that couldn't be read holds at least one that wasn't delivered.
            remaining=report.remaining + len(trouble),
            reachable=flush.stopped not in ("outage", "auth", "schema"),
            error=flush.error or next(iter(trouble), None),
        )

    def differences(self, selection: Selection) -> list[Difference]:
        """Compare what isn't delivered with the live rows; changes nothing. Raises SyncError."""
        return [
            difference
            for store in self._adopter.logs()
            for difference in differences(store, self._remote, selection)
        ]

    def _retry_dead_letters(self) -> Counter[str]:
        retried: Counter[str] = Counter()
        for log_id in self._adopter.log_ids():
            found = operators.dead_letters(self._remote, log_id=log_id)
            dead = [letter["txn_id"] for letter in found if letter["state"] == "dead"]
            results = operators.retry(self._remote, dead)
            retried.update(result["verdict"] for result in results)
        return retried


@contextmanager
def opened_volume(settings: Settings, volume: Volume) -> Iterator[OpenedVolume]:
    """Yield the Volume, reloaded and leased; raises SettingsError, SyncError."""
    remote = SupabaseRemote.from_settings(settings)
    if not volume.folder.is_dir():
        raise SettingsError(
            "SYNCER_VOLUME_DIR", f"{volume.folder} is no folder", hint="name the mounted Volume"
        )
    lease = Lease(remote, new_id(), SystemClock())
    if not lease.take():
        raise SettingsError(
            "--volume-dir",
            "a worker is at this project's segments",
            hint="wait for its pass to end, a minute at most, and run this again",
        )
    try:
        reloaded = volume.reload()
        if reloaded.state != "reloaded":
            raise RemoteUnavailable(reloaded.reason, hint=reloaded.hint)
        with tempfile.TemporaryDirectory(prefix="syncer-replay-") as scratch:
            adopter = adopter_of(volume, remote, SESSION_TABLES, Path(scratch), settings)
            yield OpenedVolume(adopter, lease, remote)
    finally:
        lease.give_back()
