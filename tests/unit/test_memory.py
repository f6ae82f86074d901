"""What the writing half remembers between two groups: bounded, the least recently written goes."""

from __future__ import annotations

import orjson

from local_store.memory import Memory, Tail
from local_store.op_log import Marks
from local_store.views import View

MARKS = Marks(0, 0, 0, 0, 0, 0, 0, 0)


def view(text: str) -> View:
    return View("user", {"text": text}, None, 1)


def test_of_the_rows_that_are_remembered_the_least_recently_written_go_first():
    size = len(orjson.dumps({"text": "a"}))
    memory = Memory(views_bytes_max=2 * size)

    def written(name: str) -> None:
        key = ("notes", name)
        memory.keep(MARKS, Tail(), {key: view(name)}, {key: view("before")})

    def known(*names: str) -> list[str]:
        return [name for name in names if memory.view(("notes", name)) is not None]

    written("a")
    written("b")
    assert known("a", "b") == ["a", "b"]
    written("a")
    written("c")
    assert known("a", "b", "c") == ["a", "c"]
