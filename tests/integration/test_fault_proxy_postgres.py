"""The Postgres wire, on a real Postgres: what the client saw and whether the row is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from local_store.clock import SystemClock
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    POSTGRES_MIX,
    BlackHole,
    Cut,
    Delay,
    Fault,
    FaultMix,
    LoseCommitReply,
    Refuse,
    Truncate,
)
from tests.integration.proxy_upstream import silence_s


@pytest.fixture
def table(local_supabase: Any) -> Iterator[str]:
    """A table of its own and the way to it around the proxy."""
    with psycopg.connect(local_supabase.database_url, autocommit=True) as direct:
        direct.execute("drop table if exists public.fault_proxy_rows")
        direct.execute("create table public.fault_proxy_rows (id int primary key)")
        yield local_supabase.database_url
        direct.execute("drop table public.fault_proxy_rows")


@pytest.fixture
def wire(table: str) -> Iterator[FaultProxy]:
    target = conninfo_to_dict(table)
    host, port = str(target.get("host", "127.0.0.1")), int(str(target.get("port", 5432)))
    with FaultProxy.start(host, port, mode="postgres") as proxy:
        yield proxy


def through(wire: FaultProxy, table: str) -> str:
    return make_conninfo(table, host="127.0.0.1", hostaddr="127.0.0.1", port=wire.port)


def ids(table: str) -> list[int]:
    with psycopg.connect(table) as direct:
        rows = direct.execute("select id from public.fault_proxy_rows order by id")
        return [row[0] for row in rows]


INSERT = "insert into public.fault_proxy_rows values (%s)"


def test_postgres_passes_unharmed_without_faults(wire: FaultProxy, table: str) -> None:
    with psycopg.connect(through(wire, table)) as client:
        client.execute(INSERT, (1,), prepare=True)
        client.execute(INSERT, (2,), prepare=True)
        client.commit()
        with pytest.raises(psycopg.errors.UniqueViolation):
            client.execute(INSERT, (1,))
        client.rollback()
        with client.cursor().copy("copy public.fault_proxy_rows from stdin") as copy:
            copy.write("3\n4\n")
    assert ids(table) == [1, 2, 3, 4]
    log = wire.log
    assert log[0].method == "CONNECT"
    inserts = [entry for entry in log if entry.path.startswith("insert")]
    assert [entry.client_got for entry in inserts] == ["INSERT 0 1"] * 2 + ["ERROR 23505"]
    assert log[-1].upstream_status == "COMMIT"


@pytest.mark.parametrize("how", ["reset", "close"])
def test_lost_reply_to_commit_raises_though_the_row_is_there(
    wire: FaultProxy, table: str, how: Any
) -> None:
    wire.next(LoseCommitReply(how))
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == [1]
    entry = wire.log[-1]
    assert (entry.path, entry.forwarded, entry.upstream_status) == ("COMMIT", 1, "COMMIT")
    assert entry.client_got == ("reset" if how == "reset" else "closed")


def test_lost_reply_to_commit_in_a_pipeline_of_extended_messages(
    wire: FaultProxy, table: str
) -> None:
    wire.next(LoseCommitReply())
    client = psycopg.connect(through(wire, table), autocommit=True)

    def work() -> None:
        with client.pipeline():
            client.execute("begin")
            client.execute(INSERT, (1,), prepare=True)
            client.execute(INSERT, (2,), prepare=True)
            client.execute("commit")

    with pytest.raises(psycopg.OperationalError):
        work()
    assert ids(table) == [1, 2]
    statements = [(entry.method, entry.upstream_status) for entry in wire.log[1:]]
    assert statements[-4:] == [
        ("EXECUTE", "BEGIN"),
        ("EXECUTE", "INSERT 0 1"),
        ("EXECUTE", "INSERT 0 1"),
        ("EXECUTE", "COMMIT"),
    ]


def test_lost_reply_to_a_commit_that_was_prepared_earlier(wire: FaultProxy, table: str) -> None:
    """PostgREST prepares COMMIT once per connection and from then on sends its name only."""
    client = psycopg.connect(through(wire, table), autocommit=True)
    for number in (1, 2):
        if number == 2:
            wire.next(LoseCommitReply())
        client.execute("begin")
        client.execute(INSERT, (number,))
        if number == 2:
            with pytest.raises(psycopg.OperationalError):
                client.execute("commit", prepare=True)
        else:
            client.execute("commit", prepare=True)
    assert ids(table) == [1, 2]
    commits = [entry for entry in wire.log if entry.path == "commit"]
    assert [entry.method for entry in commits] == ["EXECUTE", "EXECUTE"]
    assert [entry.client_got for entry in commits] == ["COMMIT", "reset"]


def test_commit_cut_before_it_is_forwarded_leaves_no_row(wire: FaultProxy, table: str) -> None:
    wire.next(Cut("before"), matching="COMMIT")
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == []
    assert wire.log[-1].forwarded == 0


def test_commit_cut_in_its_message_leaves_no_row(wire: FaultProxy, table: str) -> None:
    wire.next(Cut("in", request_bytes=7), matching="COMMIT")
    client = psycopg.connect(through(wire, table))
    client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError):
        client.commit()
    assert ids(table) == []
    assert (wire.log[-1].forwarded, wire.log[-1].request_bytes) == (0, 7)


@pytest.mark.parametrize("fault", [Cut("after"), Truncate(3)])
def test_autocommitted_insert_whose_reply_is_cut_is_there(
    wire: FaultProxy, table: str, fault: Fault
) -> None:
    """Outside a transaction Postgres commits at Sync, after it named the statement complete."""
    wire.next(fault, matching="insert")
    client = psycopg.connect(through(wire, table), autocommit=True)
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, (1,), prepare=True)
    assert ids(table) == [1]
    assert wire.log[-1].upstream_status == "INSERT 0 1"


def test_postgres_port_refuses_and_cuts_open_connections(wire: FaultProxy, table: str) -> None:
    client = psycopg.connect(through(wire, table), autocommit=True)
    wire.set(Refuse())
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, (1,))
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(through(wire, table))
    wire.clear()
    with psycopg.connect(through(wire, table)) as again:
        again.execute(INSERT, (2,))
    assert ids(table) == [2]


async def test_postgres_black_hole_swallows_connections_and_statements(
    wire: FaultProxy, table: str
) -> None:
    client = await psycopg.AsyncConnection.connect(through(wire, table), autocommit=True)
    wire.set(BlackHole())
    swallowed = {
        asyncio.create_task(client.execute(INSERT, (1,))),
        asyncio.create_task(psycopg.AsyncConnection.connect(through(wire, table))),
    }
    done, _ = await asyncio.wait(swallowed, timeout=silence_s)
    assert done == set()
    assert [(entry.client_got, entry.forwarded) for entry in wire.log[1:]] == [("nothing", 0)] * 2
    wire.set(Refuse())
    for outcome in await asyncio.gather(*swallowed, return_exceptions=True):
        assert isinstance(outcome, psycopg.OperationalError)
    assert ids(table) == []


@pytest.mark.parametrize("stage", ["before", "after"])
def test_postgres_statement_is_delayed_and_done(wire: FaultProxy, table: str, stage: Any) -> None:
    clock = SystemClock()
    wire.next(Delay(0.2, stage), matching="insert")
    with psycopg.connect(through(wire, table), autocommit=True) as client:
        started = clock.monotonic()
        client.execute(INSERT, (1,))
        assert clock.monotonic() - started >= 0.2
    assert ids(table) == [1]


def test_postgres_connection_attempt_can_be_reset(wire: FaultProxy, table: str) -> None:
    for stage in ("before", "after"):
        wire.next(Cut(stage), matching="CONNECT")
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(through(wire, table))
    assert [entry.client_got for entry in wire.log] == ["reset", "reset"]
    assert [entry.upstream_status for entry in wire.log] == [None, "AUTHENTICATION"]


def test_postgres_mix_loses_commits_that_took_effect(wire: FaultProxy, table: str) -> None:
    """Whatever the client was told: a row is there exactly when upstream said COMMIT."""
    wire.mix(FaultMix(2, 0.7, POSTGRES_MIX, "COMMIT"))
    told = {}
    for number in range(20):
        client = psycopg.connect(through(wire, table))
        client.execute(INSERT, (number,))
        try:
            client.commit()
            told[number] = True
        except psycopg.OperationalError:
            told[number] = False
        client.close()
    commits = [entry for entry in wire.log if entry.path == "COMMIT"]
    done = [n for n, entry in enumerate(commits) if entry.upstream_status == "COMMIT"]
    assert ids(table) == done
    assert {n for n in told if told[n]} < set(done) < set(told)
