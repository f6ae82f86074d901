"""The log of the store without a buffer: lost replies, forks, no position left open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest

from local_store import InvalidWrite
from local_store.clock import ManualClock, new_id
from syncer.errors import (
    NotAuthorized,
    OutcomeUnknown,
    RemoteUnavailable,
    ReplyTimedOut,
    SyncError,
    Throttled,
)
from syncer.sessions import (
    RequestKey,
    SupabaseSessionStore,
)
from syncer.sessions.direct_log import SEND_ATTEMPTS_MAX
from tests.simulation.session_model import SessionModel
from tests.unit.session_store.support import ALICE, a_session, got


@dataclass
class Faults:
    """What happens to the next writes, one entry each: an error, or None for nothing.

    `lost` errors come after the commit, `down` ones before it.
    """

    lost: list[SyncError | None] = field(default_factory=list)
    down: list[SyncError | None] = field(default_factory=list)

    def before(self) -> None:
        self._raise_next(self.down)

    def after(self) -> None:
        self._raise_next(self.lost)

    @staticmethod
    def _raise_next(errors: list[SyncError | None]) -> None:
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error


@pytest.fixture
def model() -> SessionModel:
    return SessionModel()


@pytest.fixture
def faults(model: SessionModel) -> Faults:
    made = Faults()
    model.before_call, model.after_commit = made.before, made.after
    return made


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(model: SessionModel, clock: ManualClock) -> SupabaseSessionStore:
    return SupabaseSessionStore(model, ALICE, clock=clock, jitter=lambda: 1.0)


def balanced(model: SessionModel) -> bool:
    """Tell whether no log has a hole: nothing looks lost."""
    return all(
        log["acknowledged_seq"] <= log["applied"]
        and [entry["seq"] for entry in model.audit(log["log_id"])["entries"]]
        == list(range(1, log["applied"] + 1))
        for log in model.audit()["logs"]
    )


# -- positions in the log --------------------------------------------------------------------------


def test_the_writes_of_a_store_are_one_log_without_holes(
    store: SupabaseSessionStore, model: SessionModel
) -> None:
    session = a_session()
    store.create(session)
    for number in range(3):
        session.metadata["n"] = number
        store.update(session)
        assert not store.knows(RequestKey.derive(ALICE, "never used", "x"))
    [log] = model.audit()["logs"]
    assert (log["applied"], log["acknowledged_seq"]) == (4, 4)
    assert balanced(model)


def test_a_refused_write_takes_no_position(
    store: SupabaseSessionStore, model: SessionModel
) -> None:
    session = a_session()
    session.revisions[0].content = "poison"
    with pytest.raises(InvalidWrite) as raised:
        store.create(session)
    assert (raised.value.table, raised.value.column) == ("session_revisions", "values")
    store.create(a_session())
    assert balanced(model)
    assert len(model.ledger) == 1


def test_a_lost_reply_is_asked_for_again_and_leaves_no_hole(
    store: SupabaseSessionStore, model: SessionModel, faults: Faults, clock: ManualClock
) -> None:
    faults.lost = [ReplyTimedOut("lost"), ReplyTimedOut("lost")]
    session = a_session()
    store.create(session)
    assert clock.monotonic() > 0, "it paused before it asked again"
    session.finalize()
    store.update(session)
    assert len(model.ledger) == 2
    assert got(store, session).status == "finalized"
    assert balanced(model)


def test_a_write_that_is_never_answered_leaves_its_log_for_a_new_one(
    store: SupabaseSessionStore, model: SessionModel, faults: Faults
) -> None:
    store.create(a_session())
    faults.lost = [ReplyTimedOut("lost")] * SEND_ATTEMPTS_MAX
    with pytest.raises(OutcomeUnknown):
        store.create(a_session())
    store.create(a_session())
    assert len(store.list_all()) == 3
    assert len(model.logs) == 2
    assert balanced(model)


def test_an_outage_after_a_lost_reply_does_not_say_that_nothing_happened(
    store: SupabaseSessionStore, faults: Faults
) -> None:
    session = a_session()
    faults.lost = [ReplyTimedOut("lost")]
    faults.down = [None, *[RemoteUnavailable("away")] * SEND_ATTEMPTS_MAX]
    with pytest.raises(OutcomeUnknown):
        store.create(session)
    faults.down.clear()
    assert got(store, session) == session


@pytest.mark.parametrize("error", [RemoteUnavailable("away"), NotAuthorized("no"), Throttled("")])
def test_what_certainly_had_no_effect_is_told_at_once(
    store: SupabaseSessionStore, model: SessionModel, faults: Faults, error: SyncError
) -> None:
    faults.down = [error]
    with pytest.raises(type(error)):
        store.create(a_session())
    assert model.calls == 1
    store.create(a_session())
    assert balanced(model)


def test_two_writers_that_share_a_log_since_a_fork_part(
    model: SessionModel, clock: ManualClock
) -> None:
    log_id = new_id()

    def ids() -> Callable[[], str]:
        numbers = count()
        return lambda: log_id if next(numbers) == 0 else new_id()

    parent, child = (SupabaseSessionStore(model, ALICE, clock=clock, ids=ids()) for _ in range(2))
    for store in (parent, child, parent, child):
        store.create(a_session())
    assert len(parent.list_all()) == 4
    assert len(model.logs) == 2
    assert balanced(model)


def test_a_repeat_that_the_ledger_knows_takes_no_second_position(
    store: SupabaseSessionStore, model: SessionModel
) -> None:
    session, request = a_session(), RequestKey.derive(ALICE, "k1", "this")
    store.create(session)
    for _ in range(2):
        store.delete(session.session_id, request=request)
    store.create(a_session())
    assert len(model.ledger) == 3
    assert balanced(model)
