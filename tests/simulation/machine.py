"""A container on memory-backed files that can be killed between any two steps, and a network.

A kill leaves what was written: the folder's bytes are taken at that very moment and put back in
place, into the same files, after the dead process's handles are gone. What a power loss leaves is
for the container's `disk` to say, where it has one (power.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from local_store import LocalStore
from local_store.clock import ManualClock
from local_store.opening import FILE_NAME
from local_store.ops import Row, TableSpec
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.core.wire import Park
from syncer.errors import RemoteUnavailable, ReplyTimedOut, Throttled
from syncer.flusher import Flusher, FlushLimits
from syncer.remote import SeqRange, TableRead
from tests.simulation.files import LOG, Handles, Image, image_of, restore
from tests.simulation.remote_model import RemoteModel

if TYPE_CHECKING:
    from tests.simulation.power import Disk

CALL_S = 0.2


@dataclass(frozen=True)
class Report:
    """What one history did and what is wrong with it."""

    seed: int
    steps: int
    crashes: int
    conflicts: int
    trace: str
    findings: tuple[str, ...]


class Crash(BaseException):
    """The process at these edges ends here; nothing may catch it but the world."""

    def __init__(self, edges: Edges) -> None:
        super().__init__()
        self.edges = edges


@dataclass
class Edges:
    """Every place at which the world can change between two actions of a container.

    When `left` reaches zero the process ends there. `steps` counts those that nobody tells of.
    """

    tell: Callable[[str], None]
    die: Callable[[], None]
    left: int = -1
    steps: int = 0

    def step(self, name: str) -> None:
        """Take a step of which only this process knows, or end there."""
        self.steps += 1
        self.pass_by(name)

    def pass_by(self, name: str) -> None:
        """Go on, or end here."""
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.left = -1
                self.tell(f"crash at {name}")
                self.die()
                raise Crash(self)


def passing_by(commit: Callable[..., Any], edges: Edges) -> Callable[..., Any]:
    """Return a commit of the buffer's file that is an edge once it is done."""

    def committed(*given: Any) -> Any:
        made = commit(*given)
        edges.step("a commit")
        return made

    return committed


class EdgeClock:
    """The world's clock as one container sees it: each look at it is an edge."""

    def __init__(self, clock: ManualClock, edges: Edges) -> None:
        self._clock, self._edges = clock, edges

    def now(self) -> datetime:
        """Return the world's moment."""
        self._edges.step("a look at the clock")
        return self._clock.now()

    def monotonic(self) -> float:
        """Return the world's seconds."""
        self._edges.step("a look at the clock")
        return self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let the world's time pass."""
        self._clock.advance(seconds)


@dataclass
class Network:
    """The way to the modelled server: it refuses, loses, delays, repeats, by the world's dice.

    `step` hears of each thing that happens; `late` holds requests that arrive after their caller
    gave up, in any order.
    """

    server: RemoteModel
    clock: ManualClock
    dice: Random
    step: Callable[[str], None]
    trouble: float = 0.3
    late: list[Callable[[], object]] = field(default_factory=list)
    conflicts: int = 0
    sent: int = 0

    def call(self, name: str, edges: Edges, ask: Callable[[], Any]) -> Any:
        """Carry one request to the server and its reply back."""
        self.clock.advance(CALL_S)  # else no budget of time would ever end
        self.sent += 1
        self.step(f"{name} sent")
        edges.pass_by(f"{name} sent")
        fate = self.dice.random() / self.trouble if self.trouble else 1.0
        if fate < 0.25:
            self.step(f"{name} refused")
            raise self.dice.choice([RemoteUnavailable("refused"), Throttled("later")])
        if fate < 0.45:
            self.step(f"{name} delayed")
            self.late.append(ask)
            raise ReplyTimedOut("no answer in time")
        reply = ask()
        self.step(f"{name} arrived")
        edges.pass_by(f"{name} arrived")
        if fate < 0.6:
            self.step(f"{name} arrived twice")
            reply = ask()
        if fate < 0.85:
            self.step(f"{name} reply lost")
            raise ReplyTimedOut("the reply was lost")
        self.step(f"{name} answered")
        edges.pass_by(f"{name} answered")
        return reply

    def deliver_late(self) -> None:
        """Let one delayed request arrive, after newer ones perhaps; nobody hears the reply."""
        if self.late:
            ask = self.late.pop(self.dice.randrange(len(self.late)))
            with suppress(Exception):  # what the server would have answered
                ask()


@dataclass
class Line:
    """One container's `Remote`: the model behind the network."""

    network: Network
    edges: Edges
    told_rows: bool = False
    told: dict[str, Row] = field(default_factory=dict)
    """The rows that replies to writes have shown, by `table/id`."""

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        """Deliver a batch through the network."""

        def ask() -> tuple[Verdict, ...]:
            found = self.network.server.apply_batch(batch)
            self.network.conflicts += sum(verdict.kind == "conflict" for verdict in found)
            return found

        return self._told(self.network.call("batch", self.edges, ask))

    def park(
        self, log_id: str, acknowledged_seq: int, parks: Sequence[Park]
    ) -> tuple[Verdict, ...]:
        """Hand over through the network."""
        return self._told(self._call("park", "park", log_id, acknowledged_seq, parks))

    def read(
        self, user_id: str, reads: Sequence[TableRead], *, timeout_s: float | None = None
    ) -> list[list[Row]]:
        """Read through the network."""
        rows: list[list[Row]] = self._call("read", "read", user_id, reads)
        self.told_rows = True
        return rows

    def _told(self, verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
        self.told_rows = self.told_rows or any(verdict.rows for verdict in verdicts)
        for verdict in verdicts:
            self.told |= {name: row for name, row in verdict.rows.items() if row}
        return verdicts

    def audit(self, log_id: str | None = None, *, after_seq: int = 0, limit: int = 5_000) -> Row:
        """Ask the model directly: an audit is looked at when all is quiet."""
        return self.network.server.audit(log_id, after_seq=after_seq, limit=limit)

    def settled(self, ranges: Sequence[SeqRange]) -> list[bool]:
        """Ask through the network."""
        told: list[bool] = self._call("settled", "settled", ranges)
        return told

    def _call(self, name: str, method: str, *given: Any) -> Any:
        ask = getattr(self.network.server, method)
        return self.network.call(name, self.edges, lambda: ask(*given))


class Container:
    """One buffer with its flusher, on a folder that outlives both."""

    def __init__(
        self,
        folder: Path,
        tables: Sequence[TableSpec],
        clock: ManualClock,
        network: Network,
        dice: Random,
        handles: Handles,
        disk_of: Callable[[Path], Disk] | None = None,
    ) -> None:
        self._handles, self._disk_of = handles, disk_of
        self.disk = None if disk_of is None else disk_of(folder)
        self.folder, self._tables, self._dice = folder, tables, dice
        self.edges = Edges(network.step, self._die)
        self._clock = EdgeClock(clock, self.edges)
        self.line = Line(network, self.edges)
        self._last: Image = {}
        self.crashes = 0
        self.open()

    def open(self) -> None:
        """Start the process: open the folder as it is."""
        if self.disk is not None:  # what it does is watched from the first call on
            self._handles.drop(self.folder)
        with self._handles.handed_down(self.folder):
            self.store = LocalStore.open(
                self.folder, tables=self._tables, clock=self._clock, ids=self._new_id
            )
        file = self.store._file
        for commit in ("_commit", "append"):
            setattr(file, commit, passing_by(getattr(file, commit), self.edges))
        limits = FlushLimits(batch_ops_max=self._dice.choice([1, 3, 20]))
        self.flusher = Flusher(
            self.store, self.line, limits=limits, clock=self._clock, jitter=self._dice.random
        )

    def arm(self, edges: int) -> None:
        """Let the process end after so many edges."""
        self.edges.left = edges

    def crash(self) -> None:
        """End the process between two actions."""
        self.edges.left = -1
        self._die()
        self.rise()

    def rise(self) -> None:
        """Start again on what the dead process left; it may die again over that."""
        while True:
            self.crashes += 1
            self.abandon()
            restore(self.folder, self._last)
            if self.disk is not None:
                self.disk.risen()
            try:
                self.open()
                return
            except Crash:
                continue

    def lose(self, folder: Path) -> None:
        """End with the disk; what comes up instead has another."""
        self.edges.left = -1
        self.crashes += 1
        self.abandon()
        self.folder = folder
        if self.disk is not None and self._disk_of is not None:
            self.disk.close()
            self.disk = self._disk_of(folder)
        self.open()

    def close(self) -> None:
        """End in order."""
        self.edges.left = -1
        self.store.close()

    def abandon(self) -> None:
        """Let go of files that are put back before anybody looks at them again.

        A dead process moves nothing from its write-ahead log into its file; an emptied one keeps
        the close, where it can't be left out, from spending the time on it.
        """
        if self.disk is None:
            self._handles.take_from(self.store, self.folder)
        with suppress(FileNotFoundError):
            os.truncate(self.folder / f"{FILE_NAME}{LOG}", 0)
        with suppress(Exception):
            self.store.close()

    def leave(self) -> None:
        """End for good; nobody looks at the files again."""
        self.edges.left = -1
        self.abandon()
        if self.disk is not None:
            self.disk.close()

    def _die(self) -> None:
        self._last = image_of(self.folder) if self.disk is None else self.disk.image(self._dice)

    def _new_id(self) -> str:
        return new_id_of(self._clock, self._dice)


def new_id_of(clock: EdgeClock | ManualClock, dice: Random) -> str:
    """Return a UUIDv7 of the world's moment and dice."""
    moment = int(clock.now().timestamp() * 1_000) & (2**48 - 1)
    number = (
        moment << 80 | 0x7 << 76 | dice.getrandbits(12) << 64 | 0b10 << 62 | dice.getrandbits(62)
    )
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
