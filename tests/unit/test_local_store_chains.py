"""A row's pending chain, rewritten as a whole on another row of the server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from local_store import Delete, Insert, LocalStore, Outcome, Row, Update
from local_store.clock import ManualClock, new_id
from local_store.ops import Rewritten, StoredTransaction
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all, waiting


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=TABLES, clock=ManualClock()) as opened:
        yield opened


def served(row_id: str, version: str = "v9", **columns: object) -> Row:
    return {"id": row_id, "user_id": USER, "updated_at": version, **columns}


def shown(store: LocalStore, row_id: str, table: str = "notes") -> Row:
    found = store.get(table, row_id, user_id=USER)
    assert found is not None
    return found


def synced(store: LocalStore, **values: object) -> str:
    row_id = add(store, **values)
    settle_all(store)
    return row_id


def write(store: LocalStore, *ops: Insert | Update | Delete) -> str:
    return store.write(list(ops), user_id=USER).txn_id


def as_it_was(item: StoredTransaction, **changes: object) -> Rewritten:
    same = Rewritten(item.txn_id, item.ops, item.before, item.records)
    return replace(same, **changes)  # type: ignore[arg-type]


def test_a_chain_holds_every_unsettled_change_of_a_row_with_what_it_replaced(store: LocalStore):
    row_id = synced(store, text="a", number=1)
    first = write(store, Update("notes", row_id, {"text": "b"}))
    second = write(store, Update("notes", row_id, {"text": "c", "number": 2}))
    write(store, Insert("notes", {}))
    found = store.chains([("notes", row_id)], user_id=USER).transactions
    assert [item.txn_id for item in found] == [first, second]
    assert [item.before for item in found] == [({"text": "a"},), ({"text": "b", "number": 1},)]
    assert store.chains([("notes", row_id)], user_id=OTHER).transactions == ()


def test_a_rebase_puts_the_pending_changes_on_the_servers_row(store: LocalStore):
    row_id = synced(store, text="a", number=1)
    write(store, Update("notes", row_id, {"text": "b"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    server_row = served(row_id, text="a", number=7, status="open")
    assert store.rebase(chains, [], {f"notes/{row_id}": server_row})
    row = shown(store, row_id)
    assert (row["text"], row["number"], row["_pending"]) == ("b", 7, True)
    assert waiting(store)[0].bases == ("v9",)


def test_a_rewritten_transaction_replaces_ops_before_and_records_but_not_its_digest(
    store: LocalStore,
):
    row_id = synced(store, text="a", number=1)
    write(store, Update("notes", row_id, {"text": "b", "number": 2}))
    [old] = waiting(store)
    chains = store.chains([("notes", row_id)], user_id=USER)
    [item] = chains.transactions
    ops = (item.ops[0]._replace(values={"number": 2}),)
    record = {"table": "notes", "id": row_id, "outcome": "remote"}
    new = as_it_was(item, ops=ops, before=({"number": 5},), records=(record,))
    assert store.rebase(chains, [new], {f"notes/{row_id}": served(row_id, text="x", number=5)})
    [txn] = waiting(store)
    assert (txn.ops, txn.before, txn.records) == (ops, ({"number": 5},), (record,))
    assert (txn.digest, txn.txn_id, txn.seq) == (old.digest, old.txn_id, old.seq)
    assert shown(store, row_id)["text"] == "x"
    assert store.stats()["bytes"] == txn.size_bytes < old.size_bytes


def test_all_that_is_pending_on_a_merged_row_says_what_the_merge_met(store: LocalStore):
    row_id = synced(store, text="a")
    name = f"notes/{row_id}"
    write(store, Update("notes", row_id, {"text": "b"}))
    write(store, Update("notes", row_id, {"text": "c"}))
    assert [txn.met for txn in waiting(store)] == [{name: None}] * 2
    chains = store.chains([("notes", row_id)], user_id=USER)
    assert store.rebase(chains, [], {name: served(row_id, text="x")})
    write(store, Update("notes", row_id, {"text": "d"}))
    assert [txn.met for txn in waiting(store)] == [{name: "v9"}] * 3
    store.record([Outcome(waiting(store)[0].txn_id, "applied", {name: "v10"})])
    assert [txn.met for txn in waiting(store)] == [{name: "v9"}] * 2


def test_a_doubted_row_has_no_version_for_what_is_pending_on_it(store: LocalStore):
    row_id = synced(store, text="a")
    first = write(store, Update("notes", row_id, {"text": "b"}))
    write(store, Update("notes", row_id, {"text": "c"}))
    store.record([Outcome(first, "applied", {}, doubted=(f"notes/{row_id}",))])
    [left] = waiting(store)
    assert (left.bases, left.chained) == ((None,), (False,))
    assert shown(store, row_id)["text"] == "c"


def test_a_doubted_row_without_anything_pending_becomes_the_servers(store: LocalStore):
    row_id = synced(store, text="a", number=1)
    txn_id = write(store, Update("notes", row_id, {"text": "b"}))
    name = f"notes/{row_id}"
    learned = {name: served(row_id, text="b", number=7)}
    outcome = Outcome(txn_id, "applied", {name: "v9"}, learned=learned, doubted=(name,))
    before = shown(store, row_id)["_version"]
    store.record([outcome])
    row = shown(store, row_id)
    assert (row["number"], row["updated_at"], row["_pending"]) == (7, "v9", False)
    assert row["_version"] > before
    write(store, Update("notes", row_id, {"number": 8}))
    assert waiting(store)[0].bases == ("v9",)


def test_a_merge_that_met_no_row_is_told_from_none(store: LocalStore):
    row_id = synced(store, text="a")
    write(store, Update("notes", row_id, {"text": "b"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    assert store.rebase(chains, [], {f"notes/{row_id}": None})
    assert waiting(store)[0].met == {f"notes/{row_id}": "gone"}


def test_a_write_to_the_row_since_the_reading_makes_the_rebase_fail(store: LocalStore):
    row_id = synced(store, text="a")
    write(store, Update("notes", row_id, {"text": "b"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    write(store, Update("notes", row_id, {"text": "c"}))
    assert not store.rebase(chains, [], {f"notes/{row_id}": served(row_id, text="x")})
    assert waiting(store)[0].bases == ("v1",)


def test_a_write_to_another_row_does_not_make_the_rebase_fail(store: LocalStore):
    row_id, other = synced(store, text="a"), synced(store)
    write(store, Update("notes", row_id, {"text": "b"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    write(store, Update("notes", other, {"text": "c"}))
    assert store.rebase(chains, [], {f"notes/{row_id}": served(row_id, text="x")})


def test_a_verdict_since_the_reading_makes_the_rebase_fail(store: LocalStore):
    row_id = synced(store, text="a")
    txn_id = write(store, Update("notes", row_id, {"text": "b"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    store.record([Outcome(txn_id, "applied", {f"notes/{row_id}": "v2"})])
    assert not store.rebase(chains, [], {f"notes/{row_id}": served(row_id, text="x")})


def test_a_transaction_that_lost_all_its_ops_is_still_sent_and_builds_on_nothing(
    store: LocalStore,
):
    row_id = synced(store, text="a")
    write(store, Update("notes", row_id, {"text": "b"}))
    write(store, Update("notes", row_id, {"number": 2}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    emptied = as_it_was(chains.transactions[0], ops=(), before=())
    assert store.rebase(chains, [emptied], {f"notes/{row_id}": served(row_id, text="x")})
    first, second = waiting(store)
    assert (first.ops, first.after) == ((), ())
    assert (second.bases, second.chained, second.after) == (("v9",), (False,), ())
    assert shown(store, row_id)["text"] == "x"


def test_a_vanished_delete_brings_its_row_and_children_back(store: LocalStore):
    parent = synced(store, text="a")
    child, gone = new_id(), new_id()
    add(store, "comments", id=child, note_id=parent)
    add(store, "comments", id=gone, note_id=parent)
    settle_all(store)
    write(store, Delete("comments", gone))
    write(store, Delete("notes", parent))
    chains = store.chains([("notes", parent)], user_id=USER)
    kept = as_it_was(chains.transactions[-1], ops=(), before=())
    assert store.rebase(chains, [kept], {f"notes/{parent}": served(parent, text="theirs")})
    assert shown(store, parent)["text"] == "theirs"
    assert shown(store, child, "comments")["note_id"] == parent
    assert store.get("comments", gone, user_id=USER) is None


def test_a_row_that_is_gone_takes_its_clean_children_along(store: LocalStore):
    parent = synced(store, text="a")
    child = add(store, "comments", note_id=parent)
    settle_all(store)
    write(store, Update("notes", parent, {"text": "b"}))
    chains = store.chains([("notes", parent)], user_id=USER)
    emptied = as_it_was(chains.transactions[0], ops=(), before=())
    assert store.rebase(chains, [emptied], {f"notes/{parent}": None})
    assert store.get("notes", parent, user_id=USER) is None
    assert store.get("comments", child, user_id=USER) is None


def test_a_re_insert_survives_the_loss_of_its_row(store: LocalStore):
    row_id = synced(store, text="a")
    write(store, Delete("notes", row_id))
    write(store, Insert("notes", {"id": row_id, "text": "again"}))
    chains = store.chains([("notes", row_id)], user_id=USER)
    assert store.rebase(chains, [], {f"notes/{row_id}": None})
    assert shown(store, row_id)["text"] == "again"


def test_a_discarded_insert_leaves_no_row_behind(store: LocalStore):
    row_id = add(store, text="a")
    [txn] = waiting(store)
    child = add(store, "comments", note_id=row_id)
    store.record([Outcome(txn.txn_id, "discarded", rows={f"notes/{row_id}": None})])
    assert store.get("notes", row_id, user_id=USER) is None
    assert shown(store, child, "comments")["_pending"]


def test_a_discarded_delete_brings_its_children_back(store: LocalStore):
    parent, child, gone, fresh = synced(store, text="a"), new_id(), new_id(), new_id()
    add(store, "comments", id=child, note_id=parent)
    add(store, "comments", id=gone, note_id=parent)
    grandchild = add(store, "replies", comment_id=child)
    lost = add(store, "replies", comment_id=gone)
    settle_all(store)
    write(store, Delete("comments", gone))
    settle_all(store)
    add(store, "comments", id=fresh, note_id=parent)
    txn_id = write(store, Delete("notes", parent))
    store.record([Outcome(txn_id, "conflict", parked=True)])
    store.record([Outcome(txn_id, "discarded", rows={f"notes/{parent}": served(parent)})])
    assert shown(store, child, "comments")["_pending"] is False
    assert shown(store, fresh, "comments")["_pending"] is True
    assert shown(store, grandchild, "replies")["comment_id"] == child
    assert store.get("comments", gone, user_id=USER) is None
    assert store.get("replies", lost, user_id=USER) is None


def test_a_child_that_another_delete_still_covers_stays_deleted(store: LocalStore):
    parent = synced(store, text="a")
    child = add(store, "comments", note_id=parent)
    settle_all(store)
    write(store, Delete("comments", child))
    txn_id = write(store, Delete("notes", parent))
    store.record([Outcome(txn_id, "discarded", rows={f"notes/{parent}": served(parent)})])
    assert store.get("notes", parent, user_id=USER) is not None
    assert store.get("comments", child, user_id=USER) is None


def test_the_local_version_moves_with_the_content_only(store: LocalStore):
    row_id = synced(store, text="a", number=1)
    write(store, Update("notes", row_id, {"text": "b"}))
    before = shown(store, row_id)["_version"]
    chains = store.chains([("notes", row_id)], user_id=USER)
    own = {k: v for k, v in shown(store, row_id).items() if not k.startswith("_")}
    store.rebase(chains, [], {f"notes/{row_id}": {**own, "updated_at": "v9", "number": 7}})
    assert shown(store, row_id)["_version"] == before + 1


def test_what_was_left_to_defaults_is_learned_for_the_row_and_for_pending_changes(
    store: LocalStore,
):
    row_id = add(store, text="a")
    write(store, Update("notes", row_id, {"number": 2, "text": "b"}))
    write(store, Update("notes", row_id, {"number": 3, "status": "closed"}))
    first = waiting(store)[0]
    learned = {f"notes/{row_id}": {"number": 7, "status": "open", "score": 0.5}}
    versions = {f"notes/{row_id}": "v1"}
    store.record([Outcome(first.txn_id, "applied", versions, learned=learned)])
    found = store.chains([("notes", row_id)], user_id=USER).transactions
    assert [item.before for item in found] == [
        ({"text": "a", "number": 7},),
        ({"number": 2, "status": "open"},),
    ]
    row = shown(store, row_id)
    assert (row["number"], row["status"], row["score"]) == (3, "closed", 0.5)


def test_a_row_that_moved_since_tells_nothing_about_defaults(store: LocalStore):
    row_id = add(store, text="a")
    write(store, Update("notes", row_id, {"number": 2}))
    first = waiting(store)[0]
    learned = {f"notes/{row_id}": served(row_id, version="v2", number=9)}
    versions = {f"notes/{row_id}": "v1"}
    store.record([Outcome(first.txn_id, "applied", versions, learned=learned)])
    [item] = store.chains([("notes", row_id)], user_id=USER).transactions
    assert item.before == ({},)


def test_what_waited_for_a_change_that_vanished_is_due_at_once(store: LocalStore):
    parent = synced(store, text="a")
    write(store, Update("notes", parent, {"text": "same"}))
    add(store, "comments", note_id=parent)
    first, child = waiting(store)
    store.record([Outcome(child.txn_id, "held", retry_after_s=600)])
    chains = store.chains([("notes", parent)], user_id=USER)
    emptied = as_it_was(chains.transactions[0], ops=(), before=())
    store.rebase(chains, [emptied], {f"notes/{parent}": served(parent, text="same")})
    assert [txn.txn_id for txn in waiting(store)] == [first.txn_id, child.txn_id]


def test_where_the_server_lost_a_row_its_clean_children_go_and_what_is_pending_on_one_stays(
    store: LocalStore,
):
    parent = synced(store, text="a")
    clean, changed = (add(store, "comments", note_id=parent) for _ in range(2))
    settle_all(store)
    write(store, Update("comments", changed, {"text": "b"}))
    txn_id = write(store, Update("notes", parent, {"text": "b"}))
    store.record([Outcome(txn_id, "discarded", rows={f"notes/{parent}": None})])
    assert store.get("comments", clean, user_id=USER) is None
    assert shown(store, changed, "comments")["text"] == "b"
    assert [txn.ops[0].id for txn in waiting(store)] == [changed]


def test_a_doubted_row_that_nobody_described_stays_as_it_is(store: LocalStore):
    row_id = synced(store, text="a")
    txn_id = write(store, Update("notes", row_id, {"text": "b"}))
    name = f"notes/{row_id}"
    store.record([Outcome(txn_id, "applied", {name: "v2"}, doubted=(name,))])
    row = shown(store, row_id)
    assert (row["text"], row["updated_at"], row["_pending"]) == ("b", "v2", False)


def test_what_is_told_of_tables_that_are_not_known_here_and_of_lost_rows_is_passed_over(
    store: LocalStore,
):
    row_id = add(store, text="a")
    txn_id = waiting(store)[0].txn_id
    learned = {f"others/{row_id}": {"number": 7}, f"notes/{row_id}": None}
    store.record([Outcome(txn_id, "applied", {f"notes/{row_id}": "v1"}, learned=learned)])
    row = shown(store, row_id)
    assert (row["text"], row["number"], row["updated_at"]) == ("a", None, "v1")
    assert store.stats()["pending"] == 0
