"""The main job: the outage drill, as `syncer demo` runs it."""

from __future__ import annotations


def test_the_drill_balances_through_an_outage_and_a_kill(syncer):
    ran = syncer("demo", "--sessions", "80", "--outage-seconds", "5", "--seed", "11", "--json")
    result = ran.document
    assert ran.code == 0, ran.out + ran.err
    assert result["acknowledged"] > 200
    assert result["acknowledged_during_outage"] > 50
    assert result["replies_lost_after_commit"] > 0
    zero = ("api_errors", "lost", "duplicated", "cross_user_rows", "counter_mismatches")
    assert {name: result[name] for name in zero} == dict.fromkeys(zero, 0)
    assert set(result["ack_ms"]) == {"p50", "p99"}
    total = result["audit"]["total"]
    assert result["audit"]["balanced"] is True
    assert total["applied"] == total["acknowledged"] == result["acknowledged"]
    assert (total["conflict"], total["dead"], total["pending"]) == (0, 0, 0)


def test_a_senseless_size_is_a_usage_error(syncer):
    ran = syncer("demo", "--sessions", "1")
    assert ran.code == 2
    assert "--sessions" in ran.err
