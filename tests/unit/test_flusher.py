"""The flusher on a real buffer and a modelled server: what it sends, records and survives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import Column, Delete, Insert, LocalStore, TableSpec, Update
from local_store.clock import ManualClock, new_id
from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    Throttled,
)
from syncer.flusher import Flusher, FlushLimits, drain
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


@pytest.fixture
def flusher(store: LocalStore, server: RemoteModel, clock: ManualClock) -> Flusher:
    return Flusher(store, server, clock=clock, jitter=lambda: 0.5)


def note(store: LocalStore, text: str = "x", user: str = USER) -> str:
    row_id = new_id()
    store.write([Insert("notes", {"id": row_id, "text": text})], user_id=user)
    return row_id


def raising(error: Exception, times: int):
    left = [times]

    def fail() -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error

    return fail


def test_an_empty_buffer_makes_no_call(flusher: Flusher, server: RemoteModel):
    report = flusher.flush_once()
    assert (report.stopped, report.sent, server.calls) == ("empty", 0, 0)


def test_a_write_arrives_and_its_row_becomes_clean(
    store: LocalStore, flusher: Flusher, server: RemoteModel
):
    row_id = note(store, "hello")
    report = flusher.flush_once()
    assert (report.applied, report.pending, report.stopped) == (1, 0, "budget")
    assert server.rows["notes", row_id].values == {"text": "hello"}
    row = store.get("notes", row_id, user_id=USER)
    assert row["_pending"] is False
    assert row["updated_at"] == server.rows["notes", row_id].version


def test_many_edits_of_one_row_arrive_in_order_without_conflict(
    store: LocalStore, flusher: Flusher, server: RemoteModel
):
    row_id = note(store)
    for number in range(5):
        store.write([Update("notes", row_id, {"text": f"v{number}"})], user_id=USER)
        store.write([Insert("comments", {"note_id": row_id, "text": "c"})], user_id=USER)
    report = drain(flusher, ManualClock(), budget_s=10)
    assert (report.applied, report.conflict, report.held) == (11, 0, 0)
    assert server.rows["notes", row_id].values["text"] == "v4"


def test_edits_after_a_flush_build_on_the_server_version(store, flusher, server):
    row_id = note(store)
    flusher.flush_once()
    for number in range(3):
        store.write([Update("notes", row_id, {"text": f"v{number}"})], user_id=USER)
        assert flusher.flush_once().applied == 1
    assert server.rows["notes", row_id].values["text"] == "v2"


def test_a_reply_lost_after_the_commit_makes_no_second_effect(store, flusher, server, clock):
    row_id = note(store)
    store.write([Update("notes", row_id, {"text": "once"})], user_id=USER)
    server.after_commit = raising(ReplyTimedOut("cut"), times=1)
    assert flusher.flush_once().stopped == "outage"
    version = server.rows["notes", row_id].version
    clock.advance(60)
    report = flusher.flush_once()
    assert (report.duplicate, report.applied) == (2, 0)
    assert server.rows["notes", row_id].version == version
    assert store.get("notes", row_id, user_id=USER)["_pending"] is False


def test_without_the_ledger_a_lost_reply_is_found_out(store, flusher, server, clock):
    # The same history on a server that forgets: the insert meets its own row as a conflict.
    server.remembers = False
    note(store)
    server.after_commit = raising(ReplyTimedOut("cut"), times=1)
    flusher.flush_once()
    clock.advance(60)
    assert flusher.flush_once().merged == 1


def test_an_edit_made_while_the_reply_was_lost_chains_on_the_stored_version(
    store, flusher, server, clock
):
    row_id = note(store)
    server.after_commit = raising(ReplyTimedOut("cut"), times=1)
    flusher.flush_once()
    store.write([Update("notes", row_id, {"text": "later"})], user_id=USER)
    clock.advance(60)
    report = flusher.flush_once()
    assert (report.duplicate, report.applied, report.conflict) == (1, 1, 0)


def test_a_delete_knows_what_its_unheard_insert_left_to_the_server(store, flusher, server, clock):
    row_id = new_id()
    store.write([Insert("notes", {"id": row_id})], user_id=USER)
    server.after_commit = raising(ReplyTimedOut("cut"), times=1)
    flusher.flush_once()
    store.write([Delete("notes", row_id)], user_id=USER)
    server.edit("notes", row_id, text="theirs")
    clock.advance(60)
    while store.backlog():
        flusher.flush_once()
    assert server.rows["notes", row_id].values["text"] == "theirs"
    [record] = server.records.values()
    assert (record["outcome"], record["base"]) == ("remote", {"text": None})


def test_an_outage_is_a_report_and_keeps_everything(store, flusher, server, clock):
    note(store)
    server.before_call = raising(RemoteUnavailable("down"), times=10_000)
    for _ in range(5):
        report = flusher.flush_once()
        assert (report.stopped, report.pending) == ("outage", 1)
        clock.advance(10)
    assert report.breaker in ("open", "half_open")
    server.before_call = lambda: None
    assert flusher.flush_once().applied == 1
    assert flusher.breaker == "closed"


def test_in_an_outage_at_most_one_probe_goes_out_per_interval(store, flusher, server, clock):
    note(store)
    server.before_call = raising(RemoteUnavailable("down"), times=10_000)
    while flusher.breaker == "closed":
        flusher.flush_once()
        clock.advance(1)
    calls = server.calls
    for _ in range(1_000):
        flusher.flush_once()
        clock.advance(0.1)
    assert server.calls - calls <= 100 / 5 + 1


def test_retry_after_is_waited_for(store, flusher, server, clock):
    note(store)
    server.before_call = raising(Throttled("slow down", retry_after_s=7), times=1)
    flusher.flush_once()
    clock.advance(6.9)
    flusher.flush_once()
    assert server.calls == 1
    clock.advance(0.2)
    assert flusher.flush_once().applied == 1


@pytest.mark.parametrize(
    ("error", "stopped"), [(NotAuthorized("401"), "auth"), (ProtocolMismatch("no RPC"), "schema")]
)
def test_a_refused_key_or_schema_pauses_and_keeps_everything(
    store, flusher, server, clock, error, stopped
):
    note(store)
    server.before_call = raising(error, times=3)
    for _ in range(3):
        report = flusher.flush_once()
        assert (report.stopped, report.rejected, report.pending) == (stopped, 0, 1)
        clock.advance(6)
    assert flusher.flush_once().applied == 1


def test_a_batch_that_is_too_large_is_halved_to_the_one_that_spoils_it(
    store, server, clock, flusher
):
    kept = [note(store, f"n{number}") for number in range(7)]
    spoiler = note(store, "too much")
    apply = server.apply

    def refusing(p_batch):
        texts = [op["values"]["text"] for t in p_batch["transactions"] for op in t["ops"]]
        if "too much" in texts:
            raise BatchTooLarge("413")
        return apply(p_batch)

    spoilt = RefusingModel(server, refusing)
    flusher = Flusher(store, spoilt, clock=clock, jitter=lambda: 0.5)
    report = drain(flusher, clock, budget_s=10)
    assert (report.applied, report.rejected) == (7, 1)
    assert all(("notes", row_id) in server.rows for row_id in kept)
    assert ("notes", spoiler) not in server.rows
    assert store.stats()["parked"] == 1


class RefusingModel(RemoteModel):
    """The model with another front door."""

    def __init__(self, server: RemoteModel, door) -> None:
        super().__init__(server.tables, rows=server.rows, ledger=server.ledger, logs=server.logs)
        self._door = door

    def apply(self, p_batch):
        return self._door(p_batch)


def test_one_poison_transaction_leaves_the_others_applied_and_its_dependants_held(
    store, flusher, server
):
    good = [note(store, f"n{number}") for number in range(5)]
    bad = note(store, "poison")
    store.write([Insert("comments", {"note_id": bad, "text": "on it"})], user_id=USER)
    store.write([Insert("comments", {"note_id": good[0], "text": "fine"})], user_id=USER)
    report = flusher.flush_once()
    assert (report.applied, report.rejected, report.held) == (6, 1, 1)
    assert sorted(entry.state for entry in server.parked.values()) == ["dead", "held"]
    assert (store.stats()["parked"], store.stats()["pending"]) == (2, 0)
    assert store.get("notes", bad, user_id=USER)["_pending"] is True


def test_a_held_transaction_does_not_keep_new_writes_waiting(store, flusher, server, clock):
    missing_parent = new_id()
    store.write([Insert("comments", {"note_id": missing_parent, "text": "early"})], user_id=USER)
    assert flusher.flush_once().held == 1
    note(store)
    assert flusher.flush_once().applied == 1
    server.rows["notes", missing_parent] = type(next(iter(server.rows.values())))(
        next(iter(server.rows.values())).user_id, {"text": "from elsewhere"}, server._tick()
    )
    clock.advance(60)
    assert flusher.flush_once().applied == 1


def test_a_stale_base_is_a_conflict_with_the_servers_row_and_overwrites_nothing(
    store, flusher, server
):
    row_id = note(store, "base")
    flusher.flush_once()
    server.edit("notes", row_id, text="theirs")
    receipt = store.write([Update("notes", row_id, {"text": "mine"})], user_id=USER)
    report = drain(flusher, ManualClock(), budget_s=10)
    assert report.conflict == 1
    assert server.rows["notes", row_id].values["text"] == "theirs"
    assert store.state(receipt.txn_id) == "conflict"
    [record] = server.records.values()
    assert (record["base"], record["mine"], record["theirs"]) == (
        {"text": "base"}, {"text": "mine"}, {"text": "theirs"},
    )  # fmt: skip
    assert store.get("notes", row_id, user_id=USER)["text"] == "mine"


def test_edits_on_a_row_in_conflict_wait_behind_it(store, flusher, server):
    row_id = note(store, "base")
    flusher.flush_once()
    server.edit("notes", row_id, text="theirs")
    store.write([Update("notes", row_id, {"text": "mine"})], user_id=USER)
    drain(flusher, ManualClock(), budget_s=10)
    store.write([Update("notes", row_id, {"text": "mine again"})], user_id=USER)
    report = flusher.flush_once()
    assert (report.held, report.applied) == (1, 0)
    assert server.rows["notes", row_id].values["text"] == "theirs"


def test_a_delete_behind_a_conflict_that_meets_another_change_waits_there(store, flusher, server):
    """It can't be merged while a person decides; sent again and again it kept the line busy."""
    row_id = note(store, "base")
    flusher.flush_once()
    server.edit("notes", row_id, text="theirs")
    store.write([Update("notes", row_id, {"text": "mine"})], user_id=USER)
    drain(flusher, ManualClock(), budget_s=10)
    server.edit("notes", row_id, text="theirs again")
    receipt = store.write([Delete("notes", row_id)], user_id=USER)
    flusher.flush_once()
    assert store.state(receipt.txn_id) == server.parked[receipt.txn_id].state == "held"
    assert store.stats()["pending"] == 0
    assert flusher.flush_once().stopped == "empty"
    assert server.rows["notes", row_id].values["text"] == "theirs again"


def test_a_delete_behind_a_refused_change_of_an_applied_row_is_applied(store, flusher, server):
    row_id = note(store, "base")
    store.write([Update("notes", row_id, {"text": "poison"})], user_id=USER)
    flusher.flush_once()  # both in one batch: the second one builds on the first
    store.write([Delete("notes", row_id)], user_id=USER)
    assert flusher.flush_once().applied == 1
    assert ("notes", row_id) not in server.rows


def test_insert_update_and_delete_of_one_row_in_the_buffer_end_with_nothing(store, flusher, server):
    row_id = note(store)
    store.write([Insert("comments", {"note_id": row_id, "text": "c"})], user_id=USER)
    store.write([Update("notes", row_id, {"text": "y"})], user_id=USER)
    store.write([Delete("notes", row_id)], user_id=USER)
    report = drain(flusher, ManualClock(), budget_s=10)
    assert (report.applied, report.conflict) == (4, 0)
    assert server.rows == {}


def test_several_ops_on_one_row_in_one_transaction_chain_within_it(store, flusher, server):
    row_id = new_id()
    store.write(
        [
            Insert("notes", {"id": row_id, "text": "a"}),
            Update("notes", row_id, {"text": "b"}),
            Update("notes", row_id, {"text": "c"}),
        ],
        user_id=USER,
    )
    assert flusher.flush_once().applied == 1
    assert server.rows["notes", row_id].values["text"] == "c"


def test_two_users_are_delivered_as_themselves(store, flusher, server):
    mine, theirs = note(store, user=USER), note(store, user=OTHER)
    flusher.flush_once()
    assert server.rows["notes", mine].user_id != server.rows["notes", theirs].user_id


def test_a_pass_is_bounded_in_ops(store, server, clock):
    for _ in range(25):
        note(store)
    limits = FlushLimits(batch_ops_max=10)
    flusher = Flusher(store, server, limits=limits, clock=clock, jitter=lambda: 0.5)
    assert [flusher.flush_once().sent for _ in range(3)] == [10, 10, 5]


def test_a_restart_between_send_and_record_resends_harmlessly(tmp_path: Path, clock):
    with LocalStore.open(tmp_path / "b", tables=TABLES, clock=clock) as store:
        server = RemoteModel(store.tables)
        note(store)
        batch_seen = Flusher(store, server, clock=clock)._next_batch()[0]
        server.apply_batch(batch_seen)  # the process dies here: nothing was recorded
    with LocalStore.open(tmp_path / "b", tables=TABLES, clock=clock) as store:
        report = Flusher(store, server, clock=clock).flush_once()
    assert (report.duplicate, report.applied) == (1, 0)
