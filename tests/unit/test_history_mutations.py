"""Each way to spoil what is seen of a correct run: the checker finds it and names its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from local_store import Delete, Insert, Update
from local_store.clock import new_id
from local_store.errors import InvalidWrite
from local_store.ops import Op, Receipt, user_uuid
from syncer.testkit.history import (
    LedgerRow,
    Observation,
    ParkedRecord,
    SeenRow,
    Visible,
    assert_clean,
    check,
    count_children,
    findings_text,
)
from tests.unit.history_world import ANN, BOB, COMMENTS, TABLES, World, comment, opened


@dataclass
class Run:
    """What the mutations start from: a correct run and the names of its parts."""

    world: World
    seen: Observation
    at: dict[str, str]

    def ledger(self, name: str) -> LedgerRow:
        return next(row for row in self.seen.ledger or () if row.txn_id == self.at[name])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with opened(tmp_path_factory.mktemp("run"), 2) as world:
        yield rich_run(world)


def rich_run(world: World) -> Run:
    """Let two containers go through births, edits, deletes, faults, a conflict and a discard."""
    at = {name: new_id() for name in ("n1", "n2", "n3", "n4", "bobs", "ghost", "maybe")}
    child, other_child = comment(at["n1"], "first"), comment(at["n1"], "second")
    at["child"], at["other_child"] = child.values["id"], other_child.values["id"]

    def note(name: str, text: str) -> Insert:
        return Insert("notes", {"id": at[name], "text": text, "due": "2026-01-01T00:00:00Z"})

    def keep(name: str, receipt: Receipt) -> None:
        at[name] = receipt.txn_id

    keep("born", world.write(0, ANN, note("n1", "one"), child))
    keep("bobs_birth", world.write(0, BOB, note("bobs", "his")))
    keep("a1", world.write(0, ANN, Update("notes", at["n1"], {"text": "a1"})))
    keep("a2", world.write(0, ANN, Update("notes", at["n1"], {"text": "a2"}), other_child))
    world.flush(0, "lost reply")
    world.flush(0)
    world.read(1, ANN)
    keep("b1", world.write(1, ANN, Update("notes", at["n1"], {"title": "b"})))
    keep("n2_birth", world.write(1, ANN, note("n2", "two")))
    world.flush(1)
    keep("n4_birth", world.write(0, ANN, note("n4", "four"), comment(at["n4"], "x")))
    keep("deleted", world.write(0, ANN, Delete("notes", at["n4"])))
    with suppress(InvalidWrite):
        at["refused"] = new_id()
        ops: list[Op] = [note("ghost", "g"), Update("notes", at["ghost"], {"nonsense": 1})]
        world.write(0, ANN, *ops, txn_id=at["refused"])
    at["untold"] = world.write_untold(0, ANN, note("n3", "three"), happens=True)
    at["unheard"] = world.write_untold(
        0, ANN, note("maybe", "?"), comment(at["maybe"], "?"), happens=False
    )
    world.edit(at["n2"], text="by hand")
    keep("conflict", world.write(1, ANN, Update("notes", at["n2"], {"text": "mine"})))
    keep("dead", world.write(0, BOB, Update("notes", at["bobs"], {"text": "poison"})))
    world.flush(0)
    world.discard(0, at["dead"])
    keep("tail", world.write(1, ANN, comment(at["n1"], "last")))
    seen = world.settle()
    counters = count_children(
        replace(seen, rows={k: with_count(seen, k, r) for k, r in seen.rows.items()}),
        "notes",
        "comments",
        COMMENTS,
    )
    return Run(world, replace(seen, counters=counters), at)


def with_count(seen: Observation, key: tuple[str, str], row: SeenRow) -> SeenRow:
    count = sum(other.values.get("note_id") == key[1] for other in seen.rows.values())
    return replace(row, values={**row.values, "comments": count})


def test_the_rich_run_is_clean_and_really_rich(run: Run):
    assert_clean(run.world.history, run.seen, TABLES, reads_recorded=True)
    assert {run.ledger("b1").log_id, run.ledger("a1").log_id} == {
        store.log_id for store in run.world.stores
    }
    states = {e.state for buffer in run.seen.buffers for e in buffer.entries}
    assert states == {"applied", "conflict", "discarded"}


Mutation = Callable[[Run], Observation]
MUTATIONS: list[tuple[str, Mutation]] = []


def spoils(kind: str) -> Callable[[Mutation], Mutation]:
    def add(mutation: Mutation) -> Mutation:
        MUTATIONS.append((kind, mutation))
        return mutation

    return add


def without_ledger(run: Run, *names: str) -> Observation:
    gone = {run.at[name] for name in names}
    rows = tuple(row for row in run.seen.ledger or () if row.txn_id not in gone)
    return replace(run.seen, ledger=rows)


def with_ledger(run: Run, name: str, **changes: Any) -> Observation:
    old = run.ledger(name)
    rows = [replace(row, **changes) if row is old else row for row in run.seen.ledger or ()]
    return replace(run.seen, ledger=tuple(rows))


def with_row(run: Run, table: str, name: str, **changes: Any) -> Observation:
    key = (table, run.at.get(name, name))
    row = replace(run.seen.rows[key], **changes)
    return replace(run.seen, rows={**run.seen.rows, key: row})


def with_value(run: Run, name: str, seen: Observation | None = None, **values: Any) -> Observation:
    base = replace(run, seen=seen or run.seen)
    table = "notes" if ("notes", run.at[name]) in run.seen.rows else "comments"
    old = base.seen.rows[table, run.at[name]].values
    return with_row(base, table, name, values={**old, **values})


def without_rows(run: Run, *names: str) -> Observation:
    gone = {run.at[name] for name in names}
    rows = {key: row for key, row in run.seen.rows.items() if key[1] not in gone}
    return replace(run.seen, rows=rows)


def with_state(run: Run, name: str, state: Any) -> Observation:
    buffers = tuple(
        replace(
            buffer,
            entries=tuple(
                replace(e, state=state) if e.txn_id == run.at[name] else e for e in buffer.entries
            ),
        )
        for buffer in run.seen.buffers
    )
    return replace(run.seen, buffers=buffers)


def without_entry(run: Run, seen: Observation, *names: str) -> Observation:
    gone = {run.at[name] for name in names}
    buffers = tuple(
        replace(buffer, entries=tuple(e for e in buffer.entries if e.txn_id not in gone))
        for buffer in seen.buffers
    )
    return replace(seen, buffers=buffers)


def with_new_row(run: Run, table: str, row_id: str, user: str, values: Any) -> Observation:
    row = SeenRow(user_uuid(user), values, "2026-01-01T00:00:09+00:00")
    return replace(run.seen, rows={**run.seen.rows, (table, row_id): row})


@spoils("lost")
def a_ledger_row_is_dropped(run: Run) -> Observation:
    return without_ledger(run, "b1")


@spoils("lost")
def a_row_is_dropped(run: Run) -> Observation:
    return without_rows(run, "n2")


@spoils("lost")
def a_logs_tail_is_lost(run: Run) -> Observation:
    seen = without_entry(run, without_ledger(run, "tail"), "tail", "conflict")
    rows = {key: row for key, row in seen.rows.items() if row.values["text"] != "last"}
    return replace(seen, rows=rows, records=())


@spoils("lost")
def a_parked_transaction_vanishes(run: Run) -> Observation:
    return replace(without_entry(run, run.seen, "conflict"), records=())


@spoils("lost")
def a_transaction_is_discarded_by_nobody(run: Run) -> Observation:
    return with_state(run, "conflict", "discarded")


@spoils("lost")
def a_transaction_is_called_superseded_without_a_delete(run: Run) -> Observation:
    return with_state(run, "conflict", "superseded")


@spoils("lost")
def the_row_is_restored_from_an_older_backup(run: Run) -> Observation:
    row = run.seen.rows["notes", run.at["n1"]]
    old = {k: v for k, v in row.values.items() if k != "title"}
    version = run.ledger("a2").versions or {}
    return with_row(run, "notes", "n1", values=old, version=version["notes/" + run.at["n1"]])


@spoils("torn")
def half_of_a_transaction_is_missing(run: Run) -> Observation:
    return without_rows(run, "other_child")


@spoils("torn")
def an_unknown_call_is_there_in_half(run: Run) -> Observation:
    values = {"text": "?", "due": "2026-01-01T00:00:00+00:00"}
    return with_new_row(run, "notes", run.at["maybe"], ANN, values)


@spoils("torn")
def half_of_an_unknown_call_is_there_and_nobody_read_the_ledger(run: Run) -> Observation:
    return replace(an_unknown_call_is_there_in_half(run), ledger=None)


@spoils("resurrected")
def a_refused_insert_is_there(run: Run) -> Observation:
    return with_new_row(run, "notes", run.at["ghost"], ANN, {"text": "g"})


@spoils("resurrected")
def a_refused_transaction_is_in_the_ledger(run: Run) -> Observation:
    row = replace(run.ledger("b1"), txn_id=run.at["refused"], seq=99, versions={})
    return replace(run.seen, ledger=(*(run.seen.ledger or ()), row))


@spoils("resurrected")
def a_deleted_row_is_back(run: Run) -> Observation:
    values = {"text": "four", "due": "2026-01-01T00:00:00+00:00"}
    return with_new_row(run, "notes", run.at["n4"], ANN, values)


@spoils("resurrected")
def a_discarded_value_stands(run: Run) -> Observation:
    return with_value(run, "bobs", text="poison")


@spoils("resurrected")
def a_parked_conflict_took_effect(run: Run) -> Observation:
    return with_value(run, "n2", text="mine")


@spoils("duplicated")
def a_child_is_there_twice(run: Run) -> Observation:
    twin = run.seen.rows["comments", run.at["child"]]
    return replace(run.seen, rows={**run.seen.rows, ("comments", new_id()): twin})


@spoils("duplicated")
def the_ledger_has_a_transaction_twice(run: Run) -> Observation:
    return replace(run.seen, ledger=(*(run.seen.ledger or ()), replace(run.ledger("b1"), seq=77)))


@spoils("duplicated")
def the_ledger_has_a_seq_twice(run: Run) -> Observation:
    return with_ledger(run, "a2", seq=run.ledger("a1").seq)


@spoils("duplicated")
def an_effect_is_there_while_it_waits(run: Run) -> Observation:
    return replace(
        with_state(run, "n2_birth", "pending"), ledger=without_ledger(run, "n2_birth").ledger
    )


@spoils("duplicated")
def an_applied_transaction_is_a_dead_letter_too(run: Run) -> Observation:
    return with_state(run, "b1", "dead")


@spoils("order")
def two_updates_changed_places(run: Run) -> Observation:
    first, second = run.ledger("a1"), run.ledger("a2")
    swapped = {first.txn_id: second.versions, second.txn_id: first.versions}
    rows = [replace(r, versions=swapped.get(r.txn_id, r.versions)) for r in run.seen.ledger or ()]
    return replace(with_value(run, "n1", text="a1"), ledger=tuple(rows))


@spoils("order")
def an_older_value_of_the_only_writer_stands(run: Run) -> Observation:
    return with_value(run, "n1", text="a1")


@spoils("order")
def a_transaction_was_delivered_at_another_seq(run: Run) -> Observation:
    return with_ledger(run, "b1", seq=run.ledger("b1").seq + 50)


@spoils("cross_user")
def a_row_changes_its_owner(run: Run) -> Observation:
    return with_row(run, "notes", "n1", user_id=user_uuid(BOB))


@spoils("cross_user")
def a_stranger_sees_a_row(run: Run) -> Observation:
    sight = Visible(user_uuid(BOB), user_uuid(ANN), "notes", run.at["n1"])
    return replace(run.seen, visible=(*run.seen.visible, sight))


@spoils("cross_user")
def a_transaction_was_delivered_as_somebody_else(run: Run) -> Observation:
    return with_ledger(run, "b1", user_id=user_uuid(BOB))


@spoils("false_conflict")
def a_clean_transaction_is_marked_as_a_conflict(run: Run) -> Observation:
    return with_state(run, "tail", "conflict")


@spoils("false_conflict")
def a_first_edit_is_a_conflict_and_has_no_effect(run: Run) -> Observation:
    spoilt = with_value(run, "n1", title=None)
    return replace(
        with_state(replace(run, seen=spoilt), "b1", "conflict"),
        ledger=without_ledger(run, "b1").ledger,
        records=(*run.seen.records, ParkedRecord(run.at["b1"], "conflict")),
    )


@spoils("unsurfaced_conflict")
def a_conflicts_record_is_dropped(run: Run) -> Observation:
    return replace(run.seen, records=())


@spoils("unsurfaced_conflict")
def the_edit_by_hand_is_lost_to_an_older_value(run: Run) -> Observation:
    return with_value(run, "n2", text="two")


@spoils("unsurfaced_conflict")
def a_conflict_was_applied_over_what_it_did_not_know(run: Run) -> Observation:
    key = "notes/" + run.at["n2"]
    version = "2026-01-01T00:09:00+00:00"
    birth, mine = run.ledger("n2_birth"), run.at["conflict"]
    entry = next(e for b in run.seen.buffers for e in b.entries if e.txn_id == mine)
    row = replace(birth, txn_id=mine, seq=entry.seq, digest=entry.digest, versions={key: version})
    seen = with_row(run, "notes", "n2", version=version, values={"text": "mine", "due": None})
    seen = with_value(run, "n2", seen, due="2026-01-01T00:00:00Z")
    seen = with_state(replace(run, seen=seen), "conflict", "applied")
    return replace(seen, ledger=(*(run.seen.ledger or ()), row), records=())


@spoils("content")
def a_value_is_changed(run: Run) -> Observation:
    return with_value(run, "child", text="somebody else's words")


@spoils("content")
def a_value_is_emptied(run: Run) -> Observation:
    return with_value(run, "n2", due=None)


@spoils("content")
def a_row_comes_from_nowhere(run: Run) -> Observation:
    return with_new_row(run, "notes", new_id(), ANN, {"text": "hello"})


@spoils("content")
def the_ledger_has_a_transaction_that_nobody_made(run: Run) -> Observation:
    row = replace(run.ledger("b1"), txn_id=new_id(), seq=98, versions={})
    return replace(run.seen, ledger=(*(run.seen.ledger or ()), row))


@spoils("content")
def what_was_delivered_is_not_what_was_accepted(run: Run) -> Observation:
    return with_ledger(run, "b1", digest="0" * 64)


@spoils("counter")
def a_counter_is_off_by_one(run: Run) -> Observation:
    return replace(run.seen, counters=(replace(run.seen.counters[0], stored=7),))


@pytest.mark.parametrize(
    ("kind", "mutation"), [pytest.param(*m, id=f"{m[1].__name__}-{m[0]}") for m in MUTATIONS]
)
def test_each_way_to_spoil_an_observation_is_found(run: Run, kind: str, mutation: Mutation):
    found = check(run.world.history, mutation(run), TABLES, reads_recorded=True)
    assert kind in {finding.kind for finding in found}, findings_text(found)
    assert len(found) <= 3, findings_text(found)  # the reader isn't buried under one cause
