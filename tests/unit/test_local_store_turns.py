"""Whose turn it is: authors in turn, logs in order, parked work last, one flusher at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import Insert, LocalStore, Outcome, Update, user_uuid
from local_store.clock import ManualClock, new_id
from local_store.ops import Selection
from tests.unit.buffer_tables import OTHER, TABLES, USER, add, settle_all, waiting


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "a", tables=TABLES, clock=clock) as opened:
        yield opened


def parked(store: LocalStore, txn_id: str, state: str, **more: object) -> None:
    store.record([Outcome(txn_id, state, parked=True, **more)])  # type: ignore[arg-type]


# -- authors in turn --


def test_an_author_who_floods_leaves_room_for_the_others(store: LocalStore):
    for _ in range(120):
        add(store)
    late = add(store, user=OTHER)
    found = store.pending(transactions_max=50, bytes_max=2**40)
    assert len(found) == 50
    assert [txn.ops[0].id for txn in found if txn.user_id == user_uuid(OTHER)] == [late]


def test_an_authors_own_transactions_stay_in_order_and_without_gaps(store: LocalStore):
    rows = [add(store) for _ in range(30)]
    for n in range(30):
        add(store, user=f"github:{n}")
        store.write([Update("notes", rows[n], {"text": "b"})], user_id=USER)
    mine = [
        txn.position
        for txn in store.pending(transactions_max=40, bytes_max=2**40)
        if txn.user_id == user_uuid(USER)
    ]
    everything = [txn.position for txn in waiting(store) if txn.user_id == user_uuid(USER)]
    assert mine == everything[: len(mine)]


def test_the_turn_goes_round_by_author(store: LocalStore):
    for n in range(60):
        add(store, user=f"github:{n}")
    first = store.pending(transactions_max=1_000, bytes_max=2**40)
    last = max(txn.user_id for txn in first)
    second = store.pending(transactions_max=1_000, bytes_max=2**40, after_user=last)
    assert len(first) == 50
    served = Counter(txn.user_id for txn in (*first, *second))
    assert len(served) == 60


def test_authors_whose_work_is_not_due_take_no_turn(store: LocalStore):
    for n in range(60):
        add(store, user=f"github:{n}")
    while due := waiting(store):
        store.record([Outcome(txn.txn_id, "held", retry_after_s=60) for txn in due])
    late = add(store, user="github:late")
    [txn] = store.pending(transactions_max=10, bytes_max=2**40)
    assert txn.ops[0].id == late


def test_a_selection_narrows_what_is_sent(store: LocalStore, clock: ManualClock):
    early = add(store)
    clock.advance(60)
    since = clock.now().isoformat(timespec="microseconds")
    late = add(store)
    theirs = add(store, user=OTHER)
    child = add(store, "comments", note_id=early)

    def found(**given: str) -> list[str]:
        chosen = Selection(**given)
        due = store.pending(transactions_max=9, bytes_max=2**40, selection=chosen)
        assert store.count(chosen) == len(due)
        return [txn.ops[0].id for txn in due]

    assert found(since=since) == [late, theirs, child]
    assert found(until=since) == [early]
    assert found(user_id=OTHER) == [theirs]
    assert found(table="comments") == [child]


def test_what_builds_on_due_work_that_found_no_room_waits_for_it(store: LocalStore):
    add(store)
    row_id = add(store)
    store.write([Update("notes", row_id, {"text": "b"})], user_id=USER)
    first, second, third = waiting(store)
    parked(store, second.txn_id, "dead")
    store.start_new_log([first.txn_id])  # takes the third along; the parked one stays
    assert [txn.txn_id for txn in waiting(store)] == [first.txn_id, third.txn_id]
    store.record([Outcome(second.txn_id, "pending")])
    assert [txn.txn_id for txn in waiting(store)] == [first.txn_id]
    store.record([Outcome(first.txn_id, "held", retry_after_s=60)])
    assert [txn.txn_id for txn in waiting(store)] == [second.txn_id]
    store.record([Outcome(second.txn_id, "held", retry_after_s=60)])
    assert [txn.txn_id for txn in waiting(store)] == [third.txn_id]  # the server holds it


def test_a_turn_is_never_empty_because_of_another_authors_row(store: LocalStore):
    users = sorted([USER, OTHER], key=user_uuid)
    parent = add(store, user=users[1])
    child = add(store, "comments", user=users[0], note_id=parent)
    [found] = store.pending(transactions_max=1, bytes_max=2**40)
    assert found.ops[0].id == child  # the first author's only one, though it will be held
    both = store.pending(transactions_max=2, bytes_max=2**40)
    assert [txn.ops[0].id for txn in both] == [parent, child]


def steps(store: LocalStore) -> int:
    """How many thousand instructions SQLite runs for one idle look at the buffer."""
    found: list[None] = []
    connection = store._file._opened()
    connection.set_progress_handler(lambda: found.append(None), 10)
    try:
        assert waiting(store) == []
        store.stats()
        store.logs()
    finally:
        connection.set_progress_handler(None, 0)
    return len(found)


def test_an_idle_look_costs_the_same_after_a_long_history(store: LocalStore):
    add(store)
    settle_all(store)
    before = steps(store)
    for _ in range(300):
        add(store)
    settle_all(store)
    assert steps(store) <= before + 2


# -- parked work --


def test_parked_transactions_are_asked_about_last_and_only_when_due(
    store: LocalStore, clock: ManualClock
):
    add(store)
    [txn] = waiting(store)
    parked(store, txn.txn_id, "dead", retry_after_s=60)
    fresh = add(store)
    assert [t.ops[0].id for t in waiting(store)] == [fresh]
    clock.advance(61)
    assert [t.parked for t in waiting(store)] == [True, False]
    assert [t.parked for t in store.pending(transactions_max=1, bytes_max=9**9)] == [False]


def test_a_recheck_makes_a_parked_transaction_due(store: LocalStore):
    add(store)
    [txn] = waiting(store)
    parked(store, txn.txn_id, "held", retry_after_s=60)
    assert (waiting(store), store.parked_among([txn.txn_id, new_id()])) == ([], {txn.txn_id})
    store.recheck([txn.txn_id])
    assert len(waiting(store)) == 1


def test_parked_work_is_neither_pending_nor_counted_in_bytes(store: LocalStore):
    add(store)
    [txn] = waiting(store)
    parked(store, txn.txn_id, "held")
    stats = store.stats()
    assert (stats["pending"], stats["bytes"], stats["parked"]) == (0, 0, 1)
    store.record([Outcome(txn.txn_id, "pending")])
    stats = store.stats()
    assert (stats["pending"], stats["bytes"] > 0, stats["parked"]) == (1, True, 0)


def test_what_waited_is_due_once_its_predecessor_is_applied(store: LocalStore):
    row_id = add(store)
    store.write([Update("notes", row_id, {"text": "b"})], user_id=USER)
    add(store, "comments", note_id=row_id)
    first, *others = waiting(store)
    store.record([Outcome(txn.txn_id, "held", retry_after_s=600) for txn in others])
    assert waiting(store) == [first]
    store.record([Outcome(first.txn_id, "applied", {f"notes/{row_id}": "v1"})])
    assert [txn.txn_id for txn in waiting(store)] == [txn.txn_id for txn in others]


def test_held_since_is_the_first_time_and_ends_with_the_state(
    store: LocalStore, clock: ManualClock
):
    add(store)
    [txn] = waiting(store)
    store.record([Outcome(txn.txn_id, "held")])
    since = clock.now().isoformat(timespec="microseconds")
    clock.advance(5)
    store.record([Outcome(txn.txn_id, "held")])
    assert waiting(store)[0].held_since == since
    store.record([Outcome(txn.txn_id, "pending")])
    assert waiting(store)[0].held_since is None


# -- one file, several logs --


def restored(tmp_path: Path, store: LocalStore, clock: ManualClock) -> LocalStore:
    """Yesterday's backup, opened: a copy of the folder under another inode."""
    store.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return LocalStore.open(tmp_path / "b", tables=TABLES, clock=clock)


def test_a_restored_copy_delivers_the_old_log_and_writes_a_new_one(
    tmp_path: Path, store: LocalStore, clock: ManualClock
):
    row_id = add(store)
    old = store.log_id
    with restored(tmp_path, store, clock) as copy:
        receipt = copy.write([Update("notes", row_id, {"text": "b"})], user_id=USER)
        assert (receipt.seq, copy.log_id != old) == (1, True)
        [first] = waiting(copy)
        assert (first.log_id, first.seq) == (old, 1)
        copy.record([Outcome(first.txn_id, "applied", {f"notes/{row_id}": "v1"})])
        [second] = waiting(copy)
        assert (second.log_id, second.seq, second.bases) == (copy.log_id, 1, ("v1",))
        assert [log["log_id"] for log in copy.logs()] == [old, copy.log_id]
        assert [entry.txn_id for entry in copy.entries(log_id=old)] == [first.txn_id]
        assert [entry.txn_id for entry in copy.entries()] == [second.txn_id]


def test_what_is_sealed_at_once_is_of_one_log_and_within_the_bytes(
    tmp_path: Path, store: LocalStore, clock: ManualClock
):
    for text in ("a", "b", "c" * 1_000):
        add(store, text=text)
    sizes = [txn.size_bytes for txn in waiting(store)]
    old = store.log_id
    with restored(tmp_path, store, clock) as copy:
        add(copy)

        def sealable(after: int, bytes_max: int) -> list[tuple[str, int]]:
            found = copy.sealable(after, transactions_max=10, bytes_max=bytes_max)
            return [(txn.log_id, txn.seq) for txn in found]

        assert sealable(0, 2**40) == [(old, 1), (old, 2), (old, 3)]
        assert sealable(0, sum(sizes) - 1) == [(old, 1), (old, 2)]
        assert sealable(2, 1) == [(old, 3)]  # one that is larger than the limit goes alone
        assert sealable(3, 2**40) == [(copy.log_id, 1)]


def test_to_adopt_nothing_changes_nothing(store: LocalStore):
    add(store)
    before = store.stats(), store.change_counter()
    assert store.adopt([], acknowledged_seq=5, schemas={}) == 0
    assert (store.stats(), store.change_counter()) == before


def test_opening_the_same_file_again_goes_on_with_its_log(tmp_path: Path, store: LocalStore):
    log_id = store.log_id
    add(store)
    store.close()
    with LocalStore.open(tmp_path / "a", tables=TABLES) as again:
        assert (again.log_id, again.stats()["last_seq"]) == (log_id, 1)


def test_a_forked_log_is_left_with_all_that_follows(store: LocalStore):
    rows = [add(store) for _ in range(4)]
    old = store.log_id
    first, second, third, fourth = waiting(store)
    store.record([Outcome(third.txn_id, "applied", {f"notes/{rows[2]}": "v1"})])
    fresh = store.start_new_log([second.txn_id])
    assert fresh == store.log_id != old
    [still] = waiting(store)
    assert (still.txn_id, still.log_id, still.seq) == (first.txn_id, old, 1)
    store.record([Outcome(first.txn_id, "applied", {f"notes/{rows[0]}": "v1"})])
    assert [(t.txn_id, t.log_id, t.seq) for t in waiting(store)] == [
        (second.txn_id, fresh, 1),
        (fourth.txn_id, fresh, 2),
    ]
    assert store.write([Insert("notes", {})], user_id=USER).seq == 3
    assert [log["last_seq"] for log in store.logs()] == [3, 3]


def test_each_log_tells_what_waits_in_it(tmp_path: Path, store: LocalStore, clock: ManualClock):
    add(store)
    add(store)
    clock.advance(30)
    with restored(tmp_path, store, clock) as copy:
        add(copy)
        old, new = copy.logs()
        assert (old["pending"], new["pending"]) == (2, 1)
        assert (old["oldest_age_s"], new["oldest_age_s"]) == (30.0, 0.0)
        assert old["bytes"] + new["bytes"] == copy.stats()["bytes"]


# -- one flusher --


def test_one_flusher_works_on_a_folder_at_a_time(tmp_path: Path, store: LocalStore):
    script = (
        "import sys\nfrom local_store import LocalStore\n"
        "from tests.unit.buffer_tables import TABLES\n"
        "with LocalStore.open(sys.argv[1], tables=TABLES) as s, s.flushing() as mine: print(mine)"
    )

    def elsewhere() -> str:
        command = [sys.executable, "-c", script, str(tmp_path / "a")]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout.strip()

    with store.flushing() as mine:
        assert (mine, elsewhere()) == (True, "False")
        with store.flushing() as second:
            assert not second
    assert elsewhere() == "True"


def test_what_was_adopted_already_stays_as_it_is(store: LocalStore, tmp_path: Path) -> None:
    add(store)
    sealed = store.sealable(0, transactions_max=10, bytes_max=10**6)
    with LocalStore.open(tmp_path / "worker", tables=TABLES) as worker:
        taken = [worker.adopt(sealed, acknowledged_seq=1, schemas={}) for _ in range(2)]
        assert (taken, worker.stats()["pending"]) == ([1, 0], 1)
