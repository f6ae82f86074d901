"""One process's parts: buffer, flusher, shipper and API, from its start to its clean end.

`syncer serve` and the Modal container run the same parts; nothing here knows which of them it is.
"""

from __future__ import annotations

import threading
from datetime import UTC
from typing import Self

import structlog
from fastapi import FastAPI

from local_store import LocalStore
from local_store.clock import SystemClock
from syncer.acknowledger import AckLimits, Acknowledger
from syncer.flusher import Flusher, FlushLimits, FlushReport, drain
from syncer.remote import SupabaseRemote
from syncer.service.app import create_app
from syncer.service.health import SyncState
from syncer.service.metrics import Metrics
from syncer.service.scheduler import FlushScheduler, SteadyScheduler
from syncer.service.watch import Watch
from syncer.sessions import Translator
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings, store_limits
from syncer.shipper import Shipper
from syncer.volume import Volume

# With the 8 s for requests in flight and the 4 s for writes inside the gate: below the 25 s that a
# platform grants between its signal and its kill.
SHIP_S = 7.0  # the last seal and commit: what makes the end harmless
LAST_PASS_S = 4.0  # for the flush under way and one more; the rest is in the buffer, and sealed

log = structlog.get_logger("syncer.runtime")


class Runtime:
    """The running parts of an API process. Made by `start`, ended once by `stop`."""

    def __init__(
        self,
        settings: Settings,
        store: LocalStore,
        remote: SupabaseRemote | None,
        volume: Volume | None,
        translator: Translator | None,
        counted: Metrics,
    ) -> None:
        self._settings = settings
        self._store = store
        self._remote = remote
        self._volume = volume
        shipper = None if volume is None else Shipper.from_settings(store, volume, settings)
        self._acknowledger = Acknowledger(store, shipper, AckLimits.from_settings(settings))
        self._sync = SyncState(enabled=settings.use_supabase)
        self._counted = counted
        self._watch: Watch | None = None
        self._flusher: Flusher | None = None
        self._delivery: FlushScheduler | None = None
        self._shipping: SteadyScheduler | None = None
        self._stopped = False
        self.app: FastAPI = create_app(
            settings,
            store,
            remote=remote,
            flusher_state=self._sync,
            translator=translator,
            counted=counted,
            acknowledger=self._acknowledger,
            at_end=self.stop,
        )

    @classmethod
    def start(
        cls,
        settings: Settings,
        *,
        volume: Volume | None = None,
        translator: Translator | None = None,
    ) -> Self:
        """Open the buffer and start what the settings ask for.

        `volume` is the mounted Volume with its commit; without one SYNCER_VOLUME_DIR is taken as a
        folder that outlives the container by itself. Raises SettingsError before anything is opened
        when a setting is missing, LocalStoreError when the buffer can't be opened.
        """
        counted = Metrics()
        remote = _remote_of(settings, counted)
        # Also for mode `local`: what is left at the end of the process is shipped.
        if volume is None and (settings.ships or settings.volume_dir is not None):
            folder, _ = settings.require_volume()
            volume = Volume(folder)
        store = LocalStore.open(settings.data_dir, tables=SESSION_TABLES, **store_limits(settings))
        try:
            runtime = cls(settings, store, remote, volume, translator, counted)
            runtime._start_watch()
            runtime._start_delivery()
            runtime._start_shipping()
        except BaseException:
            store.close()
            raise
        return runtime

    def stop(self) -> None:
        """Seal and ship what is left, flush what time allows, close. The gate is closed before.

        Takes at most about 12 s; whatever it doesn't get done stays in the buffer, and what
        was sealed is the worker's. The app calls it when its server shuts down; a second call does
        nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        if self._shipping is not None:
            self._shipping.shutdown(wait=False)
        if self._watch is not None:
            self._watch.stop()
        if self._volume is not None and not self._acknowledger.ship_all(SHIP_S):
            log.error("not_shipped", at_risk=self._acknowledger.at_risk())
        self._stop_delivery()
        if self._volume is not None:
            self._volume.close()
        self._store.close()
        log.info("stopped")

    def _start_delivery(self) -> None:
        if self._remote is None or not self._settings.embedded_flusher:
            return
        self._flusher = Flusher(
            self._store, self._remote, limits=FlushLimits.from_settings(self._settings)
        )
        self._delivery = FlushScheduler(
            self._store,
            self._flusher,
            interval_s=self._settings.flush_interval_s,
            on_report=self._record,
            on_pass=self._acknowledger.heard,
            eager=self._settings.ack == "remote",
        )
        self._delivery.start()

    def _record(self, report: FlushReport) -> None:
        self._sync.record(report)
        self._counted.flushed(report)

    def _start_watch(self) -> None:
        if self._remote is None or not self._settings.watch_interval_s:
            return
        self._watch = Watch(self._settings, self._store, self._remote, self._sync, self._counted)
        self._watch.start()

    def _start_shipping(self) -> None:
        """Ship what was acknowledged before the mode turned, and what a failed commit left."""
        if self._volume is None:
            return
        self._shipping = SteadyScheduler(timezone=UTC)
        self._shipping.add_job(
            self._acknowledger.ship_if_due,
            "interval",
            seconds=self._settings.flush_interval_s,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )
        self._shipping.start()

    def _stop_delivery(self) -> None:
        """Stop the flusher within LAST_PASS_S, then without waiting for the call under way."""
        if self._remote is None:
            return
        stopping = threading.Thread(target=self._finish_delivery, name="syncer-stop")
        stopping.start()
        stopping.join(LAST_PASS_S)
        while stopping.is_alive():
            self._remote.give_up_calls()
            stopping.join(0.1)
        self._remote.close()

    def _finish_delivery(self) -> None:
        if self._delivery is None or self._flusher is None:
            return
        self._delivery.stop()
        clock = SystemClock()
        end = clock.monotonic() + LAST_PASS_S / 2
        self._record(drain(self._flusher, clock, budget_s=end - clock.monotonic()))


def _remote_of(settings: Settings, counted: Metrics) -> SupabaseRemote | None:
    """Return the project to deliver to and read from; None when this process does neither.

    A container that only ships segments needs no secret key: the worker has it.
    """
    if not settings.use_supabase:
        return None
    only_ships = settings.ships and not settings.embedded_flusher
    if only_ships and settings.supabase_secret_key is None:
        return None
    return SupabaseRemote.from_settings(settings, on_call=counted.called)
