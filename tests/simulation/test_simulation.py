"""Thousands of seeded histories, the same trace for the same seed, and a judge that can see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from local_store import BufferFull, LocalStore, opening
from local_store.ops import Outcome
from syncer.core.breaker import Breaker
from tests.simulation import machine, model_people
from tests.simulation.histories import how_to_replay, run, run_all
from tests.simulation.machine import Report
from tests.simulation.model_people import OperatedModel
from tests.simulation.plans import LONG, POWER_EVERY, VOLUME_EVERY
from tests.simulation.remote_model import RemoteModel
from tests.unit.history_world import USERS

FIRST_SEED = int(os.environ.get("SIMULATION_SEED", "1"))
HISTORIES = int(os.environ.get("SIMULATION_HISTORIES", "5000"))
LONG_ONE_IN = 12  # a long one takes as long as six, so a third of the time
JOBS = min(2, os.cpu_count() or 1)
TIMEOUT_S = max(600, HISTORIES)  # a busy machine runs a few histories a second
SEEDS_OF_A_DEFENCE = range(1, 800)  # the rarest, the breaker, shows in one of some 500


@pytest.mark.timeout(TIMEOUT_S)
def test_no_history_loses_doubles_reorders_or_hides_anything() -> None:
    reports = histories(HISTORIES)
    assert min(report.crashes for report in reports) >= 3
    assert min(report.conflicts for report in reports) >= 1
    assert sum(report.steps for report in reports) / len(reports) >= 200


@pytest.mark.timeout(TIMEOUT_S)
def test_no_long_history_does_either() -> None:
    histories(HISTORIES // LONG_ONE_IN, LONG)


def histories(count: int, actions: int | None = None) -> list[Report]:
    reports = list(run_all(range(FIRST_SEED, FIRST_SEED + count), JOBS, actions))
    failed = sorted(report.seed for report in reports if report.findings)
    assert not failed, how_to_replay(failed[0], actions)
    return reports


@pytest.mark.parametrize("seed", [7, VOLUME_EVERY, POWER_EVERY])
def test_a_seed_is_a_history_in_every_process(seed: int) -> None:
    def trace_in_a_process(hash_seed: str) -> str:
        code = f"from tests.simulation.histories import run; print(run({seed}).trace)"
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    here = {run(seed).trace, run(seed).trace}
    assert run(seed).steps == run(seed).steps  # what only a process knows of isn't in the trace
    traces = here | {trace_in_a_process("1"), trace_in_a_process("2")}
    assert len(traces) == 1
    assert run(seed + 1).trace not in traces


# -- a defence that is missing is found out --


def without_ledger(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteModel, "_known", lambda *_: None)
    patch.setattr(RemoteModel, "_seq_taken", lambda *_: False)


def without_compare_and_set(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteModel, "_is_stale", staticmethod(lambda *_: False))


def without_ownership(patch: pytest.MonkeyPatch) -> None:
    """Let reads of the buffer show everybody's rows."""
    select = LocalStore.select

    def everybodys(self: LocalStore, table: str, *, user_id: str, **how: Any) -> Any:
        return [
            row
            for user in ("github:ann", "github:bob")
            for row in select(self, table, user_id=user, **how)
        ]

    patch.setattr(LocalStore, "select", everybodys)


def without_waiting_for_predecessors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteModel, "_blocker", lambda *_: None)


def without_recording_refusals(patch: pytest.MonkeyPatch) -> None:
    """Drop what the server refuses, as many sync engines do."""
    record = LocalStore.record

    def dropping(self: LocalStore, outcomes: Any, **how: Any) -> Any:
        changed = [
            Outcome(item.txn_id, "applied", {}) if item.state == "dead" else item
            for item in outcomes
        ]
        return record(self, changed, **how)

    patch.setattr(LocalStore, "record", dropping)


def without_parking_behind_parked_work(patch: pytest.MonkeyPatch) -> None:
    """Send again what can't be merged because a person has what it builds on."""
    patch.setattr("syncer.flusher.parked_before", lambda *_: None)


def without_the_write_ahead_log(patch: pytest.MonkeyPatch) -> None:
    """Lose at each kill what was acknowledged but is only in the log."""
    die = machine.Container._die

    def without(self: machine.Container) -> None:
        die(self)
        self._last = {n: part for n, part in self._last.items() if not n.endswith("-wal")}

    patch.setattr(machine.Container, "_die", without)


def without_full_synchronous(patch: pytest.MonkeyPatch) -> None:
    """Let commits return before they are synced: a power loss takes what was acknowledged."""
    connect = opening.connect

    def careless(*given: Any, **how: Any) -> Any:
        connection = connect(*given, **how)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    patch.setattr(opening, "connect", careless)


def without_taking_theirs(patch: pytest.MonkeyPatch) -> None:
    """Carry out what its author wrote, whatever a person decided."""
    decided = model_people.decided
    patch.setattr(model_people, "decided", lambda item, record, _: decided(item, record, "mine"))


def without_putting_edits_in(patch: pytest.MonkeyPatch) -> None:
    """Try an edited transaction as it was."""
    replace = OperatedModel._replace

    def as_it_was(self: OperatedModel, txn_id: str, item: Any, *new: str) -> None:
        replace(self, txn_id, {**item, "ops": self.parked[txn_id].item["ops"]}, *new)

    patch.setattr(OperatedModel, "_replace", as_it_was)


@contextmanager
def missing(defence: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        defence(patch)
        yield


@pytest.mark.parametrize(
    "defence",
    [
        without_ledger,
        without_compare_and_set,
        without_ownership,
        without_waiting_for_predecessors,
        without_recording_refusals,
        without_parking_behind_parked_work,
        without_the_write_ahead_log,
        without_full_synchronous,
        without_taking_theirs,
        without_putting_edits_in,
    ],
)
def test_a_missing_defence_is_found_out(defence: Callable[[pytest.MonkeyPatch], None]) -> None:
    with missing(defence):
        for seed in SEEDS_OF_A_DEFENCE:
            with suppress(Exception):  # what breaks outright was found out, too
                if not run(seed).findings:
                    continue
            return
    pytest.fail(f"{defence.__name__} survived {len(SEEDS_OF_A_DEFENCE)} histories")


# -- and what is broken on the way is seen there --


def without_confirmation(patch: pytest.MonkeyPatch) -> None:
    """Count what waits for another as delivered."""
    record = LocalStore.record

    def trusting(self: LocalStore, outcomes: Any, **how: Any) -> Any:
        changed = [
            Outcome(item.txn_id, "applied", {}) if item.state == "held" else item
            for item in outcomes
        ]
        return record(self, changed, **how)

    patch.setattr(LocalStore, "record", trusting)


def without_breaker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Breaker, "allows", lambda *_: True)


def without_owner(patch: pytest.MonkeyPatch) -> None:
    """Give out a row to whoever knows its id."""
    get = LocalStore.get

    def anybodys(self: LocalStore, table: str, id: str, *, user_id: str) -> Any:
        found = (get(self, table, id, user_id=user) for user in (user_id, *USERS))
        return next((row for row in found if row is not None), None)

    patch.setattr(LocalStore, "get", anybodys)


def without_patience(patch: pytest.MonkeyPatch) -> None:
    """Refuse writes when what is undelivered has become old."""
    write = LocalStore.write

    def refusing(self: LocalStore, ops: Any, **how: Any) -> Any:
        if (self.oldest_age_s() or 0.0) > 60.0:
            raise BufferFull(1.0, "age")
        return write(self, ops, **how)

    patch.setattr(LocalStore, "write", refusing)


@pytest.mark.parametrize(
    ("defence", "promise"),
    [
        (without_the_write_ahead_log, "P1"),
        (without_owner, "P4"),
        (without_patience, "P5"),
        (without_breaker, "P6"),
        (without_full_synchronous, "P10"),
        (without_confirmation, "P12"),
    ],
)
def test_a_promise_broken_on_the_way_is_named_there(
    defence: Callable[[pytest.MonkeyPatch], None], promise: str
) -> None:
    with missing(defence):
        for seed in SEEDS_OF_A_DEFENCE:
            if any(finding.startswith(f"{promise}:") for finding in run(seed).findings):
                return
    pytest.fail(f"{promise} without {defence.__name__}: {len(SEEDS_OF_A_DEFENCE)} clean histories")
