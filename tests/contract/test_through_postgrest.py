"""The whole way: both implementations of Remote on the same batches, reads and audits.

test_batch_rpc.py asks the RPC directly; here supabase-py, the gateway and PostgREST stand between.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from local_store import user_uuid
from local_store.clock import new_id
from local_store.door import digest_of
from local_store.ops import PendingTransaction, WireOp
from syncer.core.batch import Batch
from syncer.core.wire import Park
from syncer.remote import Remote, SupabaseRemote, TableRead
from syncer.sessions.tables import SESSION_TABLES
from tests.contract.batches import Asked
from tests.contract.generator import Generator
from tests.contract.servers import PostgresServer
from tests.contract.test_batch_rpc import comparable, play
from tests.simulation.model_people import OperatedModel
from tests.simulation.remote_model import RemoteModel

USER, STRANGER = user_uuid("github:42"), user_uuid("github:43")
ACCEPTED_AT = "2026-01-01T00:00:00.000000+00:00"


@pytest.fixture(params=["modelled", "supabase"])
def remote(request) -> Iterator[Remote]:
    if request.param == "modelled":
        yield RemoteModel({spec.name: spec for spec in SESSION_TABLES})
        return
    stack = request.getfixturevalue("fresh_supabase")
    made = SupabaseRemote(stack.url, stack.secret_key)
    yield made
    made.close()


def transaction(seq: int, *ops: WireOp, base: str | None = None, **changes) -> PendingTransaction:
    fields = {
        "seq": seq,
        "txn_id": new_id(),
        "user_id": USER,
        "digest": digest_of(ops),
        "accepted_at": ACCEPTED_AT,
        "ops": ops,
        "bases": tuple(None if op.kind == "insert" else base for op in ops),
        "chained": (False,) * len(ops),
        "after": (),
        "size_bytes": 1,
        "attempts": 0,
        "position": seq,
        "log_id": "",
        "before": (None,) * len(ops),
        "children": (None,) * len(ops),
    }
    return PendingTransaction(**{**fields, **changes})


def session(**values) -> WireOp:
    return WireOp("sessions", "insert", new_id(), {"status": "active", **values})


def test_a_batch_is_applied_and_recognised_when_sent_again(remote: Remote):
    batch = Batch(new_id(), 2, (transaction(1, session()), transaction(2, session())))
    assert [v.kind for v in remote.apply_batch(batch)] == ["applied", "applied"]
    again = remote.apply_batch(batch)
    assert [v.kind for v in again] == ["duplicate", "duplicate"]
    assert all(len(v.versions) == 1 and len(v.rows) == 1 for v in again)


def test_one_poison_transaction_in_a_batch_is_alone(remote: Remote):
    parts = [transaction(n, session()) for n in range(1, 6)]
    parts[2] = transaction(3, session(status="bogus"))
    verdicts = remote.apply_batch(Batch(new_id(), 5, tuple(parts)))
    assert [v.kind for v in verdicts] == ["applied", "applied", "rejected", "applied", "applied"]
    assert (verdicts[2].sqlstate, verdicts[2].op) == ("23514", 0)


def test_a_refused_transaction_is_parked_and_recognised(remote: Remote):
    log_id, refused = new_id(), transaction(1, session(status="bogus"))
    [verdict] = remote.apply_batch(Batch(log_id, 1, (refused,)))
    park = Park(refused, "dead", verdict.sqlstate, verdict.op, verdict.message)
    for _ in range(2):
        [parked] = remote.park(log_id, 1, [park])
        assert (parked.kind, parked.state) == ("parked", "dead")
    [again] = remote.apply_batch(Batch(log_id, 1, (refused,)))
    assert (again.kind, again.state, again.sqlstate) == ("parked", "dead", "23514")


def test_a_stale_base_comes_back_with_the_row(remote: Remote):
    log_id, made = new_id(), session(metadata={"a": 1})
    remote.apply_batch(Batch(log_id, 1, (transaction(1, made),)))
    update = WireOp("sessions", "update", made.id, {"metadata": {"a": 2}})
    old = "2001-01-01T00:00:00+00:00"
    [verdict] = remote.apply_batch(Batch(log_id, 2, (transaction(2, update, base=old),)))
    assert verdict.kind == "conflict"
    assert verdict.rows[f"sessions/{made.id}"]["metadata"] == {"a": 1}


def test_a_version_that_was_read_fits_as_a_base(remote: Remote):
    log_id, made = new_id(), session()
    remote.apply_batch(Batch(log_id, 1, (transaction(1, made),)))
    [[row]] = remote.read(USER, [TableRead("sessions", {"id": made.id})])
    update = WireOp("sessions", "update", made.id, {"status": "finalized"})
    later = transaction(2, update, base=row["updated_at"])
    [verdict] = remote.apply_batch(Batch(log_id, 2, (later,)))
    assert verdict.kind == "applied"


def test_a_stranger_reads_nothing(remote: Remote):
    made = session()
    remote.apply_batch(Batch(new_id(), 1, (transaction(1, made),)))
    assert remote.read(STRANGER, [TableRead("sessions", {"id": made.id})]) == [[]]


def test_the_audit_tells_what_the_ledger_knows(remote: Remote):
    log_id = new_id()
    parts = tuple(transaction(n, session()) for n in range(1, 4))
    remote.apply_batch(Batch(log_id, 7, parts))
    [log] = remote.audit(log_id)["logs"]
    assert (log["acknowledged_seq"], log["applied"], log["duplicated"]) == (7, 3, 0)
    entries = remote.audit(log_id, after_seq=1)["entries"]
    assert [(entry["seq"], entry["txn_id"]) for entry in entries] == [
        (part.seq, part.txn_id) for part in parts[1:]
    ]


class ThroughPostgrest(PostgresServer):
    """The real server, asked through supabase-py; edits from outside stay direct."""

    def __init__(self, stack) -> None:
        super().__init__(stack.database_url)
        self._remote = SupabaseRemote(stack.url, stack.secret_key)

    def apply(self, p_batch):
        return self._remote._call("sync_apply_batch_v1", {"p_batch": p_batch})

    def take(self, p):
        return self._remote._call("sync_park_v1", {"p": p})


@pytest.mark.parametrize("seed", [7001, 7002, 7003])
def test_postgrest_changes_nothing_about_the_verdicts(local_supabase, seed):
    server = ThroughPostgrest(local_supabase)
    real = Asked(server)
    modelled = Asked(OperatedModel({spec.name: spec for spec in SESSION_TABLES}))
    for step in Generator(seed).steps(40):
        found = [comparable(verdict) for verdict in play(real, step)]
        assert found == [comparable(verdict) for verdict in play(modelled, step)]
    server.close()
