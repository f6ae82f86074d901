"""What users may write, through the door to a real Postgres and back, value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from local_store import Insert, InvalidWrite, Update
from local_store.clock import new_id
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp

USER = "github:42"
MIB = 1024 * 1024
INJECTION = "x'); drop table public.sessions; --"


def nested(depth: int) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = {"k": [value]}
    return value


ODD = {
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "right_to_left": "\u202eשלום\u202c مرحبا",
    "combining": "e\u0301 is not \u00e9",
    "line_ends": "a\r\nb\u2028c\u2029d\x7f\x1b[0m",
    "escapes": "\\u0000 \\x00 \\ \" ' % $1 {} ?",
    "prototype": {"__proto__": {"polluted": True}, "constructor": {"prototype": 1}},
    "keys": {INJECTION: 1, "": 2, "a.b": 3, "a->>'b'": 4, "$": 5, "🙂": 6},
    "injection": INJECTION,
    "numbers": [2**63 - 1, -(2**63), 0.1, -0.5, 1e-7],
    "nothing": [None, {}, [], "", False],
    "deep": nested(45),
    "large": "é" * MIB,
}


@pytest.fixture
def app(buffered_store: Callable[..., BufferedApp]) -> BufferedApp:
    return buffered_store(SESSION_TABLES)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_value_arrives_as_it_was_written(app: BufferedApp, fresh_supabase: Any, name: str):
    value, row_id = ODD[name], new_id()
    app.store.write([Insert("sessions", {"id": row_id, "metadata": {}})], user_id=USER)
    app.store.write([Update("sessions", row_id, {"metadata": {"v": value}})], user_id=USER)
    if isinstance(value, str):
        text = {"session_id": row_id, "content": value, "revision_type": "initial"}
        app.store.write([Insert("session_revisions", {"id": new_id(), **text})], user_id=USER)
    report = app.drain()
    assert (report.rejected, report.merged, report.pending) == (0, 0, 0)
    with psycopg.connect(fresh_supabase.database_url) as sql:
        assert sql.execute("select metadata from sessions").fetchall() == [({"v": value},)]
        contents = sql.execute("select content from session_revisions").fetchall()
        assert contents == ([(value,)] if isinstance(value, str) else [])
    assert app.audit().balanced


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a\x00b", "NUL"),
        ("\ud800", "surrogate"),
        (float("nan"), "NaN"),
        (2**64, "64 bits"),
        (nested(2_500), "nested too deeply"),
        ("x" * 10 * MIB, "at most"),
    ],
    ids=["nul", "surrogate", "nan", "beyond_64_bits", "5000_deep", "10_mb"],
)
def test_what_could_not_arrive_is_refused_at_the_door_and_delays_nobody(
    app: BufferedApp, value: Any, reason: str
):
    with pytest.raises(InvalidWrite) as caught:
        app.store.write([Insert("sessions", {"metadata": {"v": value}})], user_id=USER)
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 200, "the value isn't repeated"
    app.store.write([Insert("sessions", {})], user_id=USER)
    assert app.drain().applied == 1
