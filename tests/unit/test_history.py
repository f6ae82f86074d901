"""The history checker and its recorder: silent on correct runs, telling on broken servers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_store import Delete, Insert, Update
from local_store.clock import new_id
from local_store.errors import LocalStoreError
from local_store.ops import user_uuid
from syncer.testkit.history import (
    Finding,
    Observation,
    ParkedRecord,
    assert_clean,
    check,
    findings_text,
    joined,
)
from tests.simulation.machine import image_of, restore
from tests.simulation.remote_model import RemoteModel
from tests.unit.history_world import ANN, BOB, TABLES, World, comment, observe_model, opened


def kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


def judge(world: World, seen: Observation) -> list[Finding]:
    return check(world.history, seen, TABLES, reads_recorded=True)


def words(number: int) -> str:
    return f"text {number}"


# -- correct runs are silent --

STEPS = ("insert", "update", "both", "delete", "read", "flush", "lose", "down", "edit", "edit")
MORE = (
    "poison",
    "invalid",
    "untold",
    "unheard",
    "repeat",
    "restart",
    "discard",
    "orphan",
    "strike",
)
step = st.tuples(st.sampled_from(STEPS + MORE), st.integers(0, 2), st.integers(0, 7))


@settings(max_examples=int(os.environ.get("HISTORY_EXAMPLES", "60")), deadline=None)
@given(st.lists(step, max_size=45))
def test_random_correct_runs_have_nothing_to_report(steps: list[tuple[str, int, int]]):
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder), 3) as world:
        for count, (what, number, pick) in enumerate(steps):
            take(world, what, number, pick, words(count % 7))  # values come again, as in life
        seen = world.settle()
        for reads_recorded in (True, False):
            found = check(world.history, seen, TABLES, reads_recorded=reads_recorded)
            assert not found, findings_text(found)
        assert_clean(world.history, replace(seen, ledger=None), TABLES)


def take(world: World, what: str, number: int, pick: int, text: str) -> None:
    """Take one step of a random run; steps that find nothing to do do nothing."""
    user = (ANN, BOB)[pick % 2]
    notes = [row["id"] for row in world.stores[number].select("notes", user_id=user)]
    mine = notes[pick % len(notes)] if notes else None
    with suppress(LocalStoreError):
        if what in ("flush", "lose", "down", "restart", "read"):
            move(world, what, number, user)
        elif what in ("insert", "untold", "unheard", "orphan", "repeat"):
            begin(world, what, number, user, text)
        elif what in ("edit", "strike"):
            meddle(world, what, pick, text)
        elif what == "discard":
            discard(world, number)
        elif mine is not None:
            change(world, what, number, user, mine, text)


def move(world: World, what: str, number: int, user: str) -> None:
    if what == "restart":
        world.restart(number)
    elif what == "read":
        world.read(number, user)
    else:
        world.flush(number, {"lose": "lost reply", "down": "down"}.get(what, ""))


def begin(world: World, what: str, number: int, user: str, text: str) -> None:
    born = Insert("notes", {"id": new_id(), "text": text, "due": "2026-01-01T12:00:00Z"})
    ops = [born, comment(born.values["id"], text), comment(born.values["id"], text)]
    if what == "insert":
        world.write(number, user, *ops)
    elif what == "orphan":
        world.write(number, user, comment(new_id(), text))
    elif what == "repeat" and world.repeatable:
        txn_id, author, same = world.repeatable[-1]
        world.write(number, author, *same, txn_id=txn_id)
    elif what in ("untold", "unheard"):
        world.write_untold(number, user, *ops, happens=what == "untold")


def change(world: World, what: str, number: int, user: str, mine: str, text: str) -> None:
    comments = world.stores[number].select("comments", user_id=user, where={"note_id": mine})
    if what == "update":
        world.write(number, user, Update("notes", mine, {"text": text}))
    elif what == "poison":
        world.write(number, user, Update("notes", mine, {"title": "poison"}))
    elif what == "invalid":
        world.write(number, user, Update("notes", mine, {"nonsense": 1}))
    elif what == "delete" and comments:
        world.write(number, user, Delete("comments", comments[0]["id"]))
    elif what == "delete":
        world.write(number, user, Delete("notes", mine))
    elif what == "both":
        ops = [Update("comments", comments[0]["id"], {"text": text})] if comments else []
        world.write(number, user, Update("notes", mine, {"title": text}), *ops)


def meddle(world: World, what: str, pick: int, text: str) -> None:
    there = sorted(row_id for table, row_id in world.server.rows if table == "notes")
    if there and what == "edit":
        world.edit(there[pick % len(there)], versioned=pick < 4, text=text)
    elif there:
        world.strike(there[pick % len(there)])


def discard(world: World, number: int) -> None:
    store = world.stores[number]
    for entry in store.entries():
        if entry.state == "dead":
            world.discard(number, entry.txn_id)
            return


# -- broken servers are found --


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with opened(tmp_path, 2) as made:
        yield made


def test_without_the_ledger_a_lost_reply_is_found_out(world: World):
    world.server.remembers = False
    born = Insert("notes", {"id": new_id(), "text": "once"})
    world.write(0, ANN, born)
    world.flush(0, "lost reply")
    seen = world.settle()
    found = check(world.history, seen, TABLES)
    assert kinds(found) == {"lost"}, findings_text(found)


class Careless(RemoteModel):
    """The model without compare-and-set: the last writer wins, whatever it knew."""

    @staticmethod
    def _is_stale(*args: Any) -> bool:
        return False


@pytest.fixture
def careless(tmp_path: Path) -> Iterator[World]:
    with opened(tmp_path, 2, Careless) as made:
        yield made


def two_writers(world: World) -> str:
    """Let two containers change one field, neither knowing the other; the second one waits."""
    row_id = new_id()
    world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
    world.flush(0)
    world.read(1, ANN)
    world.write(0, ANN, Update("notes", row_id, {"text": "theirs"}))
    world.write(1, ANN, Update("notes", row_id, {"text": "mine"}))
    world.flush(0)
    return row_id


def test_without_compare_and_set_the_overwritten_value_is_unsurfaced(careless: World):
    row_id = two_writers(careless)
    seen = careless.settle()
    found = check(careless.history, seen, TABLES, reads_recorded=True)
    assert kinds(found) == {"unsurfaced_conflict"}, findings_text(found)
    # Without recorded reads the second writer may have known the first.
    assert check(careless.history, seen, TABLES) == []
    record = ParkedRecord(
        careless.history.events().calls[-1].txn_id,
        "conflict",
        frozenset([("notes", row_id)]),
        frozenset(["text"]),
        outcome="local",
    )
    told = joined(seen, Observation({}, records=(record,)))
    assert check(careless.history, told, TABLES, reads_recorded=True) == []


@pytest.mark.parametrize("versioned", [True, False])
def test_an_edit_by_hand_that_a_waiting_write_overwrites_is_unsurfaced(
    careless: World, versioned: bool
):
    row_id = two_writers(careless)
    careless.flush(1)
    careless.write(0, ANN, Update("notes", row_id, {"text": "written before the edit"}))
    careless.edit(row_id, versioned=versioned, text="by hand")
    found = check(careless.history, careless.settle(), TABLES)
    assert kinds(found) == {"unsurfaced_conflict"}, findings_text(found)


def test_a_delete_over_an_unknown_edit_is_unsurfaced(careless: World):
    row_id = two_writers(careless)
    careless.flush(1)
    careless.write(0, ANN, Delete("notes", row_id))
    careless.edit(row_id, text="too late")
    found = check(careless.history, careless.settle(), TABLES)
    assert kinds(found) == {"unsurfaced_conflict"}, findings_text(found)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_conflict_with_what_a_power_loss_took_is_none_of_the_false_ones(
    world: World, is_told: bool
):
    row_id, folder = new_id(), world.folder / "1"
    world.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
    world.flush(0)
    world.read(1, ANN)
    synced, moment = image_of(folder), world.history.now()
    world.edit(row_id, text="theirs")
    world.read(1, ANN)
    world.stores[1].close()
    restore(folder, synced)
    world.open(1)
    if is_told:
        world.history.forgot(world.stores[1].log_id, since=moment)
    world.write(1, ANN, Update("notes", row_id, {"text": "mine"}))
    found = judge(world, world.settle())
    assert kinds(found) == (set() if is_told else {"false_conflict"}), findings_text(found)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_deletes_the_one_that_came_first_must_have_known_the_change(
    careless: World, first: int
):
    """The other finds nothing, so nothing is lost by it."""
    row_id = new_id()
    careless.write(0, ANN, Insert("notes", {"id": row_id, "text": "base"}))
    careless.flush(0)
    careless.read(0, ANN)
    careless.edit(row_id, text="by hand")
    careless.read(1, ANN)
    for number in (0, 1):
        careless.write(number, ANN, Delete("notes", row_id))
    careless.flush(first)
    found = judge(careless, careless.settle())
    assert kinds(found) == (set() if first else {"unsurfaced_conflict"}), findings_text(found)


def test_a_delete_that_takes_along_an_unknown_child_needs_a_record_where_asked(world: World):
    parent = new_id()
    world.write(0, ANN, Insert("notes", {"id": parent}))
    world.flush(0)
    world.read(1, ANN)
    world.write(0, ANN, Delete("notes", parent))
    world.write(1, ANN, comment(parent, "from elsewhere"))
    world.flush(1)
    seen = world.settle()
    assert check(world.history, seen, TABLES, reads_recorded=True) == []
    found = check(world.history, seen, TABLES, cascades_recorded=True)
    assert kinds(found) == {"unsurfaced_conflict"}, findings_text(found)


def test_an_edit_that_changed_nothing_is_no_loss_when_a_waiting_write_follows(careless: World):
    row_id = new_id()
    careless.write(0, ANN, Insert("notes", {"id": row_id, "text": "same"}))
    careless.flush(0)
    careless.read(1, ANN)
    careless.write(0, ANN, Update("notes", row_id, {"text": "waits"}))
    careless.write(1, ANN, Update("notes", row_id, {"text": "same"}))
    careless.flush(1)
    found = check(careless.history, careless.settle(), TABLES)
    assert not found, findings_text(found)


def test_a_child_that_its_author_deleted_is_not_taken_along_by_another(careless: World):
    row_id = new_id()
    child = comment(row_id, "first")
    careless.write(0, ANN, Insert("notes", {"id": row_id}), child)
    careless.flush(0)
    careless.read(1, ANN)
    careless.write(1, ANN, Delete("notes", row_id))
    careless.write(0, ANN, Update("comments", child.values["id"], {"text": "second"}))
    careless.write(0, ANN, Delete("comments", child.values["id"]))
    careless.flush(0)
    found = check(careless.history, careless.settle(), TABLES, cascades_recorded=True)
    assert not found, findings_text(found)


def test_a_server_that_applies_as_the_wrong_user_is_found(world: World):
    row_id = new_id()
    world.write(0, ANN, Insert("notes", {"id": row_id}))
    world.flush(0)
    world.server.rows["notes", row_id].user_id = user_uuid(BOB)
    assert kinds(check(world.history, world.settle(), TABLES)) == {"cross_user"}


def test_a_deleted_buffer_is_a_loss_of_all_that_was_not_delivered(world: World):
    world.write(0, ANN, Insert("notes", {"id": new_id()}))
    world.flush(0)
    waiting = world.write(0, ANN, Insert("notes", {"id": new_id()}))
    found = check(world.history, observe_model(world.server), TABLES)
    assert [(f.kind, f.subject) for f in found] == [("lost", waiting.txn_id)]
