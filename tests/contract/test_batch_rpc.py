"""The real RPC and its model give the same verdicts, rows and ledger on random batches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from local_store.ops import Row
from syncer.sessions.tables import SESSION_TABLES
from tests.contract.batches import Asked, Call, Decision, Edit, Step
from tests.contract.generator import Generator
from tests.contract.servers import PostgresServer
from tests.simulation.model_people import PEOPLE, OperatedModel
from tests.simulation.remote_model import RecordKey

HISTORIES = int(os.environ.get("CONTRACT_HISTORIES", "25"))
STEPS = 70
COLUMNS = {
    "sessions": ("status", "metadata"),
    "session_revisions": ("session_id", "content", "revision_type"),
}
FIRST_SEED = int(os.environ.get("CONTRACT_SEED", "1"))


@pytest.fixture(scope="module")
def postgres(local_supabase) -> Iterator[PostgresServer]:
    server = PostgresServer(local_supabase.database_url)
    yield server
    server.close()


def model() -> OperatedModel:
    return OperatedModel({spec.name: spec for spec in SESSION_TABLES})


def comparable(verdict: dict) -> dict:
    """Leave out what may differ: version strings, messages, columns the generator never writes."""
    told = {} if verdict["verdict"] == "applied" else verdict["rows"]  # defaults: the schema's
    rows = {
        key: None
        if row is None
        else {c: str(row.get(c)) for c in (*COLUMNS[key.split("/")[0]], "id", "user_id")}
        for key, row in told.items()
    }
    return {
        "txn_id": verdict["txn_id"],
        "verdict": verdict["verdict"],
        "state": verdict["state"],
        "sqlstate": verdict["sqlstate"],
        "op": verdict["op"],
        "blocked_by": verdict["blocked_by"],
        "versions": {key: version is None for key, version in verdict["versions"].items()},
        "met": sorted(verdict.get("met") or {}),
        "defaults": sorted(verdict.get("defaults") or {}),
        "rows": rows,
    }


def play(asked: Asked, step: Step) -> list[dict]:
    """Let a server take one step; returns its verdicts."""
    if isinstance(step, Edit):
        asked.edit(step)
        return []
    if isinstance(step, Decision):
        return asked.decide(step)
    return asked.call(step) if isinstance(step, Call) else asked.park(step)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + HISTORIES))
def test_the_rpc_and_its_model_agree_on_a_random_history(postgres, seed):
    reference = model()
    real, modelled = Asked(postgres), Asked(reference)
    seen: Counter[str] = Counter()
    for number, step in enumerate(Generator(seed).steps(STEPS)):
        expected = [comparable(v) for v in play(modelled, step)]
        found = [comparable(v) for v in play(real, step)]
        replay = f"CONTRACT_SEED={seed} CONTRACT_HISTORIES=1, step {number}"
        assert found == expected, replay
        seen.update(v["verdict"] for v in found)
    assert seen["applied"] > 5
    _compare_tables(postgres, reference)


def _compare_tables(postgres: PostgresServer, reference: OperatedModel) -> None:
    """The other histories' rows stand in the same tables, so only this one's are looked at."""
    for table, columns in COLUMNS.items():
        stored = postgres.rows(table, columns)
        for (name, row_id), row in reference.rows.items():
            if name == table:
                found = stored[row_id]
                assert found.pop("user_id") == row.user_id
                given = {c: str(row.values[c]) for c in columns if c in row.values}
                assert {c: str(found[c]) for c in given} == given  # the rest is the table's
    ledger = postgres.ledger()
    for txn_id, entry in reference.ledger.items():
        # People's log is one for all histories, so its positions aren't this one's alone.
        seq = None if entry.log_id == PEOPLE else entry.seq
        assert (txn_id, seq or ledger.get(txn_id)) in ledger.items()
    parked = postgres.parked()
    for txn_id, waiting in reference.parked.items():
        state, item = parked[txn_id]
        assert (state, content(item)) == (waiting.state, content(waiting.item)), txn_id
    kept: dict[RecordKey, list] = {}
    for key, record in (*reference.decided, *reference.records.items()):
        kept.setdefault(key, []).append((record["columns"], record.get("resolution")))
    known = {*reference.ledger, *reference.parked}
    assert {key: told for key, told in postgres.records().items() if key[0] in known} == kept


def content(item: Row) -> dict:
    """What a parked transaction would do and waits for; versions differ from server to server."""
    return {
        "ops": [
            {**op, "base": op.get("base") if op.get("base") in (None, "chained") else "a version"}
            for op in item["ops"]
        ],
        "after": sorted(item["after"]),
        "before": len(item["before"]),
        "decided": sorted(item.get("decided") or ()),
        "replaces": item["replaces"],
    }


def test_every_verdict_is_frequent_in_the_random_histories():
    seen: Counter[str] = Counter()
    for seed in range(60):
        reference = model()
        asked = Asked(reference)
        for step in Generator(seed).steps(STEPS):
            verdicts = [v["verdict"] for v in play(asked, step)]
            seen.update(verdicts)
            if isinstance(step, Decision):
                seen.update(f"{step.action} {verdict}" for verdict in verdicts)
        seen.update(entry.state for entry in reference.parked.values())
    for word in ("applied", "duplicate", "conflict", "rejected", "held", "parked"):
        assert seen[word] > 100, seen
    assert min(seen["dead"], 10 * seen["superseded"]) > 30, seen
    decided = ("retry applied", "retry conflict", "discard parked", "edit parked")
    decided += tuple(f"{choice} applied" for choice in ("mine", "theirs", "edited"))
    assert min(seen[word] for word in decided) > 5, seen
