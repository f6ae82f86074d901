"""What a buffer makes of decisions that it hears of one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from local_store import Delete, Insert, Receipt, Update
from local_store.clock import new_id
from syncer.errors import ReplyTimedOut
from syncer.flusher import Flusher, FlushLimits
from tests.simulation.model_people import OperatedModel
from tests.unit.history_world import ANN, World, opened


def met_by_an_edit(world: World, row_id: str) -> Receipt:
    """Let the second container change a text that was edited since it read it."""
    world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
    world.flush(0)
    world.read(1, ANN)
    world.edit(row_id, text="theirs")
    return world.write(1, ANN, Update("notes", row_id, {"text": "first"}))


def test_of_two_changes_freed_together_the_older_one_never_comes_to_lie_on_top(tmp_path: Path):
    row_id = new_id()
    with opened(tmp_path, 2, OperatedModel) as world:
        server, store = world.server, world.stores[1]
        assert isinstance(server, OperatedModel)
        first = met_by_an_edit(world, row_id)
        world.flush(1)
        between = world.write(1, ANN, Update("notes", row_id, {"title": "between"}))
        second = world.write(1, ANN, Update("notes", row_id, {"text": "second"}))
        world.flush(1)
        behind = [between.txn_id, second.txn_id]
        assert [store.state(txn_id) for txn_id in (first.txn_id, *behind)] == [
            "conflict",
            "held",
            "held",
        ]
        server.resolve(first.txn_id, f"notes/{row_id}", "mine")
        assert server.rows["notes", row_id].values["text"] == "second"
        store.recheck(behind)
        world.flushers[1].flush_once()
        held = store.get("notes", row_id, user_id=ANN)
        assert held is not None
        assert held["text"] == "second"
        world.write(1, ANN, Update("notes", row_id, {"text": "third"}))
        world.settle()
        assert server.rows["notes", row_id].values["text"] == "third"
        assert not server.parked


@pytest.mark.parametrize("heard", [0, 1])
def test_a_change_behind_unheard_decisions_does_not_pass_for_merged_with_what_they_met(
    tmp_path: Path, heard: int
):
    """Whether the buffer has heard of none of them, or of the first one only."""
    row_id = new_id()
    with opened(tmp_path, 2, OperatedModel) as world:
        server, store = world.server, world.stores[1]
        assert isinstance(server, OperatedModel)
        first = met_by_an_edit(world, row_id)
        second = world.write(1, ANN, Update("notes", row_id, {"text": "second"}))
        world.flush(1)
        world.flush(1)
        assert server.parked.keys() == {first.txn_id, second.txn_id}
        third = world.write(1, ANN, Update("notes", row_id, {"title": "third"}))
        world.edit(row_id, title="theirs")
        server.resolve(first.txn_id, f"notes/{row_id}", "theirs")
        store.recheck([first.txn_id][:heard])
        world.flushers[1].flush_once()  # the others aren't asked about yet
        world.settle()
        assert server.rows["notes", row_id].values == {"text": "theirs", "title": "theirs"}
        assert store.state(third.txn_id) == "conflict"


def parked_unheard(world: World) -> None:
    """Let a container hand over what is refused, and never hear that it arrived."""
    server, calls = world.server, []
    park = server.park

    def unheard(*given: Any) -> Any:
        calls.append(park(*given))
        raise ReplyTimedOut("cut")

    server.park = unheard  # type: ignore[method-assign]
    world.flush(0)
    server.park = park  # type: ignore[method-assign]
    assert calls
    one_by_one = FlushLimits(batch_ops_max=1)
    world.flushers[0] = Flusher(world.stores[0], server, limits=one_by_one, clock=world.clock)


def test_what_only_a_record_of_something_discarded_told_of_is_told_of_again(tmp_path: Path):
    row_id = new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
        world.flush(0)
        refused = world.write(0, ANN, Update("notes", row_id, {"title": "poison"}))
        behind = world.write(0, ANN, Update("notes", row_id, {"title": "behind"}))
        parked_unheard(world)
        assert server.parked.keys() == {refused.txn_id, behind.txn_id}
        beside = Insert("notes", {"id": new_id(), "text": "beside it"})
        last = world.write(0, ANN, beside, Update("notes", row_id, {"text": "mine"}))
        world.edit(row_id, text="theirs")
        server.discard([refused.txn_id, behind.txn_id])
        world.settle()
        assert server.rows["notes", row_id].values["text"] == "theirs"
        assert store.state(last.txn_id) == "conflict"


def test_what_a_discarded_change_was_to_tell_of_a_row_that_is_gone_is_told_by_the_next(
    tmp_path: Path,
):
    row_id = new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        refused = world.write(0, ANN, Insert("notes", {"id": row_id, "title": "poison"}))
        behind = world.write(0, ANN, Update("notes", row_id, {"text": "behind"}))
        parked_unheard(world)
        last = world.write(0, ANN, Update("notes", row_id, {"text": "last"}))
        server.discard([refused.txn_id, behind.txn_id])
        world.settle()
        assert store.state(behind.txn_id) == "discarded"
        assert store.state(last.txn_id) == "applied"
        [record] = server.records.values()
        assert (record["outcome"], record["mine"]["text"]) == ("deleted", "last")


def test_a_change_applied_in_the_call_that_brings_the_news_stays_on_top(tmp_path: Path):
    row_id = new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
        refused = world.write(0, ANN, Update("notes", row_id, {"title": "poison"}))
        world.flush(0)
        world.write(0, ANN, Update("notes", row_id, {"title": "later"}))
        server.poison = None
        server.retry([refused.txn_id])
        calls = server.calls
        world.flush(0)
        assert server.calls == calls + 1
        held = store.get("notes", row_id, user_id=ANN)
        assert held is not None
        assert (held["title"], held["updated_at"]) == ("later", server.version("notes", row_id))
        last = world.write(0, ANN, Update("notes", row_id, {"title": "last"}))
        world.settle()
        assert store.state(last.txn_id) == "applied"
        assert server.rows["notes", row_id].values["title"] == "last"


def test_a_row_deleted_in_the_call_that_brings_the_news_is_gone_with_its_children(tmp_path: Path):
    row_id, child_id = new_id(), new_id()
    with opened(tmp_path, 1, OperatedModel) as world:
        server, store = world.server, world.stores[0]
        assert isinstance(server, OperatedModel)
        world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
        world.write(0, ANN, Insert("comments", {"id": child_id, "note_id": row_id, "text": "one"}))
        changes = {"notes": (row_id, {"title": "poison"}), "comments": (child_id, {"text": "two"})}
        refused = world.write(
            0, ANN, *(Update(table, id_, values) for table, (id_, values) in changes.items())
        )
        world.flush(0)
        world.write(0, ANN, Delete("notes", row_id))
        server.poison = None
        server.retry([refused.txn_id])
        calls = server.calls
        world.flush(0)
        assert server.calls == calls + 1
        assert store.get("notes", row_id, user_id=ANN) is None
        assert store.get("comments", child_id, user_id=ANN) is None
