"""SupabaseSessionStore over the modelled server: what each answer means for the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from local_store import InvalidWrite, TransactionIdReused
from local_store.clock import ManualClock, new_id
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.errors import (
    NotAuthorized,
    OutcomeUnknown,
    ProtocolMismatch,
    Refused,
    RemoteUnavailable,
    ReplyTimedOut,
    SyncError,
    Throttled,
)
from syncer.sessions import (
    ConcurrentModificationError,
    RequestKey,
    SessionNotFound,
    SupabaseSessionStore,
)
from syncer.sessions.direct_log import SEND_ATTEMPTS_MAX
from syncer.sessions.row_store import WRITE_ATTEMPTS_MAX
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


# -- what an answer means --------------------------------------------------------------------------


class Answering(SessionModel):
    """The modelled server, which gives one answer to every write."""

    def __init__(self, **verdict: Any) -> None:
        super().__init__()
        self.verdict = verdict
        self.asked = 0
        self.then: Callable[[], None] = lambda: None

    def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
        self.asked += 1
        self.then()
        return tuple(Verdict(txn_id=t.txn_id, **self.verdict) for t in batch.transactions)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Throttled, {"kind": "held", "sqlstate": "55P03"}),
        (ProtocolMismatch, {"kind": "held", "sqlstate": "42703"}),
        (InvalidWrite, {"kind": "rejected", "sqlstate": "23514", "op": 1}),
        (InvalidWrite, {"kind": "rejected", "sqlstate": "42501"}),
        (TransactionIdReused, {"kind": "rejected", "sqlstate": "SYT01"}),
        (InvalidWrite, {"kind": "conflict"}),
        (Refused, {"kind": "parked", "state": "dead"}),
        (OutcomeUnknown, {"kind": "fenced"}),
    ],
)
def test_each_answer_to_a_creation_has_its_error(
    error: type[Exception], verdict: dict[str, Any]
) -> None:
    with pytest.raises(error):
        SupabaseSessionStore(Answering(**verdict), ALICE).create(a_session())


@pytest.mark.parametrize("sqlstate", ["02000", "23503"])
def test_a_row_that_vanished_without_a_trace_is_looked_for_again(
    model: SessionModel, sqlstate: str
) -> None:
    session = a_session()
    SupabaseSessionStore(model, ALICE).create(session)
    server = Answering(kind="held", sqlstate=sqlstate)
    server.rows = model.rows
    server.then = server.rows.clear
    store = SupabaseSessionStore(server, ALICE)
    found = got(store, session)
    found.finalize()
    with pytest.raises(SessionNotFound):
        store.update(found)
    assert server.asked == 1


@pytest.mark.parametrize("change", ["update", "delete"])
def test_a_row_that_never_holds_still_ends_as_a_conflict(model: SessionModel, change: str) -> None:
    session = a_session()
    SupabaseSessionStore(model, ALICE).create(session)
    server = Answering(kind="conflict")
    server.rows = model.rows
    store = SupabaseSessionStore(server, ALICE)
    found = got(store, session)
    found.finalize()
    with pytest.raises(ConcurrentModificationError) as raised:
        store.update(found) if change == "update" else store.delete(session.session_id)
    assert raised.value.fields == ("*",)
    assert server.asked == WRITE_ATTEMPTS_MAX


# -- reading ---------------------------------------------------------------------------------------


def test_a_session_with_more_children_than_one_read_returns_is_not_shown_cut(
    store: SupabaseSessionStore, model: SessionModel
) -> None:
    session = a_session()
    store.create(session)
    [key] = [key for key in model.rows if key[0] == "session_revisions"]
    for number in range(1_000):
        model.rows["session_revisions", f"{number:036d}"] = model.rows[key]
    for read in (lambda: store.get(session.session_id), store.list_all):
        with pytest.raises(RemoteUnavailable):
            read()


def test_a_session_deleted_while_a_list_is_made_is_left_out(
    model: SessionModel, store: SupabaseSessionStore
) -> None:
    kept, gone = a_session(), a_session()
    for session in (kept, gone):
        store.create(session)
    other = SupabaseSessionStore(model, ALICE)
    calls = count()
    model.before_call = lambda: (
        model.delete_row(("sessions", gone.session_id)) if next(calls) == 1 else None
    )
    assert other.list_all() == [kept]
