"""One seed, one history: users, containers that die, a bad network, people with SQL, one judge.

Every step has dice of its own, made from the seed and the step's number, so that leaving out some
steps changes nothing in the others: that is how a failing history is made short. While it runs,
each read is compared with what its user was told; when all is quiet the history checker judges the
whole (syncer/testkit/history.py): nothing acknowledged is lost, nothing takes effect twice, per-row
order, no false conflict, no conflict unseen, nobody sees a foreign row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from traceback import clear_frames

from local_store import Delete, Insert, LocalStoreError, Row, Update, user_uuid
from local_store.clock import ManualClock
from local_store.ops import Op
from syncer.errors import SyncError
from syncer.flusher import FlushReport
from syncer.remote import TableRead
from syncer.testkit.fake_volume import FakeVolume
from syncer.testkit.history import Finding, History, check, joined, observe_store
from tests.simulation.files import Handles
from tests.simulation.knowledge import Knowledge
from tests.simulation.machine import Container, Crash, Edges, Network, Report, new_id_of
from tests.simulation.model_people import OperatedModel
from tests.simulation.people import People
from tests.simulation.plans import BY_PEOPLE, ON_A_VOLUME, POWER_EVERY, Plan, possible
from tests.simulation.power import Disk
from tests.simulation.shipping import Harbour
from tests.simulation.watch import NOT_ACCEPTED, Watch
from tests.unit.history_world import TABLES, USERS, observe_model

EDGES_MAX = 40  # of the process that is to end: looks at the clock, commits, parts of a call
TROUBLE, DOWN = 0.3, 4.0  # parts of the requests to which something happens: all are refused
REPEATS = 0.7  # of the calls whose clients got no answer
WORDS = ("one", "two", "three", "four")
CRASHES_MIN = 3
BATCHES_MAX = 50
PEOPLES_LAST = 3  # things that people do about what is parked before all is quiet, twice
QUIET_S, QUIET_PASSES_MAX = 600.0, 20  # every wait of the flusher is over by then


class World:
    """Two containers before one modelled server."""

    def __init__(
        self,
        plan: Plan,
        handles: Handles,
        folders: Sequence[Path],
        spares: Sequence[Path],
        root: Path,
    ) -> None:
        """Begin with a container on each folder; `spares` are for those that lose theirs."""
        self.seed, self.clock, self._plan = plan.seed, ManualClock(), plan
        self.dice = Random(plan.seed)
        self.server = OperatedModel({spec.name: spec for spec in TABLES})
        self.network = Network(self.server, self.clock, self.dice, self.step)
        self.history = History(self.clock)
        self.steps = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self._untold: tuple[Container, str, str, list[Op]] | None = None
        self._down_until = 0.0
        self.wrong: list[str] = []
        disk_of = Disk if plan.seed % POWER_EVERY == 0 else None
        about = (TABLES, self.clock, self.network, self.dice, handles, disk_of)
        self.containers = [Container(folder, *about) for folder in folders]
        self.watch = Watch(self.server, plan.seed)
        self.knowledge = Knowledge(self.server, self.history, self.step)
        ids = partial(new_id_of, self.clock, self.dice)
        self.people = People(self.server, self.history, self.dice, self._text, ids)
        about = (self.clock, self.network, self.dice)
        self.harbour = Harbour(
            FakeVolume(root, clock=self.clock, seed=plan.seed), TABLES, about, spares
        )

    # -- running --

    def step(self, what: str) -> None:
        """Count something that happened, and add it to the trace.

        What only one process knows of is counted there: its looks at the clock and its commits.
        """
        self.steps += 1
        self._trace.update(what.encode())

    def run(self, only: Sequence[int] | None = None) -> Report:
        """Run the planned actions or some of them, then let all become quiet, and judge."""
        try:
            return self._run(self._plan.actions if only is None else only)
        finally:  # the next history has the same files: nobody may have them open
            for container in self.containers:
                self.harbour.leave(container)
                container.leave()

    def _run(self, actions: Sequence[int]) -> Report:
        for number in actions:
            self._reseed(number)
            self._take(number)
        self._reseed(len(self._plan.actions))
        self._quieten()
        findings = [f"{f.kind}: {f}" for f in self._judge()]
        return Report(
            self.seed,
            self.steps + sum(edges.steps for edges in self._edges()),
            sum(container.crashes for container in self.containers),
            self.network.conflicts,
            self._trace.hexdigest(),
            (*self.watch.wrong, *self.wrong, *findings),
        )

    def _edges(self) -> list[Edges]:
        return [self.harbour.edges, *(container.edges for container in self.containers)]

    def _reseed(self, number: int) -> None:
        self.dice.seed(self.seed * 1_000_003 + number)

    def _take(self, number: int) -> None:
        container = self.dice.choice(self.containers)
        if number in self._plan.crashes:
            container.arm(self.dice.randint(1, EDGES_MAX))
        if self.clock.monotonic() >= self._down_until:
            self.network.trouble = TROUBLE
        what = self._what(number)
        self.step(f"{number} {what}")
        try:
            with suppress(LocalStoreError):
                if what in ON_A_VOLUME:
                    getattr(self.harbour, what)(container)
                elif what in BY_PEOPLE:
                    getattr(self.people, what)()
                else:
                    getattr(self, f"_{what}")(container)
            self.watch.look(container)
        except Crash as crash:
            clear_frames(crash.__traceback__)  # cursors there would hold what they have read
            self._rise(crash)
        self.clock.advance(1)

    def _what(self, number: int) -> str:
        """Choose an action among those that have something to act on."""
        if number in self._plan.clashes:
            return "clash"
        if number == 0:
            return "insert"
        likely = possible(self._plan.likely, self.server, self.network)
        return self.dice.choices(list(likely), likely.values())[0]

    def _rise(self, crash: Crash) -> None:
        self.step("risen")
        container = next((each for each in self.containers if each.edges is crash.edges), None)
        if container is None:
            return  # the worker: its next pass begins afresh
        self.harbour.leave(container)
        container.rise()
        self._risen(container)
        self._repeat()

    def _risen(self, container: Container) -> None:
        self.knowledge.after_crash(container)  # a refresh may have been taken before that
        self.watch.risen(container)

    def _quieten(self) -> None:
        """Let the armed die, the late arrive, the network work, and everything be delivered."""
        for container in self.containers:
            if container.edges.left > 0:
                self._end(container)
        while sum(container.crashes for container in self.containers) < CRASHES_MIN:
            self._end(self.dice.choice(self.containers))
        while self.network.late:
            self.network.deliver_late()
        self.network.trouble = 0.0
        self._settle()
        if not self.network.conflicts:
            self._clash(self.containers[0])
        self._settle()  # what one container delivered may have freed what another holds

    def _settle(self) -> None:
        for _ in range(PEOPLES_LAST):
            self._look_after()
        for container in self.containers:
            self._drain(container)
        self.wrong += self.harbour.clear(QUIET_S)

    def _look_after(self) -> None:
        """Let people do one thing about what is parked, if anything is."""
        likely = possible(BY_PEOPLE, self.server, self.network)
        if likely:
            what = self.dice.choices(list(likely), likely.values())[0]
            self.step(f"at last {what}")
            getattr(self.people, what)()

    def _end(self, container: Container) -> None:
        self.harbour.leave(container)
        container.crash()
        self._risen(container)

    def _drain(self, container: Container) -> None:
        for _ in range(QUIET_PASSES_MAX):
            self.clock.advance(QUIET_S)
            for _ in range(BATCHES_MAX):
                if self._pass(container).stopped != "budget":
                    break
            self.knowledge.note(container)
            if not container.store.stats()["pending"]:
                return
        self.wrong.append(f"stuck: {container.store.stats()['pending']} are never delivered")

    def _pass(self, container: Container) -> FlushReport:
        sent, at = self.network.sent, self.clock.monotonic()
        report = container.flusher.flush_once()
        self.watch.passed(container, self.network.sent - sent, at, report)
        return report

    def _judge(self) -> list[Finding]:
        stores = [observe_store(container.store) for container in self.containers]
        seen = joined(*stores, observe_model(self.server))
        return list(check(self.history, seen, TABLES, reads_recorded=True))

    # -- users --

    def _new_id(self) -> str:
        return new_id_of(self.clock, self.dice)

    def _write(self, container: Container, user: str, ops: list[Op], txn_id: str = "") -> None:
        txn_id, sent = txn_id or self._new_id(), self.network.sent
        try:
            receipt = self.history.write(container.store, ops, user_id=user, txn_id=txn_id)
        except Crash:
            self._untold = container, txn_id, user, ops  # its client never heard of it
            raise
        except NOT_ACCEPTED as error:
            self.wrong.append(f"P5: a write was answered by {type(error).__name__}")
            return
        if self.network.sent != sent:
            self.wrong.append("P5: a write asked the server")
        self.watch.acknowledged(container, receipt)
        self._trace.update(txn_id.encode())

    def _mine(self, container: Container) -> tuple[str, Row | None]:
        for user in self.dice.sample(USERS, len(USERS)):
            rows = container.store.select("notes", user_id=user, limit=4)
            if rows:
                return user, self.dice.choice(rows)
        return USERS[0], None

    def _insert(self, container: Container) -> None:
        note, text = self._new_id(), self._text()
        ops: list[Op] = [Insert("notes", {"id": note, "text": text, "due": "2026-01-01T12:00:00Z"})]
        ops += [self._comment(note) for _ in range(self.dice.randrange(3))]
        self._write(container, self.dice.choice(USERS), ops)

    def _comment(self, note: str) -> Insert:
        return Insert("comments", {"id": self._new_id(), "note_id": note, "text": self._text()})

    def _update(self, container: Container) -> None:
        user, note = self._mine(container)
        if note is not None:
            self._write(container, user, [Update("notes", note["id"], self._change())])

    def _change(self) -> Row:
        """Return a change of a note to a value that was never there.

        Work that ends at the value it began with changed nothing: it gives way unrecorded.
        """
        return {self.dice.choice(["text", "text", "title"]): self._text()}

    def _text(self) -> str:
        return f"{self.dice.choice(WORDS)} {self.steps}"

    def _both(self, container: Container) -> None:
        user, note = self._mine(container)
        if note is not None:
            where = {"note_id": note["id"]}
            children = container.store.select("comments", user_id=user, where=where, limit=2)
            ops: list[Op] = [Update("notes", note["id"], {"title": self._text()})]
            ops += [Update("comments", child["id"], {"text": self._text()}) for child in children]
            self._write(container, user, ops)

    def _child(self, container: Container) -> None:
        user, note = self._mine(container)
        if note is not None:
            self._write(container, user, [self._comment(note["id"])])

    def _delete(self, container: Container) -> None:
        user, note = self._mine(container)
        if note is not None:
            self._write(container, user, [Delete("notes", note["id"])])

    def _poison(self, container: Container) -> None:
        user, note = self._mine(container)
        if note is not None:
            self._write(
                container, user, [Update("notes", note["id"], {"title": f"poison {self.steps}"})]
            )

    def _orphan(self, container: Container) -> None:
        self._write(container, self.dice.choice(USERS), [self._comment(self._new_id())])

    def _expect(self, container: Container) -> None:
        """Two writers with one expected version: at most one of them wins."""
        user, note = self._mine(container)
        if note is None:
            return
        version = note["_version"]
        for _ in range(2):
            change = Update("notes", note["id"], self._change(), expected_version=version)
            with suppress(LocalStoreError):
                self._write(container, user, [change])

    def _clash(self, container: Container) -> None:
        """Two containers change one value, neither knowing of the other."""
        other = next(each for each in self.containers if each is not container)
        user, note, trouble = self.dice.choice(USERS), self._new_id(), self.network.trouble
        self.network.trouble = 0.0
        try:
            self._write(container, user, [Insert("notes", {"id": note, "text": self._text()})])
            self._drain(container)
            self._refresh(other, user)
            for each in self.containers:
                change = Update("notes", note, {"text": self._text()})
                with suppress(LocalStoreError):
                    self._write(each, user, [change])
        finally:
            self.network.trouble = trouble

    def _repeat(self) -> None:
        """Repeat the call that its client got no answer to, as soon as its process is back."""
        if self._untold is None:
            return
        container, txn_id, user, ops = self._untold
        self._untold = None
        if self.dice.random() < REPEATS:
            with suppress(LocalStoreError):
                self._write(container, user, ops, txn_id)

    def _look(self, container: Container) -> None:
        """Read one's notes: one's own, as this container last told, and nobody else's."""
        user = self.dice.choice(USERS)
        for row in container.store.select("notes", user_id=user, limit=10):
            self._trace.update(f"{row['id']}{row['text']}{row['title']}".encode())
            if row["user_id"] != user_uuid(user):
                self.wrong.append(f"cross_user: {user} was shown {row['id']}")

    def _refresh(self, container: Container, user: str = "") -> None:
        """Take the server's rows over, as a read through does."""
        user, store = user or self.dice.choice(USERS), container.store
        as_of = store.change_counter()
        with suppress(SyncError):
            reads = [TableRead(spec.name, {}) for spec in TABLES]
            answers = container.line.read(user_uuid(user), reads)
            for spec, rows in zip(TABLES, answers, strict=True):
                store.refresh(spec.name, rows, user_id=user, as_of=as_of, where={})
            self.knowledge.note(container)

    # -- the world --

    def _flush(self, container: Container) -> None:
        report = self._pass(container)
        self.knowledge.note(container)  # a conflict's reply tells, too
        self._trace.update(f"{report.stopped}{report.sent}{report.applied}".encode())

    def _late(self, _container: Container) -> None:
        self.network.deliver_late()

    def _wait(self, _container: Container) -> None:
        self.clock.advance(self.dice.choice([0.1, 5, 30, 90]))

    def _outage(self, _container: Container) -> None:
        """Let nothing through for a while."""
        self._down_until = self.clock.monotonic() + self.dice.choice([10.0, 30.0, 120.0])
        self.network.trouble = DOWN

    def _edit(self, _container: Container) -> None:
        """Change a note as somebody with SQL would."""
        row_id = self._there()
        if row_id is not None:
            text = self._text()
            self.server.edit("notes", row_id, text=text)
            version = self.server.version("notes", row_id)
            self.history.outside_edit("notes", row_id, {"text": text}, version=version)

    def _strike(self, _container: Container) -> None:
        """Delete a note as somebody with SQL would."""
        row_id = self._there()
        if row_id is not None:
            self.server.delete_row(("notes", row_id))
            self.history.outside_delete("notes", row_id)

    def _there(self) -> str | None:
        notes = sorted(row_id for table, row_id in self.server.rows if table == "notes")
        return self.dice.choice(notes) if notes else None

    def _restart(self, container: Container) -> None:
        self.harbour.leave(container)
        container.close()
        container.open()
