"""What the tests of parked work share: a container's side of the parking RPCs."""

from __future__ import annotations

from local_store.ops import Row

from .conftest import Database, insert, new, update


def sent(transaction: Row, before: list[Row | None] | None = None) -> Row:
    """The transaction as a container hands it over for parking."""
    return {**transaction, "before": before or [None] * len(transaction["ops"])}


def park(db: Database, *parks: Row, log_id: str | None = None) -> list[Row]:
    """Park; each item is {"transaction", "state", …}."""
    asked = {"log_id": log_id or db.log_id, "acknowledged_seq": 0, "parks": list(parks)}
    return db.call("sync_park_v1", asked)["verdicts"]


def dead(transaction: Row, before: list[Row | None] | None = None) -> Row:
    return {
        "transaction": sent(transaction, before), "state": "dead", "sqlstate": "23514", "op": 0,
        "message": "violates a check",
    }  # fmt: skip


def held(transaction: Row, blocked_by: str, before: list[Row | None] | None = None) -> Row:
    return {"transaction": sent(transaction, before), "state": "held", "blocked_by": blocked_by}


def poison(db: Database, user: str) -> tuple[str, Row]:
    """A parked insert that the data refuse; returns the row's id and the transaction."""
    row_id = new()
    transaction = db.transaction(user, insert("sessions", row_id, status="bogus"))
    [verdict] = db.send(transaction)
    assert (verdict["verdict"], verdict["sqlstate"]) == ("rejected", "23514")
    [verdict] = park(db, dead(transaction))
    assert (verdict["verdict"], verdict["state"]) == ("parked", "dead")
    return row_id, transaction


def in_conflict(db: Database, user: str, *, mine: Row, theirs: str) -> tuple[str, Row]:
    """A parked update of `mine` on a row where `theirs` (SQL) was set meanwhile."""
    row_id = db.session(user)
    base = db.version("sessions", row_id)
    [was] = db.query("select to_jsonb(s) as r from sessions s where id = %s", row_id)
    db.as_user(user, f"update sessions set {theirs} where id = %s", row_id)
    transaction = db.transaction(user, update("sessions", row_id, base, **mine))
    [verdict] = db.send(transaction)
    assert verdict["verdict"] == "conflict"
    row = verdict["rows"][f"sessions/{row_id}"]
    columns = sorted(mine)
    record = {
        "table": "sessions", "id": row_id, "columns": columns, "policy": "merge",
        "base": {c: was["r"][c] for c in columns}, "mine": mine,
        "theirs": {c: row[c] for c in columns}, "theirs_version": row["updated_at"],
        "outcome": "manual", "through": transaction["txn_id"],
    }  # fmt: skip
    before = [{c: was["r"][c] for c in columns}]
    asked = {"transaction": sent(transaction, before), "state": "conflict", "records": [record]}
    [parked] = park(db, asked)
    assert (parked["verdict"], parked["state"]) == ("parked", "conflict")
    return row_id, transaction


def results(reply: Row) -> list[tuple[str, str | None]]:
    """(verdict, state) of each transaction that an operator's call tried."""
    return [(item["verdict"], item["state"]) for item in reply["results"]]


def parked_states(db: Database, *transactions: Row) -> list[str | None]:
    """The state of each parked transaction, None when it isn't parked any more."""
    found = {
        str(row["txn_id"]): row["state"]
        for row in db.query("select txn_id, state from sync.parked")
    }
    return [found.get(transaction["txn_id"]) for transaction in transactions]


def conflict_of(db: Database, transaction: Row) -> Row:
    """The one record of a transaction."""
    asked = {"txn_ids": [transaction["txn_id"]]}
    [record] = db.call("sync_list_conflicts_v1", asked)["conflicts"]
    return record
