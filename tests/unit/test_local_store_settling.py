"""The shipping half: what is handed out, what an answer changes, what a refresh may touch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from local_store import Delete, Insert, LocalStore, Outcome, Receipt, Row, Update
from local_store.clock import ManualClock, new_id
from local_store.ops import TransactionState
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as opened:
        yield opened


def write(store: LocalStore, *ops: Insert | Update | Delete) -> Receipt:
    return store.write(list(ops), user_id=USER)


def note(store: LocalStore, row_id: str) -> Row:
    found = store.get("notes", row_id, user_id=USER)
    assert found is not None
    return found


def record(store: LocalStore, txn_id: str, state: TransactionState, **more: object) -> None:
    store.record([Outcome(txn_id, state, **more)])  # type: ignore[arg-type]


def refresh(store: LocalStore, *rows: Row, as_of: int | None = None, **where: object) -> int:
    return store.refresh(
        "notes",
        list(rows),
        user_id=USER,
        as_of=store.change_counter() if as_of is None else as_of,
        where=where,
    )


def served(row_id: str, text: str, version: str = "v9", **more: object) -> Row:
    """A row as the server sends it."""
    return {"id": row_id, "user_id": USER, "updated_at": version, "text": text, **more}


# -- pending --------------------------------------------------------------------------------------


def test_pending_comes_in_seq_order_within_both_limits(store: LocalStore):
    for n in range(6):
        add(store, text="x" * 100 * n)
    everything = waiting(store)
    assert [txn.seq for txn in everything] == [1, 2, 3, 4, 5, 6]
    assert store.pending(transactions_max=2, bytes_max=2**40) == everything[:2]
    three = sum(txn.size_bytes for txn in everything[:3])
    assert store.pending(transactions_max=9, bytes_max=three) == everything[:3]
    assert store.pending(transactions_max=9, bytes_max=three - 1) == everything[:2]


def test_one_transaction_above_the_byte_limit_goes_alone(store: LocalStore):
    add(store, text="x" * 1_000)
    add(store)
    assert [txn.seq for txn in store.pending(transactions_max=9, bytes_max=10)] == [1]


def test_a_change_of_a_clean_row_goes_with_the_servers_version(store: LocalStore):
    row_id = add(store)
    settle_all(store, version="v1")
    write(store, Update("notes", row_id, {"text": "b"}))
    (txn,) = waiting(store)
    assert (txn.bases, txn.chained, txn.after) == (("v1",), (False,), ())
    assert txn.ops[0].to_json() == {
        "table": "notes",
        "kind": "update",
        "id": row_id,
        "values": {"text": "b"},
    }


def test_a_chain_of_changes_names_the_nearest_unsettled_one(store: LocalStore):
    row_id = new_id()
    first = write(store, Insert("notes", {"id": row_id}))
    second = write(store, Update("notes", row_id, {"text": "b"}))
    write(store, Delete("notes", row_id))
    inserted, updated, deleted = waiting(store)
    assert (inserted.bases, inserted.chained, inserted.after) == ((None,), (False,), ())
    assert (updated.bases, updated.chained, updated.after) == ((None,), (True,), (first.txn_id,))
    assert (deleted.bases, deleted.chained, deleted.after) == ((None,), (True,), (second.txn_id,))
    record(store, first.txn_id, "applied", versions={f"notes/{row_id}": "v1"})
    updated, deleted = waiting(store)
    assert (updated.bases, updated.chained, updated.after) == (("v1",), (False,), ())
    assert deleted.chained == (True,)


def test_a_child_waits_for_its_unsettled_parent(store: LocalStore):
    parent = new_id()
    first = write(store, Insert("notes", {"id": parent}))
    add(store, "comments", note_id=parent)
    assert waiting(store)[1].after == (first.txn_id,)
    record(store, first.txn_id, "applied", versions={f"notes/{parent}": "v1"})
    assert waiting(store)[0].after == ()


def test_several_ops_on_one_row_chain_within_their_transaction(store: LocalStore):
    old, new = add(store), new_id()
    settle_all(store, version="v1")
    write(
        store,
        Update("notes", old, {"text": "a"}),
        Insert("notes", {"id": new}),
        Update("notes", old, {"text": "b"}),
        Update("notes", new, {"text": "c"}),
        Insert("comments", {"note_id": new}),
    )
    (txn,) = waiting(store)
    assert txn.bases == ("v1", None, None, None, None)
    assert txn.chained == (False, False, True, True, False)
    assert txn.after == ()  # a transaction never waits for itself


def test_a_parked_predecessor_still_holds_its_successors(store: LocalStore):
    row_id = new_id()
    first = write(store, Insert("notes", {"id": row_id}))
    write(store, Update("notes", row_id, {"text": "b"}))
    record(store, first.txn_id, "dead", retry_after_s=60.0)
    (txn,) = waiting(store)
    assert (txn.after, txn.chained) == ((first.txn_id,), (True,))
    record(store, first.txn_id, "discarded")
    (txn,) = waiting(store)
    assert (txn.after, txn.chained) == ((), (False,))


# -- record ---------------------------------------------------------------------------------------


def test_an_applied_transaction_settles_and_its_version_becomes_the_base(
    store: LocalStore, clock: ManualClock
):
    row_id = add(store, text="a")
    (txn,) = waiting(store)
    clock.advance(5)
    record(store, txn.txn_id, "applied", versions={f"notes/{row_id}": "v1"})
    row = note(store, row_id)
    assert (row["_pending"], row["updated_at"], row["_version"]) == (False, "v1", 1)
    assert store.state(txn.txn_id) == "applied"
    assert waiting(store) == []
    stats = store.stats()
    assert (stats["pending"], stats["bytes"], stats["oldest_age_s"]) == (0, 0, None)


def test_a_row_stays_pending_until_its_last_change_is_applied(store: LocalStore):
    row_id = add(store)
    write(store, Update("notes", row_id, {"text": "b"}))
    first, second = waiting(store)
    record(store, first.txn_id, "applied", versions={f"notes/{row_id}": "v1"})
    assert note(store, row_id)["_pending"]
    record(store, second.txn_id, "applied", versions={f"notes/{row_id}": "v2"})
    assert not note(store, row_id)["_pending"]
    assert note(store, row_id)["updated_at"] == "v2"


def test_a_held_transaction_comes_back_when_it_is_due(store: LocalStore, clock: ManualClock):
    add(store)
    (txn,) = waiting(store)
    record(store, txn.txn_id, "held", retry_after_s=30.0)
    assert (store.state(txn.txn_id), waiting(store)) == ("held", [])
    assert store.stats()["pending"] == 1
    clock.advance(29.9)
    assert waiting(store) == []
    clock.advance(0.1)
    (again,) = waiting(store)
    assert (again.txn_id, again.attempts) == (txn.txn_id, 1)


def test_a_held_transaction_is_not_lost_in_the_future_by_a_clock_stepped_back(
    store: LocalStore, clock: ManualClock
):
    add(store)
    (txn,) = waiting(store)
    record(store, txn.txn_id, "held", retry_after_s=30.0)
    clock.set_wall(clock.now() - timedelta(days=1))
    assert [found.txn_id for found in waiting(store)] == [txn.txn_id]


def test_a_long_wait_is_cut_to_an_hour_and_never_taken_for_none(
    store: LocalStore, clock: ManualClock
):
    add(store)
    (txn,) = waiting(store)
    record(store, txn.txn_id, "held", retry_after_s=86_400.0)
    assert waiting(store) == []
    clock.advance(3_600)
    assert len(waiting(store)) == 1


def test_a_held_transaction_does_not_hide_those_behind_it(store: LocalStore):
    for _ in range(5):
        add(store)
    held = [txn.txn_id for txn in waiting(store)[:3]]
    store.record([Outcome(txn_id, "held", retry_after_s=60) for txn_id in held])
    assert [txn.seq for txn in store.pending(transactions_max=2, bytes_max=2**40)] == [4, 5]


@pytest.mark.parametrize("state", ["conflict", "dead"])
def test_a_parked_transaction_keeps_its_row_pending_with_the_evidence(
    store: LocalStore, state: TransactionState
):
    row_id = add(store)
    (txn,) = waiting(store)
    evidence = {"sqlstate": "23514", "rows": {"a": [1]}}
    record(store, txn.txn_id, state, reply=evidence, retry_after_s=60.0)
    assert note(store, row_id)["_pending"]
    assert (store.state(txn.txn_id), waiting(store)) == (state, [])
    assert store.reply(txn.txn_id) == {"sqlstate": "23514", "rows": {"a": [1]}}
    stats = store.stats()
    assert (stats["pending"], stats["parked"], stats["bytes"]) == (0, 1, 0)
    assert store.transactions_of("notes", row_id, user_id=USER) == [(txn.txn_id, 1, state)]
    record(store, txn.txn_id, "pending")  # a person retries it
    assert [found.txn_id for found in waiting(store)] == [txn.txn_id]
    assert (store.stats()["pending"], store.stats()["parked"]) == (1, 0)


@pytest.mark.parametrize("state", ["applied", "discarded", "superseded"])
def test_recording_twice_is_harmless_and_a_late_answer_reopens_nothing(
    store: LocalStore, state: TransactionState
):
    row_id = add(store)
    (txn,) = waiting(store)
    for later in (state, state, "held", "conflict", "dead", "pending"):
        version = "v1" if later == state else "v-late"
        record(store, txn.txn_id, later, versions={f"notes/{row_id}": version})
        assert store.state(txn.txn_id) == state
    stats = store.stats()
    assert (stats["pending"], stats["parked"], stats["bytes"]) == (0, 0, 0)
    if state == "applied":
        assert note(store, row_id)["updated_at"] == "v1"
    else:  # it came to nothing, and so did its row
        assert store.get("notes", row_id, user_id=USER) is None


def test_an_answer_for_an_unknown_transaction_changes_nothing(store: LocalStore):
    row_id = add(store)
    record(store, new_id(), "applied", versions={f"notes/{row_id}": "v1"})
    assert note(store, row_id)["_pending"]
    assert store.stats()["pending"] == 1


def test_the_entries_of_the_log_page_through_everything(store: LocalStore):
    for _ in range(5):
        add(store)
    first, second, *_ = waiting(store)
    record(store, first.txn_id, "applied")
    page = store.entries(limit=2)
    assert [(e.seq, e.txn_id, e.state) for e in page] == [
        (1, first.txn_id, "applied"),
        (2, second.txn_id, "pending"),
    ]
    assert page[1].digest == second.digest
    assert [entry.seq for entry in store.entries(after_seq=2)] == [3, 4, 5]


# -- refresh --------------------------------------------------------------------------------------


def test_a_refresh_brings_in_rows_that_were_not_known(store: LocalStore):
    row_id = new_id()
    assert refresh(store, served(row_id, "theirs", counter=7)) == 1
    row = note(store, row_id)
    assert (row["text"], row["counter"], row["updated_at"]) == ("theirs", 7, "v9")
    assert (row["_pending"], row["_version"]) == (False, 1)
    assert store.get("notes", row_id, user_id=OTHER) is None
    write(store, Update("notes", row_id, {"text": "mine"}))
    assert waiting(store)[0].bases == ("v9",)


def test_a_refresh_touches_clean_rows_only(store: LocalStore):
    clean, pending = add(store, text="a"), add(store, text="a")
    settle_all(store)
    write(store, Update("notes", pending, {"text": "mine"}))
    assert refresh(store, served(clean, "theirs"), served(pending, "theirs")) == 1
    assert note(store, clean)["text"] == "theirs"
    assert note(store, clean)["_version"] == 2
    assert note(store, pending)["text"] == "mine"
    assert waiting(store)[0].bases == ("v1",)  # only a verdict moves the base


def test_a_refresh_leaves_rows_alone_that_changed_after_it_was_asked_for(store: LocalStore):
    row_id = add(store, text="a")
    settle_all(store)
    asked = store.change_counter()
    write(store, Update("notes", row_id, {"text": "newer"}))
    settle_all(store, version="v2")
    assert refresh(store, served(row_id, "older", "v1"), as_of=asked) == 0
    assert refresh(store, as_of=asked) == 0  # nor is it dropped, though the reply lacked it
    assert (note(store, row_id)["text"], note(store, row_id)["updated_at"]) == ("newer", "v2")
    assert refresh(store, served(row_id, "newest", "v3")) == 1


def test_a_refresh_drops_clean_rows_that_the_server_no_longer_has(store: LocalStore):
    gone, kept, elsewhere = (add(store, text=text) for text in ("a", "a", "b"))
    settle_all(store)
    pending = add(store, text="a")
    theirs = add(store, text="a", user=OTHER)
    assert refresh(store, served(kept, "a", "v1"), text="a") == 2
    assert store.get("notes", gone, user_id=USER) is None
    assert not store.is_held("notes", gone, user_id=USER)
    for row_id in (kept, elsewhere, pending):
        note(store, row_id)
    assert store.get("notes", theirs, user_id=OTHER) is not None


def test_a_refresh_never_resurrects_a_row_whose_delete_is_pending(store: LocalStore):
    row_id = add(store)
    settle_all(store)
    asked = store.change_counter()
    write(store, Delete("notes", row_id))
    assert refresh(store, served(row_id, "still there")) == 0
    assert store.get("notes", row_id, user_id=USER) is None
    settle_all(store)
    assert refresh(store, served(row_id, "late"), as_of=asked) == 0
    assert store.get("notes", row_id, user_id=USER) is None


def test_what_the_server_changed_here_moves_the_change_counter(store: LocalStore):
    seen = [store.change_counter()]

    def moved() -> bool:
        seen.append(store.change_counter())
        return seen[-1] > seen[-2]

    row_id = add(store)  # a row with a change of its own isn't refreshed anyway
    assert not moved()
    settle_all(store)
    assert moved()
    refresh(store, served(row_id, "b"))
    assert moved()
    store.get("notes", row_id, user_id=USER)
    waiting(store)
    assert not moved()


def test_clean_rows_page_through_what_an_audit_may_compare(store: LocalStore):
    clean, gone, pending = (add(store, text=text) for text in ("a", "b", "c"))
    write(store, Delete("notes", gone))
    settle_all(store)
    write(store, Update("notes", pending, {"text": "d"}))
    (position, first), (_, second) = store.clean_rows()
    assert (first.id, first.base, first.deleted, first.values["text"]) == (clean, "v1", False, "a")
    assert (second.id, second.base, second.deleted) == (gone, None, True)
    assert [row.id for _, row in store.clean_rows(after=position)] == [gone]
    assert [row.id for _, row in store.clean_rows(limit=1)] == [clean]
