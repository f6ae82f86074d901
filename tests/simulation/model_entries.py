"""What the modelled server remembers of transactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from local_store.ops import Row, TableSpec
from tests.simulation.model_rows import Key


@dataclass(slots=True)
class LedgerEntry:
    """What the server remembers of a transaction that is final."""

    log_id: str
    seq: int
    user_id: str
    digest: str
    versions: dict[str, str | None]
    met: dict[str, str]
    verdict: str = "applied"
    replaced_by: str | None = None
    defaults: dict[str, Row] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def links(self) -> dict[str, tuple[str | None, str | None]]:
        """Return for each row the version it left, and what a merge had met before."""
        return {key: (version, self.met.get(key)) for key, version in self.versions.items()}


@dataclass(slots=True)
class ParkedEntry:
    """A transaction that a person or an event must free."""

    log_id: str
    item: Row
    state: str
    cause: Row

    @property
    def place(self) -> tuple[str, int]:
        """Where it stands in its author's order; an edited one where the first of its line did."""
        log_id, seq = self.item.get("stands_for") or (self.log_id, self.item["seq"])
        return log_id, seq

    def keys(self, tables: Mapping[str, TableSpec]) -> set[Key]:
        """Return the rows it writes and the parents of the rows it inserts."""
        found = set()
        for op in self.item["ops"]:
            found.add((op["table"], op["id"]))
            parent = tables[op["table"]].parent
            if parent is not None and op["values"].get(parent[0]) is not None:
                found.add((parent[1], op["values"][parent[0]]))
        return found


def is_open(record: Row) -> bool:
    """Tell whether a record waits for a person."""
    return record["outcome"] == "manual" and record.get("resolution") is None
