"""Replay on a real buffer and a modelled server: what it selects, repeats and reports."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import Column, Insert, LocalStore, TableSpec, Update, user_uuid
from local_store.clock import ManualClock, isoformat, new_id
from local_store.ops import Outcome, Selection
from syncer.errors import RemoteUnavailable
from syncer.flusher import Flusher, FlushLimits
from syncer.remote import TableRead
from syncer.replay import DRY_RUN_TRANSACTIONS_MAX, ReplayReport, differences, replay
from tests.simulation.model_rows import ServerRow
from tests.simulation.remote_model import RemoteModel

USER, OTHER = "github:42", "github:43"
COLUMNS = {
    "id": Column("uuid"),
    "user_id": Column("uuid"),
    "updated_at": Column("timestamp"),
    "text": Column("text"),
}
TABLES = [
    TableSpec("notes", COLUMNS),
    TableSpec("comments", {**COLUMNS, "note_id": Column("uuid")}, parent=("note_id", "notes")),
]
EVERYTHING = Selection()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as opened:
        yield opened


@pytest.fixture
def server(store: LocalStore) -> RemoteModel:
    return RemoteModel(store.tables)


def run(
    store: LocalStore,
    server: RemoteModel,
    clock: ManualClock,
    selection: Selection = EVERYTHING,
    *,
    settled: bool = False,
    budget_s: float = 3_600.0,
    limits: FlushLimits | None = None,
) -> ReplayReport:
    flusher = Flusher(
        store, server, clock=clock, jitter=lambda: 0.5, selection=selection, limits=limits
    )
    return replay(store, flusher, selection, clock, settled=settled, budget_s=budget_s)


def note(store: LocalStore, text: str = "x", user: str = USER) -> str:
    row_id = new_id()
    store.write([Insert("notes", {"id": row_id, "text": text})], user_id=user)
    return row_id


def comment(store: LocalStore, note_id: str) -> str:
    return store.write([Insert("comments", {"note_id": note_id})], user_id=USER).txn_id


def snapshot(server: RemoteModel) -> RemoteModel:
    """The server as a backup holds it."""
    kept = RemoteModel(server.tables)
    restore(kept, server)
    return kept


def restore(server: RemoteModel, backup: RemoteModel) -> None:
    for name in ("rows", "ledger", "logs", "parked", "tombstones", "records", "aliases"):
        setattr(server, name, copy.deepcopy(getattr(backup, name)))


def test_an_empty_buffer_is_complete_without_a_call(store, server, clock):
    report = run(store, server, clock)
    assert (report.complete, report.selected, server.calls) == (True, 0, 0)


def test_everything_selected_is_delivered_and_the_rest_left(store, server, clock):
    for number in range(25):
        note(store, user=USER if number % 2 else OTHER)
    report = run(store, server, clock, Selection(user_id=OTHER), limits=FlushLimits(3))
    assert (report.selected, report.applied, report.remaining, report.complete) == (13, 13, 0, True)
    assert store.stats()["pending"] == 12


def test_since_includes_its_moment_and_until_does_not(store, server, clock):
    moments = []
    for _ in range(3):
        moments.append(isoformat(clock.now()))
        note(store)
        clock.advance(10)
    report = run(store, server, clock, Selection(since=moments[1], until=moments[2]))
    assert (report.selected, report.applied) == (1, 1)
    assert [t.accepted_at for t in store.undelivered()] == [moments[0], moments[2]]


def test_a_table_selects_transactions_with_an_op_on_it(store, server, clock):
    comment(store, note(store))
    alone = run(store, server, clock, Selection(table="comments"))
    assert (alone.selected, alone.held, alone.remaining, alone.complete) == (1, 1, 1, False)
    assert run(store, server, clock, Selection(table="notes")).complete
    assert run(store, server, clock, Selection(table="comments")).applied == 1


def test_what_waits_for_something_else_ends_the_replay_and_stays(store, server, clock):
    comment(store, new_id())  # its parent is in another container's buffer
    note(store)
    report = run(store, server, clock)
    assert (report.applied, report.held, report.remaining, report.reachable) == (1, 1, 1, True)
    assert not report.complete


def test_what_comes_while_it_waits_is_delivered_too(store, server, clock):
    parent = new_id()
    comment(store, parent)
    key, row = ("notes", parent), ServerRow(user_uuid(USER), {"text": "theirs"}, "v1")

    def arrives() -> None:
        if server.calls == 3:
            server.rows[key] = row

    server.before_call = arrives
    report = run(store, server, clock)
    assert (report.complete, report.applied, report.remaining) == (True, 1, 0)


def test_an_outage_ends_the_replay_as_unreachable_and_keeps_everything(store, server, clock):
    note(store)

    def fail() -> None:
        raise RemoteUnavailable("down")

    server.before_call = fail
    report = run(store, server, clock)
    assert (report.reachable, report.complete, report.remaining) == (False, False, 1)
    assert report.error == "down"
    server.before_call = lambda: None
    clock.advance(60)
    assert run(store, server, clock).complete


def test_the_budget_ends_a_replay_between_passes(store, server, clock):
    for _ in range(10):
        note(store)
    server.after_commit = lambda: clock.advance(60)
    report = run(store, server, clock, budget_s=100, limits=FlushLimits(2))
    assert (report.applied, report.remaining, report.complete) == (4, 6, False)


def test_settled_sends_again_what_a_restored_server_forgot(store, server, clock):
    kept = note(store)
    run(store, server, clock)
    backup = snapshot(server)
    store.write([Update("notes", kept, {"text": "y"})], user_id=USER)
    note(store)
    run(store, server, clock)
    before = {key: row.values for key, row in server.rows.items()}
    restore(server, backup)
    report = run(store, server, clock, settled=True)
    assert (report.selected, report.applied, report.duplicate, report.complete) == (3, 2, 1, True)
    assert {key: row.values for key, row in server.rows.items()} == before


def test_a_killed_settled_replay_is_repeated_without_a_second_effect(store, server, clock):
    for _ in range(6):
        note(store)
    run(store, server, clock)
    server.ledger.clear()
    server.rows.clear()

    def killed() -> None:
        if server.calls == end:
            raise KeyboardInterrupt

    end = server.calls + 2
    server.after_commit = killed
    with pytest.raises(KeyboardInterrupt):
        run(store, server, clock, settled=True, limits=FlushLimits(2))
    server.after_commit = lambda: None
    clock.advance(60)
    report = run(store, server, clock, settled=True)
    assert (report.duplicate, report.applied, report.remaining) == (4, 2, 0)
    assert len(server.rows) == 6


def test_settled_hands_over_again_what_was_parked_after_the_backup(store, server, clock):
    backup = snapshot(server)
    store.write([Insert("notes", {"text": "poison"})], user_id=USER)
    assert run(store, server, clock).rejected == 1
    restore(server, backup)
    run(store, server, clock, settled=True)
    assert [entry.state for entry in server.parked.values()] == ["dead"]


def test_a_rebased_transaction_of_a_restored_server_is_sent_on_its_new_base(
    store, server, clock, tmp_path
):
    row_id = note(store)
    run(store, server, clock)
    backup = snapshot(server)
    with LocalStore.open(tmp_path / "other", tables=TABLES, clock=clock) as other:
        store.write([Update("notes", row_id, {"text": "y"})], user_id=USER)
        run(store, server, clock)
        [rows] = server.read(user_uuid(USER), [TableRead("notes", {"id": row_id})])
        counter = other.change_counter()
        other.refresh("notes", rows, user_id=USER, as_of=counter, where={"id": row_id})
        other.write([Update("notes", row_id, {"text": "z"})], user_id=USER)
        run(other, server, clock)
        restore(server, backup)
        assert run(store, server, clock, settled=True).complete
        calls = server.calls
        report = run(other, server, clock, settled=True)
        assert (report.complete, report.applied, server.calls - calls) == (True, 1, 2)
    assert server.rows["notes", row_id].values["text"] == "z"


# -- dry run --


def test_differences_name_live_and_new_values_and_change_nothing(store, server, clock):
    row_id = note(store, "old")
    run(store, server, clock)
    store.write([Update("notes", row_id, {"text": "new"})], user_id=USER)
    fresh = note(store)
    calls = server.calls
    update, insert = differences(store, server, EVERYTHING)
    assert (update.kind, update.live, update.columns) == ("update", True, {"text": ("old", "new")})
    assert (insert.id, insert.live, insert.columns) == (fresh, False, {"text": (None, "x")})
    assert update.to_json()["columns"] == {"text": {"live": "old", "mine": "new"}}
    assert (server.calls, store.stats()["pending"]) == (calls, 2)


def test_differences_show_what_is_due_later_and_nothing_that_is_parked(store, server, clock):
    store.write([Insert("notes", {"text": "poison"})], user_id=USER)
    waiting = comment(store, new_id())
    run(store, server, clock)
    clock.advance(3_600)  # the parked one is due to be asked about
    store.record([Outcome(waiting, "held", retry_after_s=60)])
    assert [found.txn_id for found in differences(store, server, EVERYTHING)] == [waiting]


def test_differences_cover_every_log_of_the_file(store, server, clock):
    note(store)
    store.start_new_log()
    note(store)
    assert len(list(differences(store, server, EVERYTHING))) == 2


def test_differences_are_bounded(store, server):
    for _ in range(DRY_RUN_TRANSACTIONS_MAX + 1):
        note(store)
    assert len(list(differences(store, server, EVERYTHING))) == DRY_RUN_TRANSACTIONS_MAX
