"""Every metric moves by what it is about, and by nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from local_store.clock import ManualClock
from local_store.ops import Outcome
from syncer.errors import Declined, NotAuthorized, RemoteUnavailable, ReplyTimedOut, SyncError
from syncer.flusher import Flusher, FlushReport
from syncer.remote import SupabaseRemote
from syncer.service.app import create_app
from syncer.service.health import SyncState
from syncer.service.metrics import Metrics
from syncer.service.watch import STRANGER, Watch
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.buffer import wait_until
from syncer.transport import CONNECTIONS_MAX
from tests.simulation.remote_model import RemoteModel
from tests.unit.api.support import Api
from tests.unit.key_server import key_server


def shown(api: Api) -> dict[str, float]:
    """Return the samples of `/metrics` by name and labels."""
    reply = api.client.get("/metrics", headers={"Authorization": ""})
    assert reply.status_code == 200
    assert reply.headers["Content-Type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = ",".join(sample.labels[name] for name in sorted(sample.labels))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def moved(api: Api, before: dict[str, float]) -> dict[str, float]:
    """Return what changed since."""
    now = shown(api)
    return {
        name: now[name] - before.get(name, 0.0) for name in now if now[name] != before.get(name)
    }


def test_the_names_of_the_plan_are_there(api: Api) -> None:
    text = api.client.get("/metrics").text
    for name in (
        "supabase_query_duration_ms",
        "supabase_query_errors_total",
        "sessions_created_total",
        "sessions_finalized_total",
        "sessions_abandoned_total",
        "session_duration_minutes",
        "holes_resolved_total",
    ):
        assert f"# TYPE {name} " in text
    # Pool figures are those of connections to Supabase, and this API has none.
    assert "supabase_connection_pool" not in text


def test_what_users_do_is_counted_once_however_often_it_is_sent(api: Api) -> None:
    before = shown(api)
    made = api.post("", {"prompt": "x"}, idempotency_key="k").json()
    api.post("", {"prompt": "x"}, idempotency_key="k")
    path = f"/{made['session_id']}"
    hole = made["current_draft"]["ambiguities"][0]
    for _ in range(2):
        answer = {"resolution_text": "int"}
        api.post(f"{path}/holes/{hole}/resolve", answer, idempotency_key="h")
        api.post(f"{path}/finalize", idempotency_key="f")
    api.post(f"{path}/finalize")
    api.post(f"/{api.new()['session_id']}/abandon")
    api.post("", {"prompt": ""})
    api.post(f"/{made['session_id'][:-1]}x/finalize")
    changed = moved(api, before)
    assert changed["sessions_created_total"] == 2
    assert changed["holes_resolved_total"] == 1
    assert changed["sessions_finalized_total"] == 1
    assert changed["sessions_abandoned_total"] == 1
    assert changed["session_duration_minutes_count"] == 2
    assert changed["session_duration_minutes_sum"] < 1
    # The finalize that repeats without a key writes once more and changes no status.
    assert changed["syncer_ack_duration_seconds_count"] == 6
    assert changed["syncer_pending_transactions"] == 6


def test_the_buffer_shows_what_waits_and_where_it_ends(tmp_path: Path) -> None:
    api = Api(tmp_path, buffer_transactions_max=2)
    api.new()
    now = shown(api)
    assert now["syncer_pending_transactions"] == now["syncer_at_risk_transactions"] == 1
    assert now["syncer_buffer_bytes"] == api.local.stats()["bytes"] > 0
    assert now["syncer_buffer_limit_bytes"] == api.settings.buffer_bytes_max
    assert now["syncer_buffer_limit_transactions"] == 2
    assert now["syncer_oldest_pending_age_seconds"] > 0
    assert now["syncer_accepting_writes"] == 1
    api.new()
    assert shown(api)["syncer_accepting_writes"] == 0
    api.local.close()
    closed = shown(api)
    assert closed["syncer_accepting_writes"] == 0
    assert "syncer_pending_transactions" not in closed, "what isn't known isn't shown"


def test_parked_work_is_shown_by_state(api: Api) -> None:
    for _ in range(3):
        api.new()
    states = ("dead", "conflict", "conflict")
    pending = api.local.pending(transactions_max=9, bytes_max=10**6)
    api.local.record([Outcome(t.txn_id, s) for t, s in zip(pending, states, strict=True)])
    now = shown(api)
    assert now["syncer_parked_transactions{dead}"] == 1
    assert now["syncer_parked_transactions{conflict}"] == 2
    assert now["syncer_parked_transactions{held}"] == 0


def test_a_flushers_report_is_counted_and_its_breaker_shown(api: Api) -> None:
    counted: Metrics = api.app.state.metrics
    api.new()
    model = RemoteModel(api.local.tables)
    flusher = Flusher(api.local, model, jitter=lambda: 0.0)
    before = shown(api)
    for _ in range(3):
        counted.flushed(flusher.flush_once())
    changed = moved(api, before)
    assert changed["syncer_verdicts_total{applied}"] == 1
    assert changed["syncer_flush_duration_seconds_count"] == 1, "idle passes are no runs"
    assert changed["syncer_flush_duration_seconds_sum"] > 0
    assert changed["syncer_pending_transactions"] == -1
    api.sync.record(FlushReport(sent=1, breaker="open", stopped="auth"))
    now = shown(api)
    assert now["syncer_breaker_state{open}"] == 1
    assert now["syncer_breaker_state{closed}"] == 0
    assert now["syncer_delivery_refused{auth}"] == 1
    assert now["syncer_delivery_refused{schema}"] == 0


def test_each_verdict_has_its_counter(api: Api) -> None:
    kinds = ("applied", "duplicate", "merged", "conflict", "rejected", "held", "fenced")
    before = shown(api)
    for number, kind in enumerate(kinds, 1):
        api.app.state.metrics.flushed(FlushReport(sent=number, **{kind: number}))
    changed = moved(api, before)
    assert [changed[f"syncer_verdicts_total{{{k}}}"] for k in kinds] == [1, 2, 3, 4, 5, 6, 7]


def test_calls_to_supabase_are_timed_and_their_failures_told_apart(api: Api) -> None:
    counted: Metrics = api.app.state.metrics
    before = shown(api)
    with key_server() as server:
        remote = SupabaseRemote(server.url, "e30.e30.e30", on_call=counted.called)
        server.body = b'{"logs": []}'
        remote.audit()
        for status in (503, 401, 503):
            server.status = status
            with pytest.raises(SyncError):
                remote.audit()
        remote.close()
    changed = moved(api, before)
    assert changed["supabase_query_duration_ms_count{sync_audit_v1}"] == 4
    assert changed["supabase_query_duration_ms_sum{sync_audit_v1}"] > 0
    errors = {name: by for name, by in changed.items() if "errors_total" in name}
    assert errors == {
        "supabase_query_errors_total{RemoteUnavailable}": 2,
        "supabase_query_errors_total{NotAuthorized}": 1,
    }


def test_the_pool_shows_the_connections_there_are(tmp_path: Path) -> None:
    with key_server() as server:
        server.body = b'{"logs": []}'
        remote = SupabaseRemote(server.url, "e30.e30.e30")
        api = Api(tmp_path, remote=remote)

        def pool() -> list[float]:
            now = shown(api)
            return [now[f"supabase_connection_pool_{name}"] for name in ("size", "available")]

        assert pool() == [0, CONNECTIONS_MAX]
        server.go_on.clear()
        with ThreadPoolExecutor(3) as callers:
            calls = [callers.submit(remote.audit) for _ in range(3)]
            wait_until(lambda: server.asked == 3)
            assert pool() == [3, CONNECTIONS_MAX - 3]
            server.go_on.set()
            assert all(call.result() == {"logs": []} for call in calls)
        assert pool() == [3, CONNECTIONS_MAX]
        remote.close()
        assert pool() == [0, CONNECTIONS_MAX]
        api.local.close()


@pytest.mark.parametrize(
    ("errors", "in_a_row"),
    [
        ([], 0),
        ([RemoteUnavailable("x"), ReplyTimedOut("x")], 2),
        ([RemoteUnavailable("x"), None], 0),
        ([RemoteUnavailable("x"), NotAuthorized("x")], 0),
        ([None, RemoteUnavailable("x")], 1),
        ([RemoteUnavailable("x"), Declined("not_parked")], 0),
    ],
)
def test_failures_in_a_row_end_with_an_answer(
    api: Api, errors: list[SyncError | None], in_a_row: int
) -> None:
    for error in errors:
        api.app.state.metrics.called("sync_read_v1", 0.01, error)
    now = shown(api)
    assert now["supabase_consecutive_failures"] == in_a_row
    assert now.get("supabase_query_errors_total{Declined}") is None


def test_an_audit_and_a_look_are_shown_once_they_were_made(api: Api) -> None:
    model, clock, sync = RemoteModel(api.local.tables), ManualClock(), SyncState()
    watch = Watch(api.settings, api.local, model, sync, api.app.state.metrics, clock)
    assert not any("audit" in name or "canary" in name for name in shown(api))
    session = api.new()
    Flusher(api.local, model).flush_once()
    watch.look()
    now = shown(api)
    assert now["syncer_rls_canary_visible"] == 0
    assert not any("audit" in name for name in now), "an hour hasn't passed"
    clock.advance(api.settings.audit_interval_s)
    watch.look()
    assert {k: v for k, v in shown(api).items() if "audit" in k} == {
        "syncer_audit_mismatch{lost}": 0,
        "syncer_audit_mismatch{duplicated}": 0,
        "syncer_audit_mismatch{content_mismatch}": 0,
    }
    row = model.rows[("sessions", session["session_id"])]
    row.user_id = STRANGER
    model.ledger.clear()
    clock.advance(api.settings.audit_interval_s)
    watch.look()
    now = shown(api)
    assert now["syncer_rls_canary_visible"] == 1
    assert now["syncer_audit_mismatch{lost}"] == 1


def test_another_buffers_backlog_is_no_loss_here(api: Api) -> None:
    model, clock = RemoteModel(api.local.tables), ManualClock()
    watch = Watch(api.settings, api.local, model, SyncState(), api.app.state.metrics, clock)
    api.new()
    Flusher(api.local, model).flush_once()
    model.logs["another"] = 5  # acknowledged there, and not here to be shown
    clock.advance(api.settings.audit_interval_s)
    watch.look()
    assert shown(api)["syncer_audit_mismatch{lost}"] == 0


def test_rows_are_compared_in_rounds_and_a_finding_is_shown_for_a_round(api: Api) -> None:
    model, clock = RemoteModel(api.local.tables), ManualClock()
    watch = Watch(
        api.settings, api.local, model, SyncState(), api.app.state.metrics, clock, compared_max=2
    )
    session = api.new()
    Flusher(api.local, model).flush_once()
    rows = api.local.clean_rows()
    assert len(rows) == 3
    audits = len(rows) // 2 + 1

    def found() -> list[float]:
        seen = []
        for _ in range(audits):
            clock.advance(api.settings.audit_interval_s)
            watch.look()
            seen.append(shown(api)["syncer_audit_mismatch{content_mismatch}"])
        return seen

    assert found() == [0, 0]
    row = model.rows[("sessions", session["session_id"])]
    row.values["source"], kept = "reverse_mode", row.values["source"]
    assert found()[-1] == 1
    row.values["source"] = kept
    assert found() == [1, 1]
    assert found() == [0, 0]


def test_a_watch_asks_nothing_in_an_outage_and_keeps_what_it_found(api: Api) -> None:
    model, clock, sync = RemoteModel(api.local.tables), ManualClock(), SyncState()
    watch = Watch(api.settings, api.local, model, sync, api.app.state.metrics, clock)
    watch.look()

    def down() -> None:
        raise RemoteUnavailable("down")

    model.before_call = down
    watch.look()
    assert shown(api)["syncer_rls_canary_visible"] == 0
    asked: list[int] = []
    model.before_call = lambda: asked.append(1)
    sync.record(FlushReport(sent=1, breaker="open", stopped="outage"))
    watch.look()
    assert asked == []


def test_two_apps_in_one_process_count_for_themselves(api: Api, tmp_path: Path) -> None:
    other = Api(tmp_path / "other")
    api.new()
    assert shown(api)["sessions_created_total"] == 1
    assert shown(other)["sessions_created_total"] == 0
    other.local.close()


def test_an_app_made_twice_on_one_store_starts_at_nothing(api: Api) -> None:
    api.new()
    again: Any = create_app(api.settings, api.local)
    assert again.state.metrics.registry is not api.app.state.metrics.registry
    assert {spec.name for spec in SESSION_TABLES} == set(api.local.tables)


def test_no_label_ever_holds_what_a_user_wrote(api: Api) -> None:
    words = "canary-of-the-user"
    made = api.new(words, metadata={words: words})
    api.post(f"/{made['session_id']}/holes/{words}/resolve", {"resolution_text": words})
    api.client.get(f"/api/{words}")
    api.client.get(f"/api/sessions/{words}")
    text = api.client.get("/metrics").text
    assert words not in text
    assert made["session_id"] not in text
    assert "alice" not in text
