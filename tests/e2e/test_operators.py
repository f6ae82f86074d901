"""What a person does with parked work, by commands, when the containers that wrote it are gone.

Every command of the operator runs in an empty folder with the project's URL and key alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from local_store import Insert, Op, Row, TableSpec, Update, user_uuid
from local_store.clock import new_id
from syncer.remote import TableRead
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import BufferedApp

USER, OTHER = "github:42", "github:43"
UNKNOWN = "00000000-0000-7000-8000-000000000000"
CANARY = "canary-7f3a"  # a user's words: only `show` may print them


def _loosened(spec: TableSpec) -> TableSpec:
    """The table as older code knew it: any status passes the door, the server refuses some."""
    columns = dict(spec.columns)
    if "status" in columns:
        columns["status"] = replace(columns["status"], enum=None)
    return replace(spec, columns=columns, policy="merge")


TABLES = [_loosened(spec) for spec in SESSION_TABLES]


class Container(BufferedApp):
    """A container that writes and delivers, and whose folder can be destroyed."""

    def write(self, *ops: Op, user: str = USER) -> str:
        return self.store.write(ops, user_id=user).txn_id

    def learn(self, row_id: str) -> None:
        """Read through: take the server's row into the local copy."""
        as_of, where = self.store.change_counter(), {"id": row_id}
        [rows] = self.remote.read(user_uuid(USER), [TableRead("sessions", where)])
        self.store.refresh("sessions", rows, user_id=USER, as_of=as_of, where=where)

    def destroy(self) -> None:
        self.close()
        shutil.rmtree(self.folder)


@pytest.fixture
def container(fresh_supabase, tmp_path) -> Iterator[Any]:
    made: list[Container] = []

    def make() -> Container:
        folder = tmp_path / f"container-{len(made)}"
        made.append(Container(folder, TABLES, fresh_supabase.url, fresh_supabase.secret_key))
        return made[-1]

    yield make
    for app in made:
        app.close()


@pytest.fixture
def operator(syncer, fresh_supabase) -> Any:
    """Run a command with URL and key alone; the key and users' words are in no output of it."""
    env = {
        "SUPABASE_URL": fresh_supabase.url,
        "SUPABASE_SECRET_KEY": fresh_supabase.secret_key,
    }

    def run(*arguments: str, key: str | None = None) -> Any:
        secret = key or env["SUPABASE_SECRET_KEY"]
        ran = syncer(*arguments, env={**env, "SUPABASE_SECRET_KEY": secret})
        told = ran.out + ran.err
        assert secret not in told
        assert secret.rpartition(".")[2] not in told
        assert CANARY not in told or arguments[1] == "show"
        assert "Traceback" not in told
        return ran

    return run


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def row_of(sql: psycopg.Connection[Any], row_id: str) -> Row:
    found = sql.execute("select to_jsonb(s) from sessions s where id = %s", (row_id,)).fetchone()
    assert found is not None
    return found[0]


def session(row_id: str, **values: Any) -> Insert:
    return Insert("sessions", {"id": row_id, "metadata": {"said": CANARY}, **values})


def revision(row_id: str) -> Insert:
    values = {"session_id": row_id, "content": CANARY, "revision_type": "manual_edit"}
    return Insert("session_revisions", {"id": new_id(), **values})


def refused(container: Container, user: str = USER) -> tuple[str, list[str]]:
    """A session that the server refuses, and behind it an update and a child; all parked."""
    row_id = new_id()
    ids = [
        container.write(session(row_id, status="bogus"), user=user),
        container.write(Update("sessions", row_id, {"metadata": {"n": 1}}), user=user),
        container.write(revision(row_id), user=user),
    ]
    return row_id, ids


def states(letters: Any) -> dict[str, str]:
    return {letter["txn_id"]: letter["state"] for letter in letters}


# -- dead letters --


def test_what_was_refused_is_mended_from_a_laptop_after_its_container_is_gone(
    container, operator, sql, syncer, fresh_supabase
):
    gone = container()
    good = new_id()
    gone.write(session(good))
    row_id, [first, *behind] = refused(gone)
    gone.close()
    env = {**fresh_supabase.env(), "SYNCER_DATA_DIR": str(gone.folder)}
    flushed = syncer("flush", "--json", env=env)
    assert (flushed.code, flushed.document["rejected"], flushed.document["pending"]) == (1, 1, 0)
    gone.destroy()

    listed = operator("dead-letters", "list", "--json")
    assert listed.code == 0
    assert states(listed.document) == {first: "dead", behind[0]: "held", behind[1]: "held"}
    assert all(letter["item"] is None for letter in listed.document)
    [shown] = operator("dead-letters", "show", first, "--json").document
    assert (shown["sqlstate"], shown["op"]) == ("23514", 0)
    assert shown["item"]["ops"][0]["values"]["status"] == "bogus"

    edited = operator("dead-letters", "edit", first, "--set", 'status="active"', "--json")
    assert edited.code == 0, edited.err
    new = edited.document["txn_id"]
    again = operator("dead-letters", "edit", first, "--set", 'status="active"')
    assert (again.code, again.err[:26]) == (1, "syncer: already discarded;")
    retried = operator("dead-letters", "retry", new, "--json")
    assert (retried.code, [r["verdict"] for r in retried.document]) == (0, ["applied"] * 3)

    audit = operator("audit", "--json")
    assert (audit.code, audit.document["balanced"]) == (0, True)
    assert audit.document["total"]["dead"] + audit.document["total"]["held"] == 0
    row = row_of(sql, row_id)
    assert (row["status"], row["metadata"], row["revision_count"]) == ("active", {"n": 1}, 1)
    assert row["user_id"] == user_uuid(USER)
    late = operator("dead-letters", "edit", new, "--set", 'status="active"')
    assert (late.code, late.err[:24]) == (1, "syncer: already applied;")
    repeated = operator("dead-letters", "retry", new, "--json")
    assert (repeated.code, repeated.document[0]["verdict"]) == (0, "duplicate")


def test_a_list_groups_dead_letters_by_cause_and_tells_no_values(container, operator):
    gone = container()
    _, [first, *behind] = refused(gone)
    _, [second, *_] = refused(gone, user=OTHER)
    gone.drain()
    gone.destroy()
    lines = operator("dead-letters", "list").out.splitlines()
    assert lines[0].startswith("2 × dead 23514 ")
    assert lines[0].endswith("(sessions)")
    assert [line.split()[0] for line in lines[1:3]] == [first, second]
    assert all(line.endswith(", 1 waiting") for line in lines[1:3])
    assert f"1 × held behind {first} (sessions)" in lines
    assert f"1 × held behind {behind[0]} (session_revisions, sessions)" in lines
    mine = operator("dead-letters", "list", "--user", OTHER, "--json").document
    assert (len(mine), second in states(mine)) == (3, True)
    logs = {letter["log_id"] for letter in mine}
    assert len(operator("dead-letters", "list", "--log", *logs, "--json").document) == 6
    shown = operator("dead-letters", "show", behind[1])
    assert (shown.code, CANARY in shown.out) == (0, True)


def test_retry_all_tries_each_once_and_fails_while_one_is_refused(container, operator, sql):
    gone = container()
    [one, _] = [refused(gone), refused(gone, user=OTHER)]
    gone.drain()
    gone.destroy()
    ran = operator("dead-letters", "retry", "--all", "--json")
    assert (ran.code, [r["verdict"] for r in ran.document]) == (1, ["rejected"] * 2)
    sql.execute("alter table sessions drop constraint valid_status")
    try:
        ran = operator("dead-letters", "retry", "--all")
        assert (ran.code, ran.out.count("  applied")) == (0, 6)
    finally:
        sql.execute("truncate sessions cascade")
        sql.execute(
            "alter table sessions add constraint valid_status"
            " check (status in ('active', 'finalized', 'abandoned'))"
        )
    assert one[1][0] in ran.out
    assert operator("dead-letters", "retry", "--all").out == "nothing is parked as dead\n"


def test_a_discard_asks_first_and_is_final(container, operator, sql):
    gone = container()
    row_id = new_id()
    gone.write(session(row_id))
    bad = gone.write(Update("sessions", row_id, {"status": "bogus"}))
    gone.write(Update("sessions", row_id, {"metadata": {"n": 2}}))
    gone.drain()
    gone.destroy()
    assert operator("dead-letters", "discard", bad).code == 1  # nobody said yes
    assert len(operator("dead-letters", "list", "--json").document) == 2
    ran = operator("dead-letters", "discard", bad, "--yes", "--json")
    assert ran.code == 0, ran.err
    assert [(r["verdict"], r["state"]) for r in ran.document] == [
        ("parked", "discarded"), ("applied", None),
    ]  # fmt: skip
    row = row_of(sql, row_id)
    assert (row["status"], row["metadata"]) == ("active", {"n": 2})
    again = operator("dead-letters", "discard", bad, "--yes")
    assert (again.code, again.err[:26]) == (1, "syncer: already discarded;")
    assert operator("dead-letters", "retry", bad).code == 1
    audit = operator("audit", "--json")
    assert (audit.code, audit.document["total"]["discarded"]) == (0, 1)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["show", UNKNOWN], 1),
        (["retry", UNKNOWN], 1),
        (["edit", "nonsense", "--set", "status=1"], 1),
        (["edit", UNKNOWN, "--set", "status=active"], 2),
        (["discard", UNKNOWN, "--yes"], 1),
    ],
)
def test_a_wrong_id_or_value_is_named_and_changes_nothing(operator, command, code):
    ran = operator("dead-letters", *command)
    assert ran.code == code
    assert ran.err + ran.out
    assert "batches" not in ran.err  # what the flusher would be told


def test_operators_commands_say_when_supabase_is_unreachable_or_refuses_the_key(
    operator, fresh_supabase
):
    refused_key = operator("dead-letters", "list", key=fresh_supabase.anon_key)
    assert (refused_key.code, "SUPABASE_SECRET_KEY" in refused_key.err) == (1, True)
    fresh_supabase.stop_postgrest()
    try:
        assert operator("dead-letters", "retry", "--all").code == 3
        assert operator("conflicts", "list", "--open").code == 3
    finally:
        fresh_supabase.start_postgrest()


def test_a_list_leaves_out_a_message_that_quotes_a_value(container, operator, sql):
    app, row_id = container(), new_id()
    app.write(session(row_id))
    sql.execute(
        "create function public.picky() returns trigger language plpgsql as"
        " $$ begin raise exception 'not this: %', new.content; end $$"
    )
    sql.execute(
        "create trigger picky before insert on session_revisions"
        " for each row execute function public.picky()"
    )
    try:
        app.write(revision(row_id))
        assert app.drain().rejected == 1
    finally:
        sql.execute("drop function public.picky() cascade")
    assert operator("dead-letters", "list").out.startswith("1 × dead P0001 (session")
    [letter] = operator("dead-letters", "list", "--json").document
    assert letter["message"] is None
    assert CANARY in operator("dead-letters", "show", letter["txn_id"]).out


# -- conflicts --


@pytest.fixture
def clashed(container, operator) -> Any:
    """Two containers disagree on a status; what waits behind it is parked; both are gone."""
    mine, theirs = container(), container()
    row_id = new_id()
    mine.write(session(row_id))
    mine.drain()
    theirs.learn(row_id)
    theirs.write(Update("sessions", row_id, {"status": "abandoned"}))
    assert theirs.drain().conflict == 0
    first = mine.write(Update("sessions", row_id, {"status": "finalized"}))
    child = mine.write(revision(row_id))
    report = mine.drain()
    assert (report.conflict, report.pending) == (1, 0)
    mine.destroy()
    theirs.destroy()
    [record] = operator("conflicts", "list", "--open", "--json").document
    assert (record["txn_id"], record["row_id"]) == (first, row_id)
    return record, child


@pytest.mark.parametrize(
    ("choice", "status", "resolution"),
    [
        (["--take", "mine"], "finalized", "mine"),
        (["--take", "theirs"], "abandoned", "theirs"),
        (["--row", '{"status": "active", "metadata": {"by": "a person"}}'], "active", "edited"),
    ],
    ids=["mine", "theirs", "a third version"],
)
def test_a_conflict_is_decided_from_a_laptop_and_the_losers_values_stay_readable(
    clashed, operator, sql, choice, status, resolution
):
    record, child = clashed
    ran = operator("conflicts", "resolve", record["id"], *choice, "--json")
    assert (ran.code, [r["verdict"] for r in ran.document]) == (0, ["applied"] * 2), ran.err
    assert ran.document[1]["txn_id"] == child
    row = row_of(sql, record["row_id"])
    assert (row["status"], row["revision_count"]) == (status, 1)
    assert row["metadata"] == ({"by": "a person"} if resolution == "edited" else {"said": CANARY})
    [kept] = operator("conflicts", "list", "--json").document
    assert (kept["id"], kept["resolution"]) == (record["id"], resolution)
    assert (kept["base"], kept["mine"], kept["theirs"]) == (
        {"status": "active"},
        {"status": "finalized"},
        {"status": "abandoned"},
    )


def test_a_conflict_is_listed_until_it_is_decided_and_decided_once(clashed, operator):
    record, _ = clashed
    first, second = operator("conflicts", "list", "--open").out.splitlines()
    assert first == f"{record['id']}  sessions/{record['row_id']}"  # in full: ids are typed again
    assert second.startswith("    status: manual, since ")
    assert operator("conflicts", "resolve", record["id"], "--take", "theirs").code == 0
    assert operator("conflicts", "list", "--open").out == "no conflict waits for a decision\n"
    audit = operator("audit", "--json")
    assert (audit.code, audit.document["balanced"]) == (0, True)
    assert audit.document["total"]["conflict"] + audit.document["total"]["held"] == 0
    again = operator("conflicts", "resolve", record["id"], "--row", '{"status": "active"}')
    assert (again.code, again.err[:25]) == (1, "syncer: already resolved;")


def test_a_retry_does_not_decide_a_conflict(clashed, operator, sql):
    record, child = clashed
    ran = operator("dead-letters", "retry", record["txn_id"], child)
    assert (ran.code, "a person must decide" in ran.out) == (1, True)
    assert row_of(sql, record["row_id"])["status"] == "abandoned"
    assert [r["id"] for r in operator("conflicts", "list", "--open", "--json").document] == [
        record["id"]
    ]


def test_a_conflict_edited_as_a_dead_letter_waits_for_no_second_decision(clashed, operator, sql):
    record, _ = clashed
    edited = operator(
        "dead-letters", "edit", record["txn_id"], "--set", 'status="abandoned"', "--json"
    )
    assert edited.code == 0, edited.err
    ran = operator("dead-letters", "retry", edited.document["txn_id"], "--json")
    assert (ran.code, [r["verdict"] for r in ran.document]) == (0, ["applied"] * 2)
    assert row_of(sql, record["row_id"])["status"] == "abandoned"
    assert operator("conflicts", "list", "--open", "--json").document == []


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["show", UNKNOWN], 1),
        (["resolve", "nonsense", "--take", "mine"], 1),
        (["resolve", UNKNOWN, "--row", '{"status": "active"}'], 1),
        (["resolve", UNKNOWN, "--take", "both"], 2),
    ],
)
def test_a_wrong_conflict_id_or_choice_is_named(operator, command, code):
    ran = operator("conflicts", *command)
    assert ran.code == code
    assert ran.err + ran.out
    assert "batches" not in ran.err
