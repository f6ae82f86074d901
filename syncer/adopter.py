"""Delivering what containers left on the Volume: their segments, in their stead.

Each log gets a buffer of its own for the length of a pass, filled from its segments; the ordinary
flusher delivers it, with the ids and positions that its container gave. Whether that container is
alive doesn't matter: both send the same transactions, and the ledger knows them. A segment goes
when the server knows all of its positions.

A file that can't be trusted is put into quarantine and told of; the others flow.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path, PurePosixPath

from local_store import LocalStore, TableSpec
from local_store.clock import Clock, SystemClock, new_id
from local_store.ops import Selection
from local_store.segment_files import Stranger, load, quarantine, remove, scan
from local_store.segment_names import SegmentCorrupt, SegmentName
from local_store.segments import Segment, SegmentKey
from syncer.errors import NotAuthorized, ProtocolMismatch, SyncError
from syncer.flusher import Flusher, FlushLimits, FlushReport, Stopped, drain
from syncer.remote import Remote
from syncer.volume import Volume

TRANSACTIONS_AT_ONCE = 5_000  # taken in before they are delivered: bounds memory, not the log


@dataclass(frozen=True, slots=True)
class AdoptionReport:
    """What a pass found on the Volume and did with it.

    `segments` were there; `young` ones are left to their container for now; `adopted` counts
    the selected transactions taken in, `remaining` those that are still undelivered. `collected`
    segments are done and gone, `quarantined` couldn't be trusted, and `left` are for another
    reader: newer code, another key or environment. `flush` sums up the deliveries.
    """

    segments: int = 0
    young: int = 0
    adopted: int = 0
    remaining: int = 0
    collected: int = 0
    quarantined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    flush: FlushReport = field(default_factory=FlushReport)


@dataclass(slots=True)
class _Pass:
    """What has been found so far."""

    end: float
    older_than: datetime
    selection: Selection | None = None
    keep_going: Callable[[], bool] = lambda: True
    names: list[SegmentName] = field(default_factory=list)
    bad: dict[PurePosixPath, None] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)
    taken: dict[SegmentName, int] = field(default_factory=dict)
    young: set[SegmentName] = field(default_factory=set)
    remaining: dict[str, int] = field(default_factory=dict)
    flush: FlushReport = field(default_factory=FlushReport)

    @property
    def goes_on(self) -> bool:
        return self.flush.stopped not in ("outage", "auth", "schema")


class Adopter:
    """Delivers the segments of one Volume. One pass at a time; `scratch` is its own folder.

    `jitter` and `ids` are for runs that must repeat exactly.
    """

    def __init__(
        self,
        volume: Volume,
        remote: Remote,
        scratch: Path,
        *,
        tables: Sequence[TableSpec],
        keys: Sequence[SegmentKey],
        environment: str,
        limits: FlushLimits | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] | None = None,
        ids: Callable[[], str] = new_id,
    ) -> None:
        self._volume = volume
        self._remote = remote
        self._scratch = scratch
        self._tables = tables
        self._versions = {spec.name: spec.schema_version for spec in tables}
        self._keys = keys
        self._environment = environment
        self._limits = limits or FlushLimits()
        self._clock = clock or SystemClock()
        self._jitter, self._ids = jitter, ids

    def adopt(
        self,
        *,
        older_than_s: float,
        budget_s: float,
        selection: Selection | None = None,
        settled_too: bool = False,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> AdoptionReport:
        """Deliver all segments whose newest transaction is older than `older_than_s`; collect.

        Reload the Volume first. An outage is a report, not an exception; what is known to be done
        is collected all the same. With `settled_too` also what the server has confirmed is sent
        again, for one that was restored from a backup. One call may overrun the budget.
        `keep_going` is asked before each log and each batch.
        """
        found = self._new_pass(older_than_s, budget_s, selection)
        found.keep_going = keep_going
        done: list[SegmentName] = []
        try:
            self._survey(found)
            open_names = found.names if settled_too else self._unsettled(found.names)
            still_open = set(open_names)
            done = [name for name in found.names if name not in still_open]
            self._deliver(found, open_names)
            still_open -= found.taken.keys()
            still_open.update(self._unsettled(list(found.taken)))
            done = [name for name in found.names if name not in still_open]
        except SyncError as error:
            stopped: Stopped = "outage"
            if isinstance(error, NotAuthorized | ProtocolMismatch):
                stopped = "auth" if isinstance(error, NotAuthorized) else "schema"
            found.flush = replace(found.flush, stopped=stopped, error=str(error))
        return self._report(found, self._collect(done))

    def logs(self) -> Iterator[LocalStore]:
        """Yield for each log a buffer with what isn't delivered of it; nothing is sent or moved.

        Reload the Volume first. Each buffer is gone with the next. Raises SyncError.
        """
        found = self._new_pass(0.0, float("inf"), None)
        self._survey(found)
        for log_id, names in groupby(self._unsettled(found.names), lambda name: name.log_id):
            with self._opened(log_id) as store:
                for segment in self._newest(found, list(names)):
                    self._take_in(found, store, segment)
                yield store

    def log_ids(self) -> list[str]:
        """Return the logs that have segments on the Volume. Reload it first."""
        names = [item for item in scan(self._volume.folder) if isinstance(item, SegmentName)]
        return sorted({name.log_id for name in names})

    # -- what is there --

    def _new_pass(self, older_than_s: float, budget_s: float, selection: Selection | None) -> _Pass:
        older_than = self._clock.now() - timedelta(seconds=older_than_s)
        return _Pass(self._clock.monotonic() + budget_s, older_than, selection)

    def _survey(self, found: _Pass) -> None:
        for item in scan(self._volume.folder):
            if isinstance(item, Stranger):
                found.bad[item.path] = None
            else:
                found.names.append(item)

    def _unsettled(self, names: Sequence[SegmentName]) -> list[SegmentName]:
        ranges = [(name.log_id, name.first_seq, name.last_seq) for name in names]
        settled = self._remote.settled(ranges) if ranges else []
        return [name for name, is_settled in zip(names, settled, strict=True) if not is_settled]

    # -- delivering --

    def _deliver(self, found: _Pass, names: Sequence[SegmentName]) -> None:
        """Deliver log by log, and again those that wait for another's rows, until nothing moves.

        Only then is it asked how long something has been waiting: it may be dead after a long
        outage, and must not be while what it waits for is still to come in this very pass.
        """
        by_log = {key: list(part) for key, part in groupby(names, lambda name: name.log_id)}
        patient = replace(
            self._limits, sorting=replace(self._limits.sorting, parent_wait_s=float("inf"))
        )
        waiting = list(by_log)
        while waiting:
            before = {log_id: found.remaining.get(log_id) for log_id in waiting}
            for log_id in waiting:
                self._deliver_log(found, by_log[log_id], patient)
            waiting = [log_id for log_id in waiting if found.remaining.get(log_id)]
            if all(found.remaining[log_id] == before[log_id] for log_id in waiting):
                break
        for log_id in waiting:
            self._deliver_log(found, by_log[log_id], self._limits)

    def _deliver_log(self, found: _Pass, names: Sequence[SegmentName], limits: FlushLimits) -> None:
        if not self._has_time(found):
            return
        with self._opened(names[0].log_id) as store:
            flusher = Flusher(
                store,
                self._remote,
                limits=limits,
                clock=self._clock,
                jitter=self._jitter,
                selection=found.selection,
            )
            waiting = 0
            for segment in self._newest(found, names):
                if not self._take_in(found, store, segment):
                    break
                waiting += len(segment.transactions)
                if waiting >= TRANSACTIONS_AT_ONCE:
                    self._flush(found, flusher)
                    waiting = 0
                if not self._has_time(found):
                    break
            found.remaining[names[0].log_id] = self._flush_on(found, flusher, store)

    def _newest(self, found: _Pass, names: Sequence[SegmentName]) -> Iterator[Segment]:
        """Read one log's segments, each without what a newer one has again.

        That was merged since, or its container began anew: the form that was sealed last is what
        is true. Segments that overlap are read twice, so that only one is in memory.
        """
        for together in overlapping(names):
            newest: dict[int, int] = {}  # the end of the log when a position was sealed last
            for segment in self._loaded(found, together) if len(together) > 1 else ():
                end = segment.header.acknowledged_seq
                newest |= {t.seq: max(end, newest.get(t.seq, 0)) for t in segment.transactions}
            for segment in self._loaded(found, together):
                end = segment.header.acknowledged_seq
                left = [t for t in segment.transactions if newest.get(t.seq, end) == end]
                yield replace(segment, transactions=tuple(left))

    def _loaded(self, found: _Pass, names: Sequence[SegmentName]) -> Iterator[Segment]:
        for name in names:
            segment = self._load(found, name)
            if segment is not None:
                yield segment

    def _flush_on(self, found: _Pass, flusher: Flusher, store: LocalStore) -> int:
        """Deliver while it gets less, without the waits of a buffer that has more than one pass.

        Returns how many of the selected stay.
        """
        left = store.count(found.selection)
        while left:
            self._flush(found, flusher)
            before, left = left, store.count(found.selection)
            if left == before:
                break
            store.hurry()
        return left

    def _has_time(self, found: _Pass) -> bool:
        return found.goes_on and self._clock.monotonic() < found.end and found.keep_going()

    def _flush(self, found: _Pass, flusher: Flusher) -> None:
        if self._has_time(found):
            budget_s = found.end - self._clock.monotonic()
            report = drain(flusher, self._clock, budget_s=budget_s, keep_going=found.keep_going)
            found.flush = found.flush.plus(report)

    @contextmanager
    def _opened(self, log_id: str) -> Iterator[LocalStore]:
        """Open an empty buffer; what an interrupted pass left in it is on the Volume still."""
        folder = self._scratch / log_id
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with LocalStore.open(
                folder, tables=self._tables, clock=self._clock, ids=self._ids
            ) as store:
                yield store
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, found: _Pass, name: SegmentName) -> Segment | None:
        try:
            segment = load(self._volume.folder, name, self._keys, environment=self._environment)
        except SegmentCorrupt as error:
            if error.stays:
                found.left[f"{name.path}: {error.reason}"] = None
            else:
                found.bad[name.path] = None
            return None
        except FileNotFoundError:
            return None  # collected meanwhile
        except OSError as error:
            found.left[f"{name.path}: {error.strerror}"] = None
            return None
        for table, version in segment.header.schemas.items():
            if version > self._versions.get(table, version):
                found.left[f"{name.path}: {table} has schema version {version}"] = None
                return None
        return segment

    def _take_in(self, found: _Pass, store: LocalStore, segment: Segment) -> bool:
        """Take a segment in; False when it is too young, as all behind it are."""
        if not segment.transactions:
            found.taken[segment.header.name] = 0
            return True
        newest = max(datetime.fromisoformat(item.accepted_at) for item in segment.transactions)
        if newest > found.older_than:
            found.young.add(segment.header.name)
            return False
        before = 0 if found.selection is None else store.count(found.selection)
        taken = store.adopt(
            # Since when it is held nobody knows here; it can't be longer than it has existed.
            [replace(item, held_since=item.accepted_at) for item in segment.transactions],
            acknowledged_seq=segment.header.acknowledged_seq,
            schemas=segment.header.schemas,
        )
        if found.selection is not None:  # counting costs as much as taking in
            taken = store.count(found.selection) - before
        found.taken[segment.header.name] = taken
        return True

    # -- what is done --

    def _collect(self, done: Sequence[SegmentName]) -> int:
        if not done:
            return 0
        folder = self._volume.folder

        def clear() -> None:
            for name in done:
                remove(folder, name)

        return len(done) if self._volume.commit(clear).state == "committed" else 0

    def _quarantine(self, bad: Sequence[PurePosixPath]) -> tuple[str, ...]:
        if not bad:
            return ()
        folder = self._volume.folder
        moved: list[str] = []

        def move() -> None:
            moved.extend(str(quarantine(folder, path)) for path in bad)

        self._volume.commit(move)
        return tuple(moved)

    def _report(self, found: _Pass, collected: int) -> AdoptionReport:
        return AdoptionReport(
            segments=len(found.names),
            young=len(found.young),
            adopted=sum(found.taken.values()),
            remaining=sum(found.remaining.values()),
            collected=collected,
            quarantined=self._quarantine(list(found.bad)),
            left=tuple(found.left),
            flush=found.flush,
        )


def overlapping(names: Sequence[SegmentName]) -> Iterator[list[SegmentName]]:
    """Yield one log's segments in order, those together whose positions overlap."""
    together: list[SegmentName] = []
    end = 0
    for name in names:
        if together and name.first_seq > end:
            yield together
            together = []
        together.append(name)
        end = max(end, name.last_seq)
    if together:
        yield together
