"""What a batch does while others hold its rows, and what it answers after waiting for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.types.json import Jsonb

from local_store.clock import SystemClock
from local_store.ops import Row

from .conftest import NOW, Database, delete, insert, new, revision, update

WAIT_MAX_S = 20


@pytest.fixture
def other(local_supabase) -> Iterator[Database]:
    made = Database(local_supabase.database_url)
    yield made
    made.close()


def hole(session: str, row_id: str) -> Row:
    return insert(
        "hole_resolutions", row_id, session_id=session, hole_id="h", resolution_text="t",
        resolution_type="clarify_intent",
    )  # fmt: skip


@contextmanager
def in_flight(holder: Database, statement: str, *values: object) -> Iterator[None]:
    """Run the statement in a transaction that commits when the block ends."""
    with holder.owner.transaction():
        holder.owner.execute(statement, values)
        yield


def wait_until_blocked(db: Database, sender: Database) -> None:
    """Return once the sender's connection waits for a lock."""
    clock, pid = SystemClock(), sender.owner.info.backend_pid
    deadline = clock.monotonic() + WAIT_MAX_S
    while not db.one("select cardinality(pg_blocking_pids(%s)) > 0", pid):
        assert clock.monotonic() < deadline, "nobody waited"
        clock.sleep(0.01)


def send_while(
    db: Database, sender: Database, sent: Row, statement: str, *values: object
) -> list[str]:
    """The verdicts of a batch that had to wait for another transaction, which then committed."""
    with ThreadPoolExecutor(1) as pool:
        with in_flight(db, statement, *values):
            reply: Future[list[Row]] = pool.submit(sender.send, sent)
            watcher = Database(db.url)
            try:
                wait_until_blocked(watcher, sender)
            finally:
                watcher.close()
        return [verdict["verdict"] for verdict in reply.result(WAIT_MAX_S)]


@pytest.mark.parametrize("kind", ["insert", "update"])
def test_one_transaction_through_two_logs_at_once_is_a_duplicate(db, other, user, kind):
    row_id = db.session(user)
    op = (
        insert("sessions", new())
        if kind == "insert"
        else update("sessions", row_id, db.version("sessions", row_id), status="finalized")
    )
    sent = db.transaction(user, op)
    batch = {"protocol": 1, "log_id": db.log_id, "transactions": [sent]}
    statement = (
        "select set_config('role', 'service_role', true), public.sync_apply_batch_v1(%s::jsonb)"
    )
    assert send_while(db, other, sent, statement, Jsonb(batch)) == ["duplicate"]


def test_a_row_held_by_somebody_holds_only_its_own_transaction(db, other, user):
    locked, free = db.session(user), db.session(user)
    sent = [
        db.transaction(user, update("sessions", row, db.version("sessions", row), source="prompt"))
        for row in (locked, free)
    ]
    child = db.transaction(user, revision(locked))
    with in_flight(other, "select 1 from sessions where id = %s for update", locked):
        verdicts = db.send(*sent, child)
        assert [(v["verdict"], v["sqlstate"]) for v in verdicts] == [
            ("held", "55P03"),
            ("applied", None),
            ("held", "55P03"),
        ]
    assert [v["verdict"] for v in db.send(*sent, child)] == ["applied", "duplicate", "applied"]


def test_two_logs_updating_children_of_the_same_parents_crosswise_never_deadlock(db, user):
    parents = [db.session(user), db.session(user)]
    pairs = [[(new(), parents[0]), (new(), parents[1])], [(new(), parents[1]), (new(), parents[0])]]
    db.send(*(db.transaction(user, hole(parent, row)) for pair in pairs for row, parent in pair))

    def log(pair: list[tuple[str, str]]) -> list[str]:
        mine, seen = Database(db.url), []
        try:
            versions = {row: mine.version("hole_resolutions", row) for row, _ in pair}
            for applied in (True, False) * 13:
                verdicts = mine.send(*(
                    mine.transaction(
                        user,
                        update("hole_resolutions", row, versions[row], applied=applied),
                    )
                    for row, _ in pair
                ))  # fmt: skip
                seen += [verdict["verdict"] for verdict in verdicts]
                versions = {row: v["versions"][f"hole_resolutions/{row}"]
                            for (row, _), v in zip(pair, verdicts, strict=True)}  # fmt: skip
        finally:
            mine.close()
        return seen

    with ThreadPoolExecutor(2) as pool:
        seen = [verdict for result in pool.map(log, pairs) for verdict in result]
    assert seen == ["applied"] * 104
    assert [db.one("select hole_count from sessions where id = %s", row) for row in parents] == [
        2,
        2,
    ]


def test_a_strangers_transaction_satisfies_no_after(db, user, stranger):
    theirs = db.transaction(stranger, insert("sessions", new()))
    db.send(theirs)
    mine = db.transaction(user, insert("sessions", new()), after=[theirs["txn_id"]])
    assert [(v["verdict"], v["blocked_by"]) for v in db.send(mine)] == [("held", theirs["txn_id"])]


def test_a_child_deleted_after_its_parent_in_one_transaction_is_done(db, user):
    parent, child = db.session(user), new()
    db.send(db.transaction(user, revision(parent, child)))
    bases = (db.version("sessions", parent), db.version("session_revisions", child))
    ops = (delete("sessions", parent, bases[0]), delete("session_revisions", child, bases[1]))
    [verdict] = db.send(db.transaction(user, *ops))
    assert verdict["verdict"] == "applied"
    assert set(verdict["versions"].values()) == {None}


def test_a_strangers_child_deleted_along_is_refused(db, user, stranger):
    theirs, child = db.session(stranger), new()
    db.send(db.transaction(stranger, revision(theirs, child)))
    mine = db.session(user)
    ops = (
        delete("sessions", mine, db.version("sessions", mine)),
        delete("session_revisions", child, db.version("session_revisions", child)),
    )
    assert [v["sqlstate"] for v in db.send(db.transaction(user, *ops))] == ["42501"]
    assert db.one("select count(*) from sessions where id = %s", mine) == 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda: insert("sessions", new(), updated_at=NOW),
        lambda: insert("no_such_table", new()),
        lambda: update("sessions", "not a uuid", NOW, status="active"),
    ],
)
def test_a_conflict_outranks_an_op_that_can_never_be_done(db, user, bad):
    row_id = db.session(user)
    stale = update("sessions", row_id, NOW, status="finalized")
    assert [v["verdict"] for v in db.send(db.transaction(user, bad(), stale))] == ["conflict"]


def test_an_op_that_can_never_be_done_is_named_by_its_index(db, user):
    ops = (insert("sessions", new()), insert("sessions", new(), updated_at=NOW))
    [verdict] = db.send(db.transaction(user, *ops))
    assert (verdict["verdict"], verdict["op"]) == ("rejected", 1)


def test_an_update_of_no_column_is_applied_and_moves_nothing(db, user):
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    [verdict] = db.send(db.transaction(user, update("sessions", row_id, base)))
    assert verdict["verdict"] == "applied"
    assert db.version("sessions", row_id) == base


def test_key_and_owner_may_be_repeated_in_the_values(db, user):
    row_id = new()
    op = insert("sessions", row_id, id=row_id, user_id=user)
    assert [v["verdict"] for v in db.send(db.transaction(user, op))] == ["applied"]


def test_no_claims_of_an_author_outlast_the_call(db, user):
    batch = {"protocol": 1, "log_id": new(), "transactions": [
        db.transaction(user, insert("sessions", new()))]}  # fmt: skip
    with db.owner.transaction():
        db.owner.execute("select set_config('role', 'service_role', true)")
        db.owner.execute("select public.sync_apply_batch_v1(%s)", (Jsonb(batch),))
        left = db.query(
            "select current_user::text as role, auth.uid() as uid,"
            " current_setting('sync.accepted_at', true) as accepted_at"
        )
    assert left == [{"role": "service_role", "uid": None, "accepted_at": ""}]


def test_an_endless_moment_of_acceptance_is_refused(db, user):
    sent = db.transaction(user, insert("sessions", new()), accepted_at="-infinity")
    assert [v["sqlstate"] for v in db.send(sent)] == ["22008"]


def test_a_number_that_changes_its_form_inside_a_json_column_moves_the_token(db, user):
    row_id = db.session(user, metadata={"a": 1})
    before = db.version("sessions", row_id)
    db.query("update sessions set metadata = '{\"a\": 1.0}' where id = %s", row_id)
    assert db.version("sessions", row_id) > before


def test_deleting_or_moving_the_current_draft_empties_what_was_derived_from_it(db, user):
    for statement in (
        "delete from session_drafts where id = %s",
        f"update session_drafts set session_id = '{db.session(user)}' where id = %s",
    ):
        session, draft = db.session(user), new()
        base = db.version("sessions", session)
        db.send(db.transaction(
            user,
            update("sessions", session, base, current_draft_id=draft),
            insert("session_drafts", draft, session_id=session, version=3, ir={"a": 1},
                   validation_status="valid"),
        ))  # fmt: skip
        derived = "select current_ir, current_draft_version from sessions where id = %s"
        assert db.query(derived, session) == [{"current_ir": {"a": 1}, "current_draft_version": 3}]
        token = db.version("sessions", session)
        db.query(statement, draft)
        assert db.query(derived, session) == [{"current_ir": None, "current_draft_version": 0}]
        assert db.version("sessions", session) == token


def test_a_draft_that_arrives_while_a_session_is_pointed_at_it_is_derived(db, other, user):
    session, draft = db.session(user), new()
    with ThreadPoolExecutor(1) as pool:
        with in_flight(
            db,
            "insert into session_drafts (id, session_id, user_id, version, ir, validation_status)"
            " values (%s, %s, %s, 7, '{}', 'valid')",
            draft, session, user,
        ):  # fmt: skip
            pointing = pool.submit(
                other.query,
                "update sessions set current_draft_id = %s where id = %s",
                draft,
                session,
            )
            watcher = Database(db.url)
            try:
                wait_until_blocked(watcher, other)
            finally:
                watcher.close()
        pointing.result(WAIT_MAX_S)
    assert db.one("select current_draft_version from sessions where id = %s", session) == 7


def test_statements_over_many_sessions_in_any_order_never_deadlock(db, user):
    sessions = [db.session(user) for _ in range(30)]

    def insert_all(order: list[str]) -> int:
        mine, failed = Database(db.url), 0
        try:
            for _ in range(15):
                try:
                    mine.query(
                        "insert into session_revisions"
                        " (session_id, user_id, content, revision_type)"
                        " select s, %s, 'x', 'initial' from unnest(%s::uuid[]) s",
                        user, order,
                    )  # fmt: skip
                except psycopg.errors.DeadlockDetected:
                    failed += 1
        finally:
            mine.close()
        return failed

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(insert_all, [sessions, sessions[::-1]])) == [0, 0]
