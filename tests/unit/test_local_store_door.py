"""The door: what is accepted can be delivered, what is refused is named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from local_store import (
    BufferFull,
    Column,
    Delete,
    Insert,
    InvalidWrite,
    LocalStore,
    TableSpec,
    Update,
    user_uuid,
)
from local_store.clock import new_id
from local_store.door import DoorLimits, accept
from local_store.ops import by_name
from tests.unit.buffer_tables import OTHER, TABLES, USER, add

SPECS = by_name(TABLES)
AUTHOR = user_uuid(USER)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path_factory.mktemp("door"), tables=TABLES) as opened:
        yield opened


@dataclass
class Plain:
    x: int


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def endless() -> list:
    value: list = []
    value.append(value)
    return value


REFUSED = [
    ("text", 5, "must be text"),
    ("text", b"bytes", "must be text"),
    ("text", "a\x00b", "NUL"),
    ("text", "a\ud800b", "surrogate"),
    ("number", "5", "must be an integer"),
    ("number", 5.0, "must be an integer"),
    ("number", True, "must be an integer"),
    ("number", 2**63, "64 bits"),
    ("number", -(2**63) - 1, "64 bits"),
    ("score", "1.5", "must be a number"),
    ("score", True, "must be a number"),
    ("score", float("nan"), "NaN"),
    ("score", float("inf"), "Infinity"),
    ("score", Decimal("1.5"), "must be a number"),
    ("done", 1, "true or false"),
    ("done", "true", "true or false"),
    ("due", "tomorrow", "ISO 8601"),
    ("due", "2026-01-01T00:00:00", "UTC offset"),
    ("due", "2026-01-01T00:00:00+00:00Z", "ISO 8601"),
    ("due", "2026-W01-1T00:00:00+00:00", "must look like"),
    ("due", "2026-01-01x00:00:00+00:00", "must look like"),
    ("due", "2026-01-01T00:00:00+16:00", "must look like"),
    ("due", "20260101T000000Z", "must look like"),
    ("due", "2026-02-30T00:00:00Z", "ISO 8601"),
    ("due", datetime(2026, 1, 1, tzinfo=UTC), "must be text"),
    ("ref", "not a uuid", "UUID"),
    ("ref", UUID(int=1), "UUID"),
    ("tags", "abc", "list of texts"),
    ("tags", ("a",), "list of texts"),
    ("tags[1]", ["a", None], "must be text"),
    ("tags[0]", ["a\x00"], "NUL"),
    ("status", "ajar", "one of open, closed"),
    ("status", None, "must not be null"),
    ("short", "x" * 11, "12 bytes"),
    ("short", "é" * 6, "12 bytes"),
    ("body", float("nan"), "NaN"),
    ("body.a[1].b", {"a": [0, {"b": float("-inf")}]}, "Infinity"),
    ("body.a[0]", {"a": ["\x00"]}, "NUL"),
    ("body.a", {"a": "\ud800"}, "surrogate"),
    ("body key", {"\x00": 1}, "NUL"),
    ("body.deep key", {"deep": {"\udfff": 1}}, "surrogate"),
    ("body key", {1: "a"}, "must be text"),
    ("body", (1, 2), "tuple isn't a JSON value"),
    ("body.a", {"a": {1, 2}}, "set isn't a JSON value"),
    ("body", Plain(1), "Plain isn't a JSON value"),
    ("body[0]", [datetime(2026, 1, 1, tzinfo=UTC)], "datetime isn't a JSON value"),
    ("body", UUID(int=1), "UUID isn't a JSON value"),
    ("body.n", {"n": 2**70}, "64 bits"),
    ("body", nested(201), "nested too deeply"),
    ("body", endless(), "nested too deeply"),
    ("nonsense", 1, "no such column"),
    ("created_at", "2026-01-01T00:00:00Z", "owned by the server"),
    ("updated_at", "2026-01-01T00:00:00Z", "owned by the server"),
    ("counter", 1, "owned by the server"),
]
ACCEPTED = [
    ("text", ""),
    ("text", "🙂 \u202e rtl \\u0000 __proto__ '; DROP TABLE rows; --"),
    ("number", 2**63 - 1),
    ("number", -(2**63)),
    ("score", 1),
    ("score", 1e308),
    ("score", -0.1),
    ("done", False),
    ("due", "2026-01-31T23:59:59.999999+00:00"),
    ("due", "2026-01-01 00:00Z"),
    ("due", "2026-01-01T00:00:00-1530"),
    ("ref", "00000000-0000-0000-0000-00000000000a"),
    ("tags", []),
    ("tags", ["", "é"]),
    ("status", "closed"),
    ("short", "x" * 10),
    ("body", None),
    ("body", {"": None, "a": [[], {}, 0, -0.5, True, "\\u0000"], "__proto__": {"x": 1}}),
    ("body", nested(100)),
    ("body", [[] for _ in range(500)]),
    ("body", "x" * 1_000_000),
]


@pytest.mark.parametrize(("column", "value", "reason"), REFUSED)
def test_a_value_that_could_not_be_delivered_is_refused_by_name(
    store: LocalStore, column: str, value: Any, reason: str
):
    name = column.split(".")[0].split("[")[0].split(" ")[0]
    before = store.stats()["last_seq"]
    row_id = add(store, text="a row to update")
    for op in (Insert("notes", {name: value}), Update("notes", row_id, {name: value})):
        with pytest.raises(InvalidWrite) as caught:
            store.write([Insert("notes", {}), op], user_id=USER)
        assert (caught.value.table, caught.value.column) == ("notes", column)
        assert reason in caught.value.reason
        assert str(caught.value).startswith(f"notes.{column}: ")
    assert store.stats()["last_seq"] == before + 1


@pytest.mark.parametrize(("column", "value"), ACCEPTED)
def test_an_odd_but_deliverable_value_comes_back_as_it_was(
    store: LocalStore, column: str, value: Any
):
    inserted, updated = add(store, **{column: value}), add(store)
    store.write([Update("notes", updated, {column: value})], user_id=USER)
    for row_id in (inserted, updated):
        row = store.get("notes", row_id, user_id=USER)
        assert row is not None
        assert row[column] == value
        assert type(row[column]) is type(value)


def test_what_was_accepted_is_a_copy(store: LocalStore):
    body, tags = {"a": [1]}, ["x"]
    row_id = add(store, body=body, tags=tags)
    body["a"].append(2)
    tags.append("y")
    row = store.get("notes", row_id, user_id=USER)
    assert (row["body"], row["tags"]) == ({"a": [1]}, ["x"])
    row["body"]["a"].append(3)
    assert store.get("notes", row_id, user_id=USER)["body"] == {"a": [1]}


@pytest.mark.parametrize("key", ["", "x", 5, 0, False, b"\0" * 16, [], "\ud800"])
def test_a_key_that_is_no_uuid_is_refused(store: LocalStore, key: Any):
    for op in (
        Insert("notes", {"id": key}),
        Update("notes", key, {"text": "x"}),
        Delete("notes", key),
    ):
        with pytest.raises(InvalidWrite, match=r"notes\.id: must be a UUID"):
            store.write([op], user_id=USER)


def test_text_keys_are_taken_as_they_are(tmp_path: Path):
    spec = TableSpec("settings", {"name": Column("text"), "value": Column("json")}, key="name")
    with LocalStore.open(tmp_path, tables=[spec]) as store:
        for key in ("a/b", "ÅSA", "'; --"):
            store.write([Insert("settings", {"name": key, "value": 1})], user_id=USER)
            assert store.get("settings", key, user_id=USER)["value"] == 1
        for key in ("", "\x00", "\ud800", 7):
            with pytest.raises(InvalidWrite, match=r"settings\.name"):
                store.write([Insert("settings", {"name": key})], user_id=USER)
            assert store.get("settings", key, user_id=USER) is None  # type: ignore[arg-type]


def test_the_owner_is_always_the_author(store: LocalStore):
    for owner in (USER, user_uuid(USER), None):
        row_id = add(store, user_id=owner)
        assert store.get("notes", row_id, user_id=USER)["user_id"] == user_uuid(USER)
    row_id = add(store)
    for owner in (OTHER, user_uuid(OTHER), 5, ""):
        with pytest.raises(InvalidWrite, match=r"notes\.user_id"):
            add(store, user_id=owner)
    with pytest.raises(InvalidWrite, match=r"notes\.user_id"):
        store.write([Update("notes", row_id, {"user_id": USER})], user_id=USER)


def test_a_user_id_maps_to_one_uuid_for_good():
    assert user_uuid("AAAAAAAA-0000-4000-8000-000000000001") == (
        "aaaaaaaa-0000-4000-8000-000000000001"
    )
    assert user_uuid("github:42") == "8454e2de-5964-580a-85fa-9909d885b531"
    assert user_uuid("github:42") != user_uuid("github:43")


def test_empty_and_oversized_transactions_are_refused(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, ops_max=3, op_bytes_max=1_000) as store:
        row_id = add(store)
        for ops, name in (
            ([], "ops"),
            ([Insert("notes", {})] * 4, "ops"),
            ([Update("notes", row_id, {})], "changes"),
            ([Insert("notes", {"text": "x" * 1_000})], "values"),
            ([Insert("comments", {})], "note_id"),
            ([Insert("comments", {"note_id": None})], "note_id"),
        ):
            with pytest.raises(InvalidWrite) as caught:
                store.write(ops, user_id=USER)
            assert caught.value.column == name
        store.write([Insert("notes", {"text": "x" * 900})] * 3, user_id=USER)


INJECTIONS = [
    "nope",
    "",
    "op_log",
    "notes; DROP TABLE rows",
    "notes' OR 1=1 --",
    'text") OR 1=1 --',
    "text') = 'x' OR ('1",
    "-",
    "text, (SELECT 1)",
    "rowid",
    "$.text",
    "text\x00",
    "тext",
]


@pytest.mark.parametrize("name", INJECTIONS)
def test_a_name_that_is_not_registered_is_never_part_of_a_statement(store: LocalStore, name: str):
    row_id = add(store, text="safe")
    asked = store.change_counter()
    calls = [
        lambda: store.write([Insert(name, {})], user_id=USER),
        lambda: store.write([Update(name, row_id, {"text": "x"})], user_id=USER),
        lambda: store.write([Delete(name, row_id)], user_id=USER),
        lambda: store.write([Insert("notes", {name: "x"})], user_id=USER),
        lambda: store.write([Update("notes", row_id, {name: "x"})], user_id=USER),
        lambda: store.get(name, row_id, user_id=USER),
        lambda: store.is_held(name, row_id, user_id=USER),
        lambda: store.select(name, user_id=USER),
        lambda: store.select("notes", user_id=USER, where={name: "x"}),
        lambda: store.select("notes", user_id=USER, order_by="-" + name),
        lambda: store.transactions_of(name, row_id, user_id=USER),
        lambda: store.refresh(name, [], user_id=USER, as_of=asked, where={}),
        lambda: store.refresh("notes", [], user_id=USER, as_of=asked, where={name: 1}),
    ]
    for call in calls:
        with pytest.raises(InvalidWrite):
            call()
    assert store.get("notes", row_id, user_id=USER)["text"] == "safe"


def test_values_in_a_filter_are_compared_and_never_executed(store: LocalStore):
    evil = "x' OR '1'='1"
    row_id = add(store, text=evil)
    add(store, text="x")
    found = store.select("notes", user_id=USER, where={"text": evil})
    assert [row["id"] for row in found] == [row_id]
    assert store.select("notes", user_id=USER, where={"id": evil}) == []
    assert store.select("notes", user_id=evil) == []
    for value in ({"a": 1}, [[1]], ["x", None], 2**70, b"x", "\ud800"):
        with pytest.raises(InvalidWrite):
            store.select("notes", user_id=USER, where={"text": value})


def test_a_registered_column_with_an_odd_name_is_still_not_interpolated(tmp_path: Path):
    odd = "a') OR 1=1 --"
    spec = TableSpec("odd", {"id": Column("uuid"), odd: Column("text")})
    with LocalStore.open(tmp_path, tables=[spec]) as store:
        store.write([Insert("odd", {odd: "x"})], user_id=USER)
        assert store.select("odd", user_id=USER)[0][odd] == "x"
        with pytest.raises(InvalidWrite):
            store.select("odd", user_id=USER, where={odd: "x"})
        with pytest.raises(InvalidWrite):
            store.select("odd", user_id=USER, order_by=odd)


# -- encoding and digest --------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_the_order_of_keys_and_on_nothing_less():
    row_id = new_id()

    def digest(values: dict, user: str = AUTHOR) -> str:
        ops = [Insert("notes", {"id": row_id, **values})]
        return accept(ops, SPECS, user, DoorLimits()).digest

    first = digest({"text": "a", "number": 1, "body": {"x": 1, "y": [1, {"p": 1, "q": 2}]}})
    assert first == digest({"body": {"y": [1, {"q": 2, "p": 1}], "x": 1}, "number": 1, "text": "a"})
    others = [
        {"text": "a", "number": 1, "body": {"x": 1, "y": [{"p": 1, "q": 2}, 1]}},
        {"text": "a", "number": 2, "body": {"x": 1, "y": [1, {"p": 1, "q": 2}]}},
        {"text": "a", "number": 1},
        {"text": "a", "number": 1, "body": None},
    ]
    assert len({first, *map(digest, others)}) == 5


def test_the_digest_is_the_sha256_of_the_sorted_ops_alone():
    row_id = new_id()
    ops = [Update("notes", row_id, {"text": "é"}, expected_version=3)]
    accepted = accept(ops, SPECS, AUTHOR, DoorLimits())
    canonical = (
        f'[{{"id":"{row_id}","kind":"update","table":"notes","values":{{"text":"é"}}}}]'.encode()
    )
    assert accepted.digest == hashlib.sha256(canonical).hexdigest()


def test_a_full_buffer_refuses_after_the_door_and_a_bad_value_before(tmp_path: Path):
    with LocalStore.open(tmp_path, tables=TABLES, buffer_transactions_max=0) as store:
        with pytest.raises(BufferFull):
            add(store)
        with pytest.raises(InvalidWrite):
            add(store, number="x")
