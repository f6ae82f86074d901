"""The tables that the buffer's tests write to: every column type, and three generations."""

from __future__ import annotations

from typing import Any

from local_store import Column, Insert, LocalStore, Outcome, PendingTransaction, TableSpec
from local_store.clock import new_id

USER, OTHER = "github:42", "github:43"
COMMON = {
    "id": Column("uuid"),
    "user_id": Column("uuid"),
    "created_at": Column("timestamp"),
    "updated_at": Column("timestamp"),
    "text": Column("text"),
}
SERVER_OWNED = frozenset({"created_at", "counter"})
TABLES = [
    TableSpec(
        "notes",
        {
            **COMMON,
            "number": Column("int"),
            "score": Column("float"),
            "done": Column("bool"),
            "due": Column("timestamp"),
            "ref": Column("uuid"),
            "body": Column("json"),
            "tags": Column("text[]"),
            "status": Column("text", nullable=False, enum=("open", "closed")),
            "short": Column("text", max_bytes=12),
            "counter": Column("int"),
        },
        server_owned=SERVER_OWNED,
    ),
    TableSpec(
        "comments",
        {**COMMON, "note_id": Column("uuid")},
        parent=("note_id", "notes"),
        server_owned=SERVER_OWNED,
    ),
    TableSpec(
        "replies",
        {**COMMON, "comment_id": Column("uuid")},
        parent=("comment_id", "comments"),
        server_owned=SERVER_OWNED,
    ),
]


def add(store: LocalStore, table: str = "notes", user: str = USER, **values: Any) -> str:
    """Insert one row and return its id."""
    row_id = values.setdefault("id", new_id())
    store.write([Insert(table, values)], user_id=user)
    return str(row_id)


def waiting(store: LocalStore) -> list[PendingTransaction]:
    """Return everything that is due."""
    return store.pending(transactions_max=10_000, bytes_max=2**40)


def settle_all(store: LocalStore, version: str = "v1") -> None:
    """Let the server apply everything that is due; each row it left gets this version."""
    store.record(
        [
            Outcome(
                txn.txn_id,
                "applied",
                {f"{op.table}/{op.id}": None if op.kind == "delete" else version for op in txn.ops},
            )
            for txn in waiting(store)
        ]
    )
