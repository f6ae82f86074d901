"""The pure core: breaker, backoff, batch, wire, verdicts, failure classes."""

from __future__ import annotations

import sys
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_store.ops import PendingTransaction, WireOp
from syncer.core.backoff import RetryLimits, honoured_retry_after_s, retry_delay_s
from syncer.core.batch import Batch, choose, next_turn
from syncer.core.breaker import Breaker
from syncer.core.wire import decode_reads, decode_verdicts, encode_batch
from syncer.errors import (
    ProtocolMismatch,
    ReplyUnreadable,
)


def transaction(seq: int, ops: int = 1, **changes: object) -> PendingTransaction:
    op = WireOp("notes", "update", f"row-{seq}", {"text": "x"})
    made = PendingTransaction(
        seq=seq,
        txn_id=f"txn-{seq}",
        user_id="user",
        digest="d",
        accepted_at="2026-01-01T00:00:00.000000+00:00",
        ops=(op,) * ops,
        bases=("v1",) * ops,
        chained=(False,) * ops,
        after=(),
        size_bytes=10,
        attempts=0,
        position=seq,
        log_id="log",
        before=({"text": "w"},) * ops,
        children=(None,) * ops,
    )
    return replace(made, **changes)


def batch_of(*seqs: int) -> Batch:
    return Batch("log", max(seqs), tuple(transaction(seq) for seq in seqs))


def reply_for(batch: Batch, **changes: object) -> dict[str, object]:
    item = {"verdict": "applied", "versions": {}, "rows": {}, **changes}
    return {"verdicts": [{"txn_id": t.txn_id, **item} for t in batch.transactions]}


# -- breaker ------------------------------------------------------------------------------------


def test_breaker_opens_after_the_third_failure_in_a_row():
    breaker = Breaker(interval_s=5.0)
    for expected in ("closed", "closed", "open"):
        breaker = breaker.after_failure(now=100.0, delay_s=0.5)
        assert breaker.state(100.0) == expected


def test_open_breaker_lets_one_probe_through_per_interval():
    breaker = Breaker(interval_s=5.0, failures=3, not_before=105.0)
    assert not breaker.allows(104.9)
    assert breaker.allows(105.0)
    assert breaker.state(105.0) == "half_open"
    failed_probe = breaker.after_failure(now=105.0, delay_s=0.1)
    assert not failed_probe.allows(109.9)
    assert failed_probe.allows(110.0)


def test_a_success_closes_the_breaker_at_once():
    breaker = Breaker(interval_s=5.0, failures=7, not_before=1e9).after_success()
    assert breaker.state(0.0) == "closed"
    assert breaker.allows(0.0)


def test_a_refusal_opens_the_breaker_at_once():
    breaker = Breaker(interval_s=5.0).after_refusal(now=10.0)
    assert breaker.state(10.0) == "open"
    assert breaker.wait_s(10.0) == 5.0


# -- backoff ------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_delay_stays_within_its_bounds(attempts: int, jitter: float):
    limits = RetryLimits()
    assert 0.0 <= retry_delay_s(attempts, jitter, limits) < limits.max_s


def test_the_window_doubles_until_its_cap():
    limits = RetryLimits(first_s=1.0, max_s=5.0)
    assert [retry_delay_s(n, 1.0, limits) for n in range(4)] == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize(("asked", "given_s"), [(None, 0.0), (-3.0, 0.0), (7.0, 7.0), (1e6, 120.0)])
def test_retry_after_is_honoured_and_capped(asked: float | None, given_s: float):
    assert honoured_retry_after_s(asked, RetryLimits()) == given_s


# -- batch --------------------------------------------------------------------------------------


def test_batch_keeps_order_and_stops_at_the_ops_limit():
    due = [transaction(1, 3), transaction(2, 3), transaction(3, 3)]
    assert [t.seq for t in choose(due, ops_max=6)] == [1, 2]


def test_a_transaction_larger_than_the_limit_goes_alone():
    due = [transaction(1, 50), transaction(2, 1)]
    assert [t.seq for t in choose(due, ops_max=10)] == [1]


def test_transactions_without_ops_still_count():
    due = [transaction(seq, 0) for seq in range(1, 6)]
    assert len(choose(due, ops_max=3)) == 3


def test_the_ops_limit_is_shared_by_the_authors_and_each_authors_stay_together():
    due = [transaction(seq, 3) for seq in range(1, 5)]
    due += [transaction(seq, 3, user_id="other") for seq in range(5, 7)]
    assert [t.seq for t in choose(due, ops_max=12)] == [1, 2, 5, 6]


def test_the_next_turn_begins_after_the_last_author_served_going_round():
    served = [transaction(1, user_id=user) for user in ("d", "e", "a", "b")]
    assert next_turn("c", served) == "b"
    assert next_turn("", served) == "e"
    assert next_turn("c", []) == "c"


# -- wire ---------------------------------------------------------------------------------------


def test_an_insert_carries_no_base_and_a_chained_update_says_so():
    insert = WireOp("notes", "insert", "a", {"text": "x"})
    update = WireOp("notes", "update", "a", {"text": "y"})
    made = transaction(1, ops=2)
    made = replace(made, ops=(insert, update), bases=(None, None), chained=(False, True))
    ops = encode_batch(Batch("log", 1, (made,)))["transactions"][0]["ops"]
    assert "base" not in ops[0]
    assert ops[1]["base"] == "chained"


def test_a_perfect_reply_is_believed():
    batch = batch_of(1, 2)
    verdicts = decode_verdicts(batch, reply_for(batch, versions={"notes/a": "v2"}))
    assert [v.kind for v in verdicts] == ["applied", "applied"]
    assert verdicts[0].versions == {"notes/a": "v2"}


@pytest.mark.parametrize(
    "broken",
    [
        None,
        "",
        "<html>welcome</html>",
        [],
        {},
        {"verdicts": None},
        {"verdicts": []},
        {"verdicts": [{"txn_id": "txn-1", "verdict": "applied"}]},
        {"verdicts": [{"txn_id": "txn-2", "verdict": "applied"}] * 2},
        {"verdicts": [{"txn_id": "x", "verdict": "applied"}, "nonsense"]},
    ],
)
def test_a_reply_that_does_not_answer_every_transaction_is_an_unknown_outcome(broken: object):
    with pytest.raises(ReplyUnreadable):
        decode_verdicts(batch_of(1, 2), broken)


def test_verdicts_in_another_order_are_not_believed():
    batch = batch_of(1, 2)
    reply = reply_for(batch)
    reply["verdicts"].reverse()
    with pytest.raises(ReplyUnreadable):
        decode_verdicts(batch, reply)


def test_a_verdict_of_a_newer_protocol_keeps_the_data():
    batch = batch_of(1)
    with pytest.raises(ProtocolMismatch):
        decode_verdicts(batch, reply_for(batch, verdict="deferred"))


@pytest.mark.parametrize(
    "broken", [None, {"reads": [[]]}, {"reads": [[], "x"]}, {"reads": [[1], []]}]
)
def test_a_read_reply_that_does_not_fit_is_not_believed(broken: object):
    with pytest.raises(ReplyUnreadable):
        decode_reads(broken, ["one", "two"])


def test_integers_beyond_64_bits_are_the_floats_that_were_accepted():
    big = [10**23, -(10**22), 2**64 - 1, -(2**63), 10**400, -(10**400), True, 1.5, "x", None]
    row = {"id": "a", "ir": {"deep": [{"n": list(big)}], "n": 10**308}}
    reply = {"reads": [[row]]}
    [[found]] = decode_reads(reply, ["one"])
    numbers = found["ir"]["deep"][0]["n"]
    largest = sys.float_info.max
    assert numbers == [1e23, -1e22, 2**64 - 1, -(2**63), largest, -largest, *big[6:]]
    assert [type(n) for n in numbers[:4]] == [float, float, int, int]
    assert orjson.loads(orjson.dumps(found)) == found
    batch = batch_of(1)
    [verdict] = decode_verdicts(batch, reply_for(batch, rows={"notes/a": {"n": 10**23}}))
    assert repr(verdict.rows["notes/a"]["n"]) == "1e+23"


# -- verdicts -----------------------------------------------------------------------------------
