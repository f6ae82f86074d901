"""SupabaseSessionStore over the modelled server: what each answer means for the caller."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from local_store import InvalidWrite, Row, TransactionIdReused
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.errors import (
    OutcomeUnknown,
    ProtocolMismatch,
    Refused,
    RemoteUnavailable,
    Throttled,
)
from syncer.sessions import (
    ConcurrentModificationError,
    RequestKey,
    SessionNotFound,
    SupabaseSessionStore,
)
from syncer.sessions.row_store import WRITE_ATTEMPTS_MAX
from tests.simulation.session_model import SessionModel
from tests.unit.session_store.support import ALICE, a_session, got


@pytest.fixture
def model() -> SessionModel:
    return SessionModel()


@pytest.fixture
def store(model: SessionModel) -> SupabaseSessionStore:
    return SupabaseSessionStore(model, ALICE)


def test_the_questions_about_a_request_leave_no_trace(
    store: SupabaseSessionStore, model: SessionModel
) -> None:
    request = RequestKey.derive(ALICE, "k1", "this")
    session = a_session()
    session.session_id = request.row_id("sessions")
    assert store.created_by(request) is None
    store.create(session, request=request)
    version = model.version("sessions", session.session_id)
    assert store.created_by(request) == session
    assert model.version("sessions", session.session_id) == version
    store.delete(session.session_id)
    with pytest.raises(SessionNotFound):
        store.created_by(request)
    assert len(model.ledger) == 2


def test_a_loaded_session_is_changed_once_without_reading_it_again() -> None:
    class Counting(SessionModel):
        reads = 0

        def read(self, *args: Any, **more: Any) -> list[list[Row]]:
            self.reads += 1
            return super().read(*args, **more)

    model = Counting()
    store = SupabaseSessionStore(model, ALICE)
    session = a_session()
    store.create(session)
    loaded = store.load(session.session_id)
    assert loaded is not None
    loaded.finalize()
    store.update(loaded)
    assert (model.reads, got(store, session).status) == (1, "finalized")
    loaded.abandon()
    store.update(loaded)
    assert (model.reads, got(store, session).status) == (3, "abandoned")


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
