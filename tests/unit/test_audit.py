"""The audit on a real buffer and a modelled server: it balances, and it finds what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import Column, Delete, Insert, LocalStore, TableSpec, Update
from local_store.clock import ManualClock, new_id
from syncer.audit import audit
from syncer.flusher import Flusher, drain
from tests.simulation.remote_model import RemoteModel

USER = "github:42"
NOTES = TableSpec(
    "notes",
    {
        "id": Column("uuid"),
        "user_id": Column("uuid"),
        "updated_at": Column("timestamp"),
        "at": Column("timestamp"),
        "text": Column("text"),
    },
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=[NOTES], clock=ManualClock()) as opened:
        yield opened


@pytest.fixture
def server(store: LocalStore) -> RemoteModel:
    return RemoteModel(store.tables)


def note(store: LocalStore, **values: object) -> str:
    row_id = new_id()
    store.write([Insert("notes", {"id": row_id, **values})], user_id=USER)
    return row_id


def deliver(store: LocalStore, server: RemoteModel) -> None:
    drain(Flusher(store, server, clock=ManualClock()), ManualClock(), budget_s=10)


def test_an_empty_buffer_balances(store, server):
    assert audit(server, store).balanced


def test_every_state_is_counted_once(store, server):
    applied = note(store, text="a")
    note(store, text="poison")
    deliver(store, server)
    server.edit("notes", applied, text="theirs")
    store.write([Update("notes", applied, {"text": "mine"})], user_id=USER)
    deliver(store, server)
    store.write([Update("notes", applied, {"text": "behind it"})], user_id=USER)
    deliver(store, server)
    note(store, text="not sent yet")
    report = audit(server, store)
    total = report.total
    assert (total.acknowledged, total.applied, total.pending) == (5, 1, 1)
    assert (total.dead, total.conflict, total.held) == (1, 1, 1)
    assert report.balanced


def test_a_transaction_applied_while_its_reply_was_lost_counts_as_applied(store, server):
    note(store, text="a")
    server.apply_batch(Flusher(store, server)._next_batch()[0])
    total = audit(server, store).total
    assert (total.applied, total.pending) == (1, 0)


def test_a_ledger_row_that_vanished_is_a_loss(store, server):
    note(store, text="a")
    deliver(store, server)
    server.ledger.clear()
    report = audit(server, store)
    assert report.total.lost == 1
    assert not report.balanced


def test_a_log_whose_end_is_unknown_here_is_a_loss(store, server):
    note(store, text="a")
    deliver(store, server)
    server.logs[store.log_id] += 3
    assert audit(server, store).total.lost == 3


def test_a_log_without_its_buffer_is_judged_by_the_ledger_alone(store, server):
    note(store, text="a")
    note(store, text="b")
    deliver(store, server)
    assert audit(server).total.applied == 2
    server.logs[store.log_id] += 1
    assert audit(server).total.lost == 1


def test_other_content_under_the_same_version_is_a_mismatch(store, server):
    row_id = note(store, text="a")
    deliver(store, server)
    server.rows["notes", row_id].values["text"] = "changed behind the version's back"
    assert audit(server, store).total.content_mismatch == 1


def test_a_row_that_somebody_else_changed_since_is_no_mismatch(store, server):
    row_id = note(store, text="a")
    deliver(store, server)
    server.edit("notes", row_id, text="theirs")
    assert audit(server, store).balanced


def test_a_timestamp_in_another_form_is_no_mismatch(store, server):
    row_id = note(store, at="2026-01-01T10:00:00.100Z")
    deliver(store, server)
    server.rows["notes", row_id].values["at"] = "2026-01-01T11:00:00.1+01:00"
    assert audit(server, store).balanced


def test_another_digest_in_the_ledger_is_a_mismatch(store, server):
    note(store, text="a")
    deliver(store, server)
    next(iter(server.ledger.values())).digest = "other"
    assert audit(server, store).total.content_mismatch == 1


def test_a_delivered_delete_balances(store, server):
    row_id = note(store, text="a")
    store.write([Delete("notes", row_id)], user_id=USER)
    deliver(store, server)
    assert audit(server, store).balanced


def test_the_document_has_the_contracts_fields(store, server):
    note(store, text="a")
    deliver(store, server)
    document = audit(server, store).to_json()
    names = "acknowledged applied pending held conflict dead discarded superseded lost duplicated"
    expected = {*names.split(), "content_mismatch"}
    assert set(document["total"]) == expected
    assert set(document["logs"][0]) == expected | {"log_id"}
    assert document["balanced"] is True
