"""Whatever single bit of a record turns over, in its columns or on its page, the record is refused.

The judge is the very SQL that every read of the log goes through.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from local_store import LocalStore, Outcome
from local_store.clock import ManualClock
from local_store.schema import intact, seal
from tests.unit.buffer_tables import TABLES, add, waiting

STATES: list[Any] = ["pending", "held", "conflict", "dead", "applied"]
NUMBER = struct.Struct(">q")
REAL = struct.Struct(">d")
RESERVED = range(18, 20)  # of the file's head: the journal mode, which an image in memory hasn't


@pytest.fixture(params=STATES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """Return a buffer file with one record in some state, and text of more than one byte."""
    with LocalStore.open(tmp_path, tables=TABLES, clock=ManualClock()) as store:
        add(store, text="é'🙂", body={"a": [1, None]})
        (txn,) = waiting(store)
        if request.param != "pending":
            reply = {"code": "23514", "message": "refused"}
            outcome = Outcome(txn.txn_id, request.param, reply=reply, retry_after_s=5.0)
            store.record([outcome])
    content = bytearray((tmp_path / "buffer.db").read_bytes())
    content[RESERVED.start : RESERVED.stop] = b"\x01\x01"
    return bytes(content)


def opened(image: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(image)
    connection.create_function("seal", -1, seal, deterministic=True)
    return connection


def columns_of(connection: sqlite3.Connection) -> list[str]:
    return [row[1] for row in connection.execute("PRAGMA table_info(op_log)")]


def accepted(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the records that a read would take, byte for byte with their types."""
    shown = ", ".join(f"typeof({c}), CAST({c} AS BLOB)" for c in columns_of(connection))
    return connection.execute(f"SELECT {shown} FROM op_log WHERE {intact()}").fetchall()


def turned(value: Any) -> Iterator[Any]:
    """Yield a column's value with each of its bits turned over, and nothing in its place."""
    if isinstance(value, str):
        content = bytearray(value.encode())
        for bit in range(len(content) * 8):
            content[bit // 8] ^= 1 << bit % 8
            yield bytes(content)
            content[bit // 8] ^= 1 << bit % 8
    elif value is not None:
        form = REAL if isinstance(value, float) else NUMBER
        for bit in range(64):
            (whole,) = NUMBER.unpack(form.pack(value))
            changed = whole ^ (1 << bit if bit < 63 else -(1 << 63))
            yield form.unpack(NUMBER.pack(changed))[0]
    yield "" if value is None else None


def test_every_bit_of_every_column_is_sealed_as_are_the_marks_derived_from_it(image: bytes):
    with closing(opened(image)) as connection:
        assert len(accepted(connection)) == 1
        names = columns_of(connection)
        (record,) = connection.execute("SELECT * FROM op_log").fetchall()
        # A table as lenient as a damaged page: no types, no rule against a missing value.
        connection.execute(f"CREATE TEMP TABLE damaged ({', '.join(names)})")
        is_text = [isinstance(value, str) for value in record]
        places = ", ".join("CAST(? AS TEXT)" if text else "?" for text in is_text)
        flips = 0
        for number, (name, value) in enumerate(zip(names, record, strict=True)):
            for changed in turned(value):
                connection.execute("DELETE FROM damaged")
                values = [*record[:number], changed, *record[number + 1 :]]
                connection.execute(f"INSERT INTO damaged VALUES ({places})", values)
                found = connection.execute(f"SELECT {intact()} FROM damaged").fetchone()
                if found[0] not in (0, None):
                    # A moment is sealed as SQLite writes it out, with 15 digits: to 10 µs.
                    assert name == "due_at", (name, changed)
                    assert abs(changed - value) < 1e-5, changed
                flips += 1
        assert flips > 3_000


def test_no_bit_of_the_page_makes_another_record_pass(image: bytes):
    with closing(opened(image)) as connection:
        original = accepted(connection)
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'op_log'"
        ).fetchone()
    start = (root - 1) * page_bytes
    head, content = 10, int.from_bytes(image[start + 5 : start + 7], "big")
    used = [*range(start, start + head), *range(start + content, start + page_bytes)]
    refused = 0
    for at in used:
        for bit in range(8):
            damaged = bytearray(image)
            damaged[at] ^= 1 << bit
            found = judged(bytes(damaged))
            assert found in ([], original), (at - start, bit)
            refused += not found
    assert refused > len(used) * 8 * 0.9  # what else turns over is in no column: room on the page


def judged(image: bytes) -> list[tuple[Any, ...]]:
    """Return what a read would take of a damaged file; nothing where SQLite itself refuses."""
    with closing(opened(image)) as connection:
        try:
            return accepted(connection)
        except sqlite3.DatabaseError:
            return []
