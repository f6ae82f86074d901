"""A durable local write buffer: acknowledge now, deliver later, lose nothing.

    store = LocalStore.open(folder, tables=[TableSpec("notes", {...})])
    receipt = store.write([Insert("notes", {"text": "hello"})], user_id="github:42")

It knows tables, rows and operations; it doesn't know what a session is or where rows go.
"""

from local_store.aggregates import Aggregate, Stamp, Unsettled
from local_store.errors import (
    BufferFull,
    CommitUnknown,
    DiskFailed,
    InvalidWrite,
    LocalStoreError,
    RowNotFound,
    SchemaTooNew,
    StoreClosed,
    StoreCorrupt,
    TransactionIdReused,
    VersionMismatch,
)
from local_store.ops import (
    Column,
    Delete,
    Insert,
    Op,
    Outcome,
    PendingTransaction,
    Receipt,
    Resolution,
    Row,
    RowConflict,
    Selection,
    TableSpec,
    TransactionState,
    Update,
    user_uuid,
)
from local_store.store import LocalStore

__all__ = [
    "Aggregate",
    "BufferFull",
    "Column",
    "CommitUnknown",
    "Delete",
    "DiskFailed",
    "Insert",
    "InvalidWrite",
    "LocalStore",
    "LocalStoreError",
    "Op",
    "Outcome",
    "PendingTransaction",
    "Receipt",
    "Resolution",
    "Row",
    "RowConflict",
    "RowNotFound",
    "SchemaTooNew",
    "Selection",
    "Stamp",
    "StoreClosed",
    "StoreCorrupt",
    "TableSpec",
    "TransactionIdReused",
    "TransactionState",
    "Unsettled",
    "Update",
    "VersionMismatch",
    "user_uuid",
]
