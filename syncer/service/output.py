"""What the commands print: a JSON document on stdout, or a table for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import orjson
from rich.console import Console
from rich.table import Column, Table

from syncer.audit import AuditReport
from syncer.flusher import FlushReport

TABLE_WIDTH_MIN = 140

FLUSH_FIELDS = (
    "sent",
    "applied",
    "duplicate",
    "conflict",
    "rejected",
    "held",
    "fenced",
    "pending",
    "breaker",
    "stopped",
)


def show_document(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print one JSON document on stdout."""
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def _tables() -> Console:
    """A console for tables: ids are to be copied, so nothing cuts them."""
    wide = Console()
    return wide if wide.width >= TABLE_WIDTH_MIN else Console(width=TABLE_WIDTH_MIN)


def told(text: str) -> None:
    """Print a line for people on stdout."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def show_flush(report: FlushReport, as_json: bool) -> None:
    """Print a flush report."""
    document = {name: value for name, value in asdict(report).items() if name in FLUSH_FIELDS}
    if as_json:
        show_document(document)
        return
    counts = ", ".join(f"{document[name]} {name}" for name in FLUSH_FIELDS[:8] if document[name])
    told(f"{counts or 'nothing to send'}; breaker {report.breaker}, stopped: {report.stopped}")
    if report.error:
        told(report.error)


def show_status(document: dict[str, Any], as_json: bool) -> None:
    """Print a buffer's state."""
    if as_json:
        show_document(document)
        return
    told(f"Supabase: {document['supabase']}")
    table = Table(
        Column("log", no_wrap=True), "pending", "parked", "bytes", "oldest (s)", "last seq"
    )
    for log in document["logs"]:
        oldest = log["oldest_age_s"]
        table.add_row(
            log["log_id"],
            str(log["pending"]),
            str(log["parked"]),
            str(log["bytes"]),
            "–" if oldest is None else f"{oldest:.1f}",
            str(log["last_seq"]),
        )
    _tables().print(table)


def show_audit(report: AuditReport, as_json: bool) -> None:
    """Print an audit."""
    document = report.to_json()
    if as_json:
        show_document(document)
        return
    names = [name for name in document["total"] if document["total"][name]] or ["acknowledged"]
    table = Table("log", *names)
    for log in document["logs"]:
        table.add_row(log["log_id"], *(str(log[name]) for name in names))
    table.add_row("total", *(str(document["total"][name]) for name in names), style="bold")
    _tables().print(table)
    total = report.total
    told(
        "balanced: every acknowledged transaction is in exactly one state"
        if report.balanced
        else f"NOT balanced: {total.lost} lost, {total.duplicated} doubled, "
        f"{total.content_mismatch} with other content"
    )


def show_doctor(document: dict[str, Any], as_json: bool) -> None:
    """Print a doctor's findings, failed ones with their remedy."""
    if as_json:
        show_document(document)
        return
    marks = {"error": "✗", "warning": "!", "info": "·"}
    for check in document["checks"]:
        told(
            f"{'✓' if check['ok'] else marks[check['severity']]} {check['name']}: {check['detail']}"
        )
        if not check["ok"] and check["remedy"]:
            told(f"    {check['remedy']}")
