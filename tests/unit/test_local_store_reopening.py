"""Sending again what was applied: the server came back from an older backup, or it didn't."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import Delete, LocalStore, Outcome, Row, Update
from local_store.clock import ManualClock
from local_store.ops import Rewritten, Selection
from local_store.reopening import REOPENED_AT_ONCE
from tests.unit.buffer_tables import TABLES, USER, add, settle_all, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES, clock=clock) as opened:
        yield opened


def history(store: LocalStore, count: int) -> str:
    """A row with `count` applied transactions; the n-th left version `v<n>` and text `<n>`."""
    row_id = add(store, text="1")
    settle_all(store, "v1")
    for n in range(2, count + 1):
        store.write([Update("notes", row_id, {"text": str(n)})], user_id=USER)
        settle_all(store, f"v{n}")
    return row_id


def base(store: LocalStore, row_id: str) -> str | None:
    """The version that the next change of a row would be sent on."""
    [found] = [row.base for _, row in store.clean_rows() if row.id == row_id]
    return found


def served(row_id: str, version: str, **columns: object) -> Row:
    return {"id": row_id, "user_id": USER, "updated_at": version, **columns}


def test_reopened_transactions_go_out_again_on_what_they_were_applied_on(store: LocalStore):
    row_id = add(store, text="a")
    settle_all(store, version="v1")
    store.write([Update("notes", row_id, {"text": "b"})], user_id=USER)
    settle_all(store, version="v2")
    store.write([Update("notes", row_id, {"text": "c"})], user_id=USER)
    settle_all(store, version="v3")
    since = store.entries()[1]
    assert store.reopen(Selection()) == 3
    made, first, second = waiting(store)
    assert (made.chained, first.chained, second.chained) == ((False,), (True,), (True,))
    store.record([Outcome(made.txn_id, "applied", {f"notes/{row_id}": "v1"})])
    [first, second] = waiting(store)
    assert (first.bases, first.txn_id) == (("v1",), since.txn_id)
    settle_all(store, version="v9")
    row = store.get("notes", row_id, user_id=USER)
    assert row is not None
    assert (row["text"], row["_pending"]) == ("c", False)
    assert store.stats()["pending"] == 0


def test_a_reopened_delete_marks_its_children_again(store: LocalStore):
    parent = add(store)
    child = add(store, "comments", note_id=parent)
    settle_all(store)
    store.write([Delete("notes", parent)], user_id=USER)
    [txn] = waiting(store)
    assert txn.children == ({f"comments/{child}": "v1"},)
    settle_all(store)
    assert store.reopen(Selection(table="notes")) == 2
    assert {found[2] for found in store.transactions_of("comments", child, user_id=USER)} == {
        "pending"
    }


def test_a_replay_goes_on_from_the_versions_that_it_makes(store: LocalStore):
    row_id = history(store, 3)
    store.reopen(Selection())
    made, *_ = waiting(store)
    store.record([Outcome(made.txn_id, "applied", {f"notes/{row_id}": "new1"})])
    first, second = waiting(store)
    assert (first.bases, second.chained) == (("new1",), (True,))
    store.record([Outcome(first.txn_id, "applied", {f"notes/{row_id}": "new2"})])
    assert waiting(store)[0].bases == ("new2",)
    settle_all(store, "new3")
    assert base(store, row_id) == "new3"


def test_older_transactions_replayed_alone_leave_the_row_at_its_newest_version(
    store: LocalStore, clock: ManualClock
):
    row_id = history(store, 2)
    clock.advance(1)
    until = clock.now().isoformat(timespec="microseconds")
    store.write([Update("notes", row_id, {"text": "3"})], user_id=USER)
    settle_all(store, "v3")
    assert store.reopen(Selection(until=until)) == 2
    for version in ("v1", "v2"):
        store.record([Outcome(waiting(store)[0].txn_id, "applied", {f"notes/{row_id}": version})])
    assert base(store, row_id) == "v3"


def test_a_replay_leaves_what_was_read_from_elsewhere_since(store: LocalStore):
    row_id = history(store, 1)
    theirs, as_of = served(row_id, "v7", text="theirs"), store.change_counter()
    store.refresh("notes", [theirs], user_id=USER, as_of=as_of, where={"id": row_id})
    store.reopen(Selection())
    settle_all(store, "v1")
    assert base(store, row_id) == "v7"


def test_after_a_duplicate_a_replay_keeps_the_version_that_somebody_else_made(store: LocalStore):
    row_id = history(store, 1)
    theirs, as_of = served(row_id, "v2", text="theirs"), store.change_counter()
    store.refresh("notes", [theirs], user_id=USER, as_of=as_of, where={"id": row_id})
    store.write([Update("notes", row_id, {"text": "3"})], user_id=USER)
    settle_all(store, "v3")
    store.reopen(Selection())
    store.record([Outcome(waiting(store)[0].txn_id, "applied", {f"notes/{row_id}": "v1"})])
    assert waiting(store)[0].bases == ("v2",)


def test_a_replayed_change_that_met_another_row_builds_on_that_one(store: LocalStore):
    row_id = history(store, 2)
    store.reopen(Selection())
    made, _ = waiting(store)
    store.record([Outcome(made.txn_id, "applied", {f"notes/{row_id}": "new1"})])
    chains = store.chains([("notes", row_id)], user_id=USER)
    [item] = chains.transactions
    more = item.ops[0]._replace(id=add(store), values={"text": "x"})
    wider = Rewritten(item.txn_id, (more, *item.ops), ({}, *item.before), ())
    assert store.rebase(chains, [wider], {f"notes/{row_id}": served(row_id, "met", text="1")})
    [again, _] = waiting(store)
    assert again.bases == (None, "met")
    store.record([Outcome(again.txn_id, "applied", {f"notes/{row_id}": "new2"})])
    assert base(store, row_id) == "new2"


def test_a_change_written_on_top_of_a_replay_goes_on_what_it_makes(store: LocalStore):
    row_id = history(store, 2)
    store.reopen(Selection())
    store.write([Update("notes", row_id, {"text": "3"})], user_id=USER)
    for version in ("new1", "new2"):
        store.record([Outcome(waiting(store)[0].txn_id, "applied", {f"notes/{row_id}": version})])
    [newest] = waiting(store)
    assert (newest.bases, newest.chained) == (("new2",), (False,))


def test_a_long_history_is_reopened_whole(store: LocalStore):
    for n in range(REOPENED_AT_ONCE + 1):
        add(store, id=f"00000000-0000-7000-8000-{n:012}")
    settle_all(store)
    before = store.stats()
    assert (before["pending"], before["bytes"]) == (0, 0)
    assert store.reopen(Selection()) == REOPENED_AT_ONCE + 1
    after = store.stats()
    assert after["pending"] == REOPENED_AT_ONCE + 1
    assert after["bytes"] == sum(txn.size_bytes for txn in waiting(store))
    assert store.reopen(Selection()) == 0


def test_a_change_that_is_confirmed_before_the_replay_behind_it_is_in_the_row_at_once(
    store: LocalStore,
):
    row_id = history(store, 1)
    store.reopen(Selection())
    store.write([Update("notes", row_id, {"text": "2"})], user_id=USER)
    replayed, newer = waiting(store)
    store.record([Outcome(newer.txn_id, "applied", {f"notes/{row_id}": "v2"})])
    row = store.get("notes", row_id, user_id=USER)
    assert (row["text"], row["updated_at"], row["_pending"]) == ("2", "v2", True)
    assert [txn.txn_id for txn in waiting(store)] == [replayed.txn_id]
