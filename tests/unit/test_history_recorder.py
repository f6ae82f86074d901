"""What the history records of calls, and how it is read back and told."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from local_store import Insert, LocalStore
from local_store.clock import ManualClock, new_id
from local_store.errors import BufferFull, CommitUnknown, InvalidWrite
from local_store.ops import user_uuid
from syncer.testkit.history import (
    Finding,
    History,
    Observation,
    assert_clean,
    check,
    findings_text,
    joined,
    observe_remote,
    observe_store,
)
from tests.simulation.remote_model import RemoteModel, ServerRow
from tests.unit.history_world import ANN, BOB, TABLES, World, observe_model, opened


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with opened(tmp_path, 2) as made:
        yield made


def one_op() -> list[Any]:
    return [Insert("notes", {"id": new_id()})]


def test_a_call_is_refused_or_unknown_by_the_error_it_ended_with():
    history = History(ManualClock())
    for error, told in (
        (BufferFull(5.0, "full"), "refused"),
        (InvalidWrite("notes", "x", "no"), "refused"),
        (CommitUnknown("t", "EIO"), "unknown"),
        (KeyboardInterrupt(), "unknown"),
        (ConnectionResetError(), "unknown"),
    ):
        with pytest.raises(type(error)), history.call(ANN, one_op(), new_id()):
            raise error
        assert history.events().calls[-1].told == told
    with history.call(ANN, one_op(), new_id()):
        pass  # the client said nothing
    assert history.events().calls[-1].told == "unknown"


def test_a_call_keeps_its_interval_its_number_and_its_own_copy_of_the_ops():
    clock = ManualClock()
    history, ops = History(clock), one_op()
    with history.call(ANN, ops, new_id().upper()) as call:
        clock.advance(2)
        call.ok()
    ops[0].values["text"] = "changed later"
    [recorded] = history.events().calls
    assert (recorded.begin, recorded.end, recorded.number, recorded.told) == (0.0, 2.0, 1, "ok")
    assert "text" not in recorded.ops[0].values
    assert recorded.txn_id == recorded.txn_id.lower()
    assert recorded.user_id == user_uuid(ANN)


def test_many_threads_record_into_one_history(tmp_path: Path):
    history = History()
    with LocalStore.open(tmp_path, tables=TABLES) as store:
        server = RemoteModel(store.tables)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: history.write(store, one_op(), user_id=ANN), range(100)))
        calls = history.events().calls
        assert sorted(call.number for call in calls) == list(range(1, 101))
        assert_clean(history, joined(observe_store(store), observe_model(server)), TABLES)


def test_calls_told_over_http_are_judged_without_log_and_seq(world: World):
    row_id = new_id()
    txn_id = world.write(0, ANN, Insert("notes", {"id": row_id, "text": "a"})).txn_id
    ops = [Insert("notes", {"id": row_id, "text": "a"})]
    history = History(world.clock)
    history.ok(txn_id=txn_id, user_id=ANN, ops=ops)
    history.unknown(txn_id=new_id(), user_id=ANN, ops=one_op())
    history.refused(txn_id=new_id(), user_id=ANN, ops=one_op())
    assert_clean(history, world.settle(), TABLES)
    history.ok(txn_id=new_id(), user_id=ANN, ops=one_op())
    assert {f.kind for f in check(history, world.settle(), TABLES)} == {"lost"}


def test_an_insert_without_its_key_is_refused_with_a_reason():
    history = History(ManualClock())
    history.ok(txn_id=new_id(), user_id=ANN, ops=[Insert("notes", {"text": "x"})])
    with pytest.raises(ValueError, match="record inserts with their id"):
        check(history, Observation({}), TABLES)


# -- reading back and telling --


def test_rows_and_ledger_can_be_read_back_through_the_remote(world: World):
    world.write(0, ANN, *one_op())
    world.write(1, BOB, *one_op())
    world.settle()
    seen = joined(
        *map(observe_store, world.stores), observe_remote(world.server, TABLES, [ANN, BOB])
    )
    assert len(seen.rows) == len(seen.visible) == len(seen.ledger or ()) == 2
    assert_clean(world.history, seen, TABLES)


def test_more_rows_than_one_read_carries_are_an_error_and_no_silence(world: World):
    for number in range(1_000):
        row = ServerRow(user_uuid(ANN), {}, "v")
        world.server.rows["notes", f"{number}"] = row
    with pytest.raises(ValueError, match="use observe_database"):
        observe_remote(world.server, TABLES, [ANN])


def test_the_text_counts_names_and_shows_the_evidence():
    findings = [
        Finding("lost", f"t{number}", "it is gone", {"seq": number}) for number in range(50)
    ]
    told = findings_text([Finding("order", "t", "too early"), *findings])
    assert told.startswith("50 lost, 1 order\n- order t: too early\n- lost t0: it is gone\n")
    assert "seq: 7" in told
    assert told.endswith("… and 11 more")
    assert findings_text([]) == "nothing to report"


def test_assert_clean_raises_with_the_readable_list(world: World):
    world.write(0, ANN, *one_op())
    with pytest.raises(AssertionError, match="1 lost"):
        assert_clean(world.history, Observation({}), TABLES)
