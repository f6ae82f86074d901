"""The flusher among others: authors, other flushers, a server that comes back or forgets."""

# ruff: noqa: F811  fixtures are imported, and are arguments
from __future__ import annotations

from local_store import Insert
from local_store.clock import ManualClock, new_id
from syncer.errors import BatchTooLarge, RemoteUnavailable, TookTooLong
from syncer.flusher import Flusher, FlushLimits, drain
from tests.simulation.remote_model import RemoteModel
from tests.unit.test_flusher import (  # noqa: F401  fixtures
    OTHER,
    USER,
    clock,
    flusher,
    note,
    raising,
    server,
    store,
)


def test_a_second_flusher_on_the_folder_leaves_the_first_alone(store, server, clock):
    note(store)
    other = Flusher(store, server, clock=clock, jitter=lambda: 0.5)
    with store.flushing() as mine:
        report = other.flush_once()
    assert mine
    assert (report.sent, report.stopped, server.calls) == (0, "budget", 0)
    assert drain(other, clock, budget_s=10).applied == 1


def test_a_drain_waits_for_its_turn_within_its_budget(store, server, clock):
    note(store)
    with store.flushing():
        report = drain(Flusher(store, server, clock=clock), clock, budget_s=3)
    assert (report.sent, report.pending) == (0, 1)
    assert clock.monotonic() >= 3


def test_a_flood_of_one_author_does_not_keep_another_waiting(store, server, clock):
    for number in range(300):
        note(store, f"n{number}")
    limits = FlushLimits(batch_ops_max=50)
    flusher = Flusher(store, server, limits=limits, clock=clock, jitter=lambda: 0.5)
    flusher.flush_once()
    late = note(store, "from somebody else", user=OTHER)
    flusher.flush_once()
    assert ("notes", late) in server.rows


def test_after_an_outage_the_first_batch_is_small_and_the_next_ones_grow(
    store, flusher, server, clock
):
    for number in range(400):
        note(store, f"n{number}")
    server.before_call = raising(RemoteUnavailable("down"), times=3)
    for _ in range(3):
        flusher.flush_once()
        clock.advance(60)
    sent = [flusher.flush_once().sent for _ in range(4)]
    assert sent[0] <= 10
    assert sent == sorted(set(sent))


def test_a_missing_parent_becomes_a_dead_letter_after_its_time(store, server, clock):
    store.write([Insert("comments", {"note_id": new_id(), "text": "early"})], user_id=USER)
    flusher = Flusher(store, server, clock=clock, jitter=lambda: 0.5)
    for _ in range(70):
        report = flusher.flush_once()
        clock.advance(60)
        if report.rejected:
            break
    assert clock.monotonic() > 3_600
    assert [entry.state for entry in server.parked.values()] == ["dead"]
    assert store.stats()["pending"] == 0


def test_a_forked_log_goes_on_under_a_new_one(store, flusher, server):
    log_id = store.log_id
    note(store, "known here")
    flusher.flush_once()
    taken = next(iter(server.ledger.values()))
    taken.seq = 2  # the original went on after the backup was taken
    lost = [note(store, "a"), note(store, "b")]
    report = drain(flusher, ManualClock(), budget_s=10)
    assert (report.applied, report.rejected) == (2, 0)
    assert all(("notes", row_id) in server.rows for row_id in lost)
    assert store.log_id != log_id


def test_the_server_forgetting_what_was_parked_gets_it_again(store, flusher, server, clock):
    bad = note(store, "poison")
    flusher.flush_once()
    assert list(server.parked)
    server.parked.clear()  # restored from a backup
    clock.advance(120)
    flusher.flush_once()
    assert [entry.state for entry in server.parked.values()] == ["dead"]
    assert store.get("notes", bad, user_id=USER)["_pending"]


def test_what_cannot_even_be_handed_over_is_kept_here_and_delays_nobody(store, server, clock):
    good = [note(store, f"n{number}") for number in range(5)]
    spoiler = store.write([Insert("notes", {"text": "spoils"})], user_id=USER).txn_id

    class Spoilt(RemoteModel):
        def apply(self, p_batch):
            if spoiler in [t["txn_id"] for t in p_batch["transactions"]]:
                raise BatchTooLarge("413")
            return super().apply(p_batch)

        def take(self, p):
            raise BatchTooLarge("413")

    spoilt = Spoilt(server.tables)
    flusher = Flusher(store, spoilt, clock=clock, jitter=lambda: 0.5)
    good += [note(store, f"m{number}") for number in range(5)]
    report = drain(flusher, clock, budget_s=10)
    assert (report.applied, report.rejected, report.stopped) == (10, 1, "empty")
    assert all(("notes", row_id) in spoilt.rows for row_id in good)
    assert store.state(spoiler) == "dead"
    assert store.reply(spoiler)["message"]


def test_what_is_too_slow_by_itself_is_set_aside_and_tried_alone_until_it_fits(
    store, server, clock
):
    slow = store.write([Insert("notes", {"text": "slow"})], user_id=USER)
    behind = note(store, "same author")
    theirs = note(store, "another author", user=OTHER)
    batches, too_slow = [], [True]

    class Slow(RemoteModel):
        def apply(self, p_batch):
            batches.append([t["txn_id"] for t in p_batch["transactions"]])
            if too_slow and slow.txn_id in batches[-1]:
                raise TookTooLong("57014")
            return super().apply(p_batch)

    server = Slow(server.tables)
    flusher = Flusher(store, server, clock=clock, jitter=lambda: 0.5)
    for _ in range(20):
        flusher.flush_once()
        clock.advance(5)
    assert {("notes", behind), ("notes", theirs)} <= set(server.rows)
    assert store.state(slow.txn_id) == "held"
    assert store.reply(slow.txn_id)["message"]
    clock.advance(600)
    later = note(store, "later")
    before = len(batches)
    for _ in range(4):
        flusher.flush_once()
        clock.advance(5)
    assert batches[before:][0] == [slow.txn_id], "it spoils nobody else's batch a second time"
    assert ("notes", later) in server.rows
    too_slow.clear()
    clock.advance(600)
    assert drain(flusher, clock, budget_s=10).applied == 1
    assert store.stats()["pending"] == 0


def test_an_outage_while_handing_over_keeps_the_transaction_pending(store, server, clock):
    note(store, "poison")
    flusher = Flusher(store, server, clock=clock, jitter=lambda: 0.5)

    def cut() -> None:
        if server.calls == 2:
            raise RemoteUnavailable("gone between the two calls")

    server.before_call = cut
    assert flusher.flush_once().stopped == "outage"
    assert (store.stats()["pending"], server.parked) == (1, {})
    clock.advance(60)
    assert flusher.flush_once().rejected == 1
