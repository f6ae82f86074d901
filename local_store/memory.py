"""What the writing half remembers between two groups, so that a commit reads nothing it knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from local_store.door import Accepted
from local_store.listing import Touch
from local_store.op_log import Marks
from local_store.ops import Receipt
from local_store.views import Key, View


@dataclass(slots=True)
class Proposal:
    """A transaction that passed the door and waits for its place in the log."""

    txn_id: str
    is_given: bool
    author: str
    accepted: Accepted
    size_bytes: int

    @property
    def deletes(self) -> bool:
        """Whether it ends a row, and so needs to know what hangs on it."""
        return any(op.kind == "delete" for op in self.accepted.ops)


@dataclass(slots=True)
class Tail:
    """What was accepted and isn't listed yet: its touches, its rows, and receipts by txn_id."""

    touches: list[Touch] = field(default_factory=list)
    views: dict[Key, View] = field(default_factory=dict)
    receipts: dict[str, tuple[str, str, Receipt]] = field(default_factory=dict)
    size_bytes: int = 0


class Memory:
    """What the writing half remembers of the file between two groups; valid for one generation.

    Besides the tail these are rows that were written to before, since the next write to one would
    have to make it anew: at most `views_bytes_max` of JSON, the least recently written go first.
    """

    def __init__(self, views_bytes_max: int) -> None:
        self._views_bytes_max = views_bytes_max
        self._views: OrderedDict[Key, tuple[View, int]] = OrderedDict()
        self._bytes = 0
        self.marks: Marks | None = None
        self.log_id = ""
        self.tail: Tail | None = None  # None: unknown
        self.generation = -1

    def forget(self, generation: int) -> None:
        """Start afresh: the file was changed by others."""
        self._views.clear()
        self._bytes, self.marks, self.tail, self.generation = 0, None, None, generation

    def view(self, key: Key) -> View | None:
        """Return a row as the last group left it; None when it isn't remembered."""
        if self.tail is not None and key in self.tail.views:
            return self.tail.views[key]
        found = self._views.get(key)
        return None if found is None else found[0]

    def keep(
        self,
        marks: Marks,
        tail: Tail,
        changed: Mapping[Key, View],
        loaded: Mapping[Key, View | None],
    ) -> None:
        """Remember what a durable group left: rows it changed, of those that were there before."""
        self.marks, self.tail = marks, tail
        for key, view in changed.items():
            if key in self._views or loaded.get(key) is not None:
                self._remember(key, view)

    def _remember(self, key: Key, view: View) -> None:
        known = self._views.pop(key, None)
        self._bytes -= 0 if known is None else known[1]
        size_bytes = len(orjson.dumps(view.body)) if known is None else known[1]
        self._views[key] = view, size_bytes
        self._bytes += size_bytes
        while self._bytes > self._views_bytes_max:
            self._bytes -= self._views.popitem(last=False)[1][1]
