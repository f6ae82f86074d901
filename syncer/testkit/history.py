"""Judge a run by what its clients were told and by what stands there afterwards.

    history = History()
    history.write(store, [Insert("notes", {"id": new_id(), "text": "x"})], user_id="ann")
    ...faults, outages, kills; then faults off, everything flushed...
    seen = joined(observe_store(store), observe_database(connection, TABLES, users=["ann", "bob"]))
    assert_clean(history, seen, TABLES)

The history must know every writer: clients by `call`, `write`, `ok`, `refused`, `unknown`; rows
that were there before and changes by SQL by `outside_insert`, `outside_edit`, `outside_delete`;
decisions about parked work by `person`, or by `decided` with what is to come of it. Inserts name
their key.

What happened. A transaction is *applied* when the ledger has it (without a ledger: when a buffer
says so), otherwise it stands where its buffer, a parked record or quarantine puts it. An `ok` call
is somewhere; a `refused` one is nowhere; an `unknown` one is all there or not at all.

Order. On one row, `a` came before `b` for certain when one log holds both and `a` has the smaller
seq; when `a` is a change from outside that was over before `b` began; when the row was born once
and `a` is its insert or `b` its delete; or when the ledger's version of `a` is the smaller one.
Everything else is unordered, and whatever an unordered pair could explain is explained.

The kinds, each found by one or two small functions:

- `lost`: acknowledged and in no state, called applied without a ledger row, discarded or
  superseded without cause; or applied and without its effect.
- `torn`: a transaction of which one op shows and another doesn't.
- `resurrected`: refused, discarded, parked, yet with an effect or a ledger row; or a row that
  stands although its delete came last.
- `duplicated`: a transaction, a seq or an insert twice; a copy of an inserted row under another id;
  an effect that is there while its transaction waits to be delivered, or was refused when it was
  tried again.
- `order`: a later call with an earlier seq; server versions against the order of a log; a column
  that holds an older value of the only log that wrote it.
- `cross_user`: a row, a ledger row or a buffer's entry under another user than the author's; an
  effect on somebody else's row; a row that a stranger could read.
- `false_conflict`: in conflict, though no other log, other user or outside change can have touched
  its rows after the last own change before it (or after what `saw` says its log knew).
- `unsurfaced_conflict`: a value was overwritten by a transaction that was accepted before the
  overwritten change began (with `reads_recorded`: whose log had not seen it), or gave way to
  another writer's older value, and no record covers row and column; or in conflict and no record.
- `content`: a value, a row or a ledger row that nothing explains; a digest that differs.
- `counter`: a stored counter that differs from its recount.

What the checker can't see: columns that no call wrote and defaults of columns that an insert left
out; server-owned columns other than the given counters; on rows with a recorded automatic outcome
the values of the recorded columns; the order of changes that nothing above orders; a conflict whose
two sides could have known each other, unless reads are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from local_store import TableSpec
from syncer.testkit.history_conflict_rules import CONFLICT_RULES, false_conflict
from syncer.testkit.history_events import (
    Call,
    Decision,
    Events,
    History,
    OpenCall,
    OutsideChange,
    Seen,
)
from syncer.testkit.history_gather import gather, with_maybe
from syncer.testkit.history_observation import (
    BufferSeen,
    CounterSeen,
    LedgerRow,
    Observation,
    ParkedRecord,
    SeenRow,
    Visible,
    count_children,
    joined,
    observe_database,
    observe_remote,
    observe_store,
)
from syncer.testkit.history_row_rules import ROW_RULES
from syncer.testkit.history_rules import TRANSACTION_RULES, Finding, FindingKind

__all__ = [
    "BufferSeen",
    "Call",
    "CounterSeen",
    "Decision",
    "Events",
    "Finding",
    "FindingKind",
    "History",
    "LedgerRow",
    "Observation",
    "OpenCall",
    "OutsideChange",
    "ParkedRecord",
    "Seen",
    "SeenRow",
    "Visible",
    "assert_clean",
    "check",
    "count_children",
    "findings_text",
    "joined",
    "observe_database",
    "observe_remote",
    "observe_store",
]

SHOWN_MAX = 40  # findings in a text: the first few tell the story, the counts tell its size


def check(
    history: History | Events,
    observation: Observation,
    tables: Sequence[TableSpec],
    *,
    reads_recorded: bool = False,
    cascades_recorded: bool = False,
) -> list[Finding]:
    """Return every broken promise that the observation proves; [] means that all was kept.

    `reads_recorded` says that each refresh of a local copy was told with `saw`, so that what a log
    hadn't seen it didn't know. `cascades_recorded` asks for a record when a delete took along a
    child that was added elsewhere. Raises ValueError for an insert recorded without its key.
    """
    events = history.events() if isinstance(history, History) else history
    facts = gather(
        events,
        observation,
        tables,
        reads_recorded=reads_recorded,
        cascades_recorded=cascades_recorded,
    )
    found = [finding for rule in (*TRANSACTION_RULES, false_conflict) for finding in rule(facts)]
    # A transaction whose state is wrong is reported once, not again for each row that it wrote.
    doubted = ("lost", "false_conflict", "resurrected")
    facts = with_maybe(facts, [finding.subject for finding in found if finding.kind in doubted])
    found += [finding for rule in (*ROW_RULES, *CONFLICT_RULES) for finding in rule(facts)]
    return found


def findings_text(findings: Sequence[Finding]) -> str:
    """Return the findings as text for a failure message: counts first, then one by one."""
    if not findings:
        return "nothing to report"
    counts = Counter(finding.kind for finding in findings)
    lines = [", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))]
    for finding in findings[:SHOWN_MAX]:
        lines.append(f"- {finding.kind} {finding.subject}: {finding.explanation}")
        lines += [f"    {name}: {value!r}" for name, value in finding.evidence.items()]
    if len(findings) > SHOWN_MAX:
        lines.append(f"… and {len(findings) - SHOWN_MAX} more")
    return "\n".join(lines)


def assert_clean(
    history: History | Events,
    observation: Observation,
    tables: Sequence[TableSpec],
    *,
    reads_recorded: bool = False,
    cascades_recorded: bool = False,
) -> None:
    """Raise AssertionError with a readable list unless `check` finds nothing."""
    findings = check(
        history,
        observation,
        tables,
        reads_recorded=reads_recorded,
        cascades_recorded=cascades_recorded,
    )
    if findings:
        raise AssertionError(findings_text(findings))
