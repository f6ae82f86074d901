"""Each alert of ops/alerts.yml fired by its real cause, and by nothing before it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from local_store import BufferFull
from syncer.testkit.buffer import outage, wait_until
from syncer.testkit.faults import Delay, canned
from tests.integration.watched import STEP_S, Watched, series_of, watched
from tests.promql import evaluate, firing

RULES_FILE = Path(__file__).parents[2] / "ops" / "alerts.yml"
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES_FILE.read_text())["groups"]
    for rule in group["rules"]
}
SMALL = {"buffer_transactions_max": 10, "buffer_bytes_max": 1024 * 1024, "read_through_ms": 5_000}
Cause = Callable[[Watched], None]


def connection_failures(api: Watched) -> None:
    with outage(api.proxy):
        api.insert()
        for _ in range(6):
            api.clock.advance(60)
            assert api.flush().stopped == "outage"
        api.scrape()


def row_level_security_off(api: Watched) -> None:
    with psycopg.connect(api.supabase.database_url, autocommit=True) as sql:
        sql.execute("alter table public.sessions disable row level security")
        try:
            api.watch.look()
        finally:
            sql.execute("alter table public.sessions enable row level security")
    api.scrape()


def a_flipped_bit(api: Watched) -> None:
    with outage(api.proxy):
        api.insert(metadata={"said": "words to be found in the file"})
        with sqlite3.connect(api.settings.data_dir / "buffer.db") as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.close()
        file = api.settings.data_dir / "buffer.db"
        content = file.read_bytes()
        at = content.rindex(b"words to be found")
        file.write_bytes(content[:at] + b"W" + content[at + 1 :])
        api.flush()
        api.scrape()


def a_forgetful_ledger(api: Watched) -> None:
    with psycopg.connect(api.supabase.database_url, autocommit=True) as sql:
        sql.execute("delete from sync.ledger")
    api.clock.advance(api.settings.audit_interval_s)
    api.watch.look()
    api.scrape()


def a_full_buffer(api: Watched) -> None:
    with outage(api.proxy):
        for _ in range(api.settings.buffer_transactions_max):
            api.insert()
        with pytest.raises(BufferFull):
            api.insert()
        assert api.client.post("/api/sessions", json={"prompt": "x"}).status_code == 503
        api.scrape(3)


def a_key_that_is_no_secret_key(api: Watched) -> None:
    api.use_key(api.supabase.anon_key)
    api.insert()
    assert api.flush().stopped in ("auth", "schema")
    api.scrape(3)


def slow_replies(api: Watched) -> None:
    api.proxy.set(Delay(1.1))
    for _ in range(2):
        api.insert()
        assert api.flush().applied == 1
    api.proxy.clear()
    api.scrape(6)


def failing_calls(api: Watched) -> None:
    for number in range(4):
        if number == 2:
            api.proxy.next(canned("500_html"))
        api.insert()
        api.flush()
        api.clock.advance(10)
    api.scrape(6)


def many_readers_of_a_slow_supabase(api: Watched) -> None:
    api.proxy.set(Delay(1.5))
    with ThreadPoolExecutor(8) as readers:
        asked = [readers.submit(api.client.get, "/api/sessions") for _ in range(8)]
        wait_until(lambda: api.remote.pool_use().busy > 6)
        api.scrape(3)
        assert {one.result().status_code for one in asked} == {200}


def a_long_outage(api: Watched) -> None:
    with outage(api.proxy):
        api.insert()
        api.clock.advance(300)
        api.flush()
        api.scrape(4)


def large_writes_in_an_outage(api: Watched) -> None:
    with outage(api.proxy):
        for _ in range(5):
            api.insert(metadata={"said": "x" * 180_000})
        api.scrape()


def many_writes_in_an_outage(api: Watched) -> None:
    with outage(api.proxy):
        for _ in range(9):
            api.insert()
        api.scrape()


def a_refused_write(api: Watched) -> None:
    api.insert(status="bogus")
    assert api.flush().rejected == 1
    api.scrape()


def two_sides_of_one_column(api: Watched) -> None:
    row_id = api.insert(status="active")
    api.flush()
    with psycopg.connect(api.supabase.database_url, autocommit=True) as sql:
        sql.execute("update sessions set status = 'abandoned' where id = %s", (row_id,))
    api.update(row_id, status="finalized")
    reports = [api.flush(), api.flush()]
    assert sum(report.conflict for report in reports) == 1
    api.scrape()


CAUSES: dict[str, Cause] = {
    "SupabaseConnectionFailures": connection_failures,
    "RowLevelSecurityBypassed": row_level_security_off,
    "DataCorrupt": a_flipped_bit,
    "AuditMismatch": a_forgetful_ledger,
    "WritesRefused": a_full_buffer,
    "DeliveryRefused": a_key_that_is_no_secret_key,
    "QueriesSlow": slow_replies,
    "QueryErrors": failing_calls,
    "ConnectionPoolBusy": many_readers_of_a_slow_supabase,
    "BacklogOld": a_long_outage,
    "BufferFillingBytes": large_writes_in_an_outage,
    "BufferFillingTransactions": many_writes_in_an_outage,
    "DeadLetters": a_refused_write,
    "ConflictsOpen": two_sides_of_one_column,
}


def good_times(api: Watched) -> None:
    """Writes that arrive, a look, an audit; long enough for every rule's patience."""
    for _ in range(4):
        api.insert(metadata={"n": 1})
        assert api.flush().applied == 1
        api.scrape(4)
    api.clock.advance(api.settings.audit_interval_s)
    api.watch.look()
    assert api.client.get("/api/sessions").status_code == 200
    api.scrape()


# The others wait for a person, or for the next audit.
MEND_BY_THEMSELVES = {
    "SupabaseConnectionFailures",
    "WritesRefused",
    "QueriesSlow",
    "QueryErrors",
    "ConnectionPoolBusy",
    "BacklogOld",
    "BufferFillingBytes",
    "BufferFillingTransactions",
}


def good_times_again(api: Watched) -> None:
    """Supabase answers; what has waited is delivered, and time passes."""
    api.proxy.clear()
    api.clock.advance(60)
    while api.flush().pending:
        api.clock.advance(60)
    assert api.client.get("/api/sessions").status_code == 200
    api.scrape(12)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_fires_by_its_cause_and_not_before(
    name: str, fresh_supabase: Any, fault_proxy: Any, tmp_path: Path
) -> None:
    with watched(tmp_path / "api", fresh_supabase, fault_proxy, **SMALL) as api:
        good_times(api)
        before = [n for n, rule in RULES.items() if firing(rule, api.scrapes, api.last_s, STEP_S)]
        assert before == []
        CAUSES[name](api)
        assert firing(RULES[name], api.scrapes, api.last_s, STEP_S)
        _compare_with_promtool(api, tmp_path)
        if name in MEND_BY_THEMSELVES:
            good_times_again(api)
            assert not firing(RULES[name], api.scrapes, api.last_s, STEP_S)
            _compare_with_promtool(api, tmp_path)


def test_every_metric_of_a_rule_is_shown_in_good_times(
    fresh_supabase: Any, fault_proxy: Any, tmp_path: Path
) -> None:
    """A rule on a name that doesn't exist would be silent for ever."""
    with watched(tmp_path / "api", fresh_supabase, fault_proxy, **SMALL) as api:
        good_times(api)
        for name, rule in RULES.items():
            told, _, limit = rule["expr"].rpartition(rule["expr"].split()[-2])
            assert limit.strip(), name
            assert evaluate(told, api.scrapes, api.last_s) != {}, name


def test_every_rule_says_what_to_do() -> None:
    page = (RULES_FILE.parents[1] / "docs" / "OPERATIONS.md").read_text()
    heads = {
        "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c == "-")
        for line in page.splitlines()
        if line.startswith("#")
    }
    for name, rule in RULES.items():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (file, anchor in heads) == ("docs/OPERATIONS.md", True), name
        assert name in page
        assert rule["labels"]["severity"] in ("critical", "warning")


# -- promtool, where it is installed ---------------------------------------------------------------


def _compare_with_promtool(api: Watched, folder: Path) -> None:
    """Let Prometheus itself judge the same scrapes: it must fire just what our evaluator fires."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return
    shutil.copy(RULES_FILE, folder / "alerts.yml")
    series = [
        {"series": name, "values": " ".join("_" if v is None else _plain(v) for v in values)}
        for name, values in series_of(api.scrapes)
    ]
    wanted = []
    for name, rule in RULES.items():
        fires = firing(rule, api.scrapes, api.last_s, STEP_S)
        found = evaluate(rule["expr"], api.scrapes, api.last_s) if fires else {}
        assert isinstance(found, dict)
        expected = [
            {
                "exp_labels": {**rule["labels"], **dict(labels)},
                "exp_annotations": rule["annotations"],
            }
            for labels in found
        ]
        wanted.append({"eval_time": f"{api.last_s:g}s", "alertname": name, "exp_alerts": expected})
    test = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": f"{STEP_S:g}s",
        "tests": [
            {
                "interval": f"{STEP_S:g}s",
                "input_series": series,
                "alert_rule_test": wanted,
            }
        ],
    }
    (folder / "test.json").write_text(json.dumps(test))
    ran = subprocess.run(
        [promtool, "test", "rules", "test.json"], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3_000:] + ran.stderr[-3_000:]


def _plain(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".")
