"""What can go wrong in the local buffer; each error says whether the write happened.

LocalStoreError
├─ InvalidWrite(table, column, reason)      nothing was written; mend the value
│   └─ RowNotFound                          nothing was written; not held here for this user
├─ VersionMismatch(table, id, …)            nothing was written; read again
├─ TransactionIdReused(txn_id)              nothing was written; the id has other content
├─ BufferFull(retry_after_s)                nothing was written; the drain frees space
├─ StoreClosed                              nothing was written; this store accepts no more
├─ DiskFailed                               nothing was written; try again when the disk is well
├─ CommitUnknown(txn_id)                    it may have happened: repeat with the same txn_id
├─ StoreCorrupt(path)                       the file can't be trusted; nothing was written
└─ SchemaTooNew(found, known)               written by newer code; nothing was touched
"""

from __future__ import annotations

from pathlib import Path


class LocalStoreError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidWrite(LocalStoreError):
    """A value the buffer can't promise to deliver. Nothing was written."""

    def __init__(self, table: str, column: str, reason: str) -> None:
        super().__init__(f"{table}.{column}: {reason}" if table else f"{column}: {reason}")
        self.table = table
        self.column = column
        self.reason = reason


class RowNotFound(InvalidWrite):
    """The row isn't held here, or belongs to somebody else; the two look the same on purpose."""

    def __init__(self, table: str, row_id: str) -> None:
        super().__init__(table, "id", f"no row {row_id} is held here for this user; read it first")
        self.row_id = row_id


class VersionMismatch(LocalStoreError):
    """The row changed since the caller read it. Nothing was written; read it again."""

    def __init__(self, table: str, row_id: str, expected: int, found: int) -> None:
        super().__init__(f"{table}/{row_id} is at version {found}, the caller expected {expected}")
        self.table = table
        self.row_id = row_id
        self.expected = expected
        self.found = found


class TransactionIdReused(LocalStoreError):
    """The txn_id was accepted before with other content. Nothing was written."""

    def __init__(self, txn_id: str) -> None:
        super().__init__(f"txn_id {txn_id} was accepted before with other content; use a new id")
        self.txn_id = txn_id


class BufferFull(LocalStoreError):
    """A limit of the buffer is reached. Nothing was written; the drain frees space."""

    def __init__(self, retry_after_s: float, reason: str) -> None:
        super().__init__(f"the local buffer is full ({reason}); retry in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s
        self.reason = reason


class StoreClosed(LocalStoreError):
    """The store accepts no more calls here: closed, or opened by another process before a fork."""


class DiskFailed(LocalStoreError):
    """The disk or the file under SQLite failed before anything was committed."""


class CommitUnknown(LocalStoreError):
    """The disk failed during the commit: it may have happened. Repeat with the same txn_id."""

    def __init__(self, txn_id: str, cause: str) -> None:
        super().__init__(
            f"the disk failed while {txn_id} was committed ({cause}); "
            "its outcome is unknown: repeat the call with this txn_id"
        )
        self.txn_id = txn_id
        self.cause = cause


class StoreCorrupt(LocalStoreError):
    """The buffer file isn't a buffer file any more."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path} can't be read as a buffer ({cause}); move it aside and keep it")
        self.path = path


class SchemaTooNew(LocalStoreError):
    """The file was written by newer code; this code leaves it untouched."""

    def __init__(self, found: str, known: str) -> None:
        super().__init__(f"the buffer is at schema {found}, this code knows {known}; update it")
        self.found = found
        self.known = known
