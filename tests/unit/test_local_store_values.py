"""Any value at all: refused with its column's name, or delivered as it was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_store import Delete, Insert, InvalidWrite, LocalStore, user_uuid
from local_store.clock import new_id
from local_store.decoding import decode_ops
from local_store.door import DoorLimits, accept, digest_of
from local_store.ops import by_name
from tests.unit.buffer_tables import TABLES, USER, add, waiting

SPECS = by_name(TABLES)
AUTHOR = user_uuid(USER)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path_factory.mktemp("values"), tables=TABLES) as opened:
        yield opened


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]))
    | st.text("ab\x00\ud800\\u0000é🙂")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 3), inner, max_size=4)
        | st.tuples(inner)
    ),
    max_leaves=12,
)
COLUMNS = st.sampled_from(["text", "number", "score", "done", "due", "ref", "tags", "body"])


def equal(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 and True differ, 1 and 1.0 don't have to."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(column=COLUMNS, value=VALUES)
def test_any_value_is_refused_or_comes_back_equal(store: LocalStore, column: str, value: Any):
    refused = ""
    try:
        row_id = add(store, **{column: value})
    except InvalidWrite as error:
        refused = f"{error.table}.{error.column}"
    if refused:
        assert refused.startswith(f"notes.{column}")
        return
    row = store.get("notes", row_id, user_id=USER)
    assert row is not None
    assert equal(row[column], value)
    store_ops = waiting(store)[-1].ops
    assert equal(store_ops[0].values[column], value)


@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(COLUMNS, VALUES, max_size=4))
def test_accepted_ops_decode_to_the_same_values_and_digest(values: dict[str, Any]):
    ops = [Insert("notes", {"id": new_id(), **values}), Delete("notes", new_id())]
    try:
        accepted = accept(ops, SPECS, AUTHOR, DoorLimits())
    except InvalidWrite:
        return
    decoded = decode_ops(accepted.encoded, "{}", {})
    assert decoded == accepted.ops
    assert digest_of(decoded) == accepted.digest
    assert orjson.loads(accepted.encoded) == [op.to_json() for op in accepted.ops]
    accepted.encoded.decode("utf-8")
    assert b"\\u0000" not in accepted.encoded.replace(b"\\\\", b"")  # Postgres refuses it
