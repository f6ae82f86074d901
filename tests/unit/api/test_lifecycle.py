"""The life of a session over HTTP, and who may see it."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi.testclient import TestClient

from local_store import Receipt
from local_store.clock import new_id
from local_store.ops import Outcome
from syncer.acknowledger import AckLimits, Acknowledger
from syncer.service.app import create_app
from tests.unit.api.support import Api, auth, error_of

# -- the life of a session -------------------------------------------------------------------------


def test_a_session_lives_from_creation_to_deletion(api: Api) -> None:
    reply = api.client.post("/api/sessions", json={"prompt": "Sort a list", "metadata": {"a": 1}})
    assert reply.status_code == 201
    assert reply.headers["X-Durability"] == "host"
    session = reply.json()
    assert reply.headers["Location"] == f"/api/sessions/{session['session_id']}"
    assert session["sync"] == {
        "state": "pending",
        "pending_transactions": 1,
        "durability": "host",
        "stale": False,
    }
    assert (session["user_id"], session["metadata"]) == ("alice", {"a": 1})
    path = f"/{session['session_id']}"
    hole = session["current_draft"]["ambiguities"][0]
    resolved = api.post(f"{path}/holes/{hole}/resolve", {"resolution_text": "int"})
    assert resolved.status_code == 200
    assert hole not in resolved.json()["current_draft"]["ambiguities"]
    assert resolved.json()["sync"]["pending_transactions"] == 2
    rolled = api.post(f"{path}/rollback", {"version": 1})
    assert rolled.json()["current_draft"]["version"] == 3
    assert api.post(f"{path}/finalize").json()["status"] == "finalized"
    assert api.post(f"{path}/abandon").json()["status"] == "abandoned"
    shown = api.client.get(f"/api/sessions{path}").json()
    assert (len(shown["ir_drafts"]), len(shown["revisions"])) == (3, 2)
    history = api.client.get(f"/api/sessions{path}/history").json()
    assert [d["version"] for d in history["ir_drafts"]] == [1, 2, 3]
    gone = api.client.delete(f"/api/sessions{path}")
    assert (gone.status_code, gone.content, gone.headers["X-Durability"]) == (204, b"", "host")
    error_of(api.client.get(f"/api/sessions{path}"), 404, "not_found")
    error_of(api.client.delete(f"/api/sessions{path}"), 404, "not_found")
    error_of(api.post(f"{path}/finalize"), 404, "not_found")


def test_a_lifted_ir_makes_a_session(api: Api) -> None:
    ir = {"intent": {"summary": "x", "holes": [{"identifier": "h"}]}, "n": [1.5, None, True]}
    reply = api.post("", {"ir": ir, "source": "reverse_mode"})
    assert reply.status_code == 201
    assert reply.json()["source"] == "reverse_mode"
    assert reply.json()["current_draft"]["ir"] == ir
    assert reply.json()["current_draft"]["ambiguities"] == ["h"]


def test_a_delivered_session_is_synced(api: Api) -> None:
    session = api.new()
    api.server.deliver(api.local)
    shown = api.client.get(f"/api/sessions/{session['session_id']}").json()
    assert (shown["sync"]["state"], shown["sync"]["durability"]) == ("synced", "remote")
    assert {k: v for k, v in shown.items() if k != "sync"} == {
        k: v for k, v in session.items() if k != "sync"
    }


def test_a_conflict_on_an_acknowledged_write_is_told_with_a_2xx(api: Api) -> None:
    session = api.new()
    [transaction] = api.local.pending(transactions_max=9, bytes_max=10**6)
    api.local.record([Outcome(transaction.txn_id, "conflict")])
    reply = api.post(f"/{session['session_id']}/finalize")
    assert reply.status_code == 200
    assert reply.json()["sync"]["state"] == "conflict"


def test_a_write_that_waited_for_the_server_tells_what_became_of_it(api: Api) -> None:
    class Delivering(Acknowledger):
        """Waits for the server, which answers at once."""

        def reach(self, receipt: Receipt) -> Receipt:
            api.server.deliver(api.local)
            return super().reach(receipt)

    acknowledger = Delivering(api.local, limits=AckLimits(mode="remote"))
    app = create_app(api.settings, api.local, remote=api.server, acknowledger=acknowledger)
    reply = TestClient(app).post("/api/sessions", json={"prompt": "x"}, headers=auth())
    assert reply.headers["X-Durability"] == "remote"
    assert reply.json()["sync"]["state"] == "synced"


def test_lists_are_paged_filtered_and_complete(api: Api) -> None:
    ids = [api.new(f"prompt {n}")["session_id"] for n in range(5)]
    api.post(f"/{ids[0]}/finalize")
    first = api.client.get("/api/sessions?status=active&limit=3").json()
    assert [s["session_id"] for s in first["sessions"]] == ids[:1:-1]
    assert first["complete"] is True
    rest = api.client.get("/api/sessions", params={"status": "active", "cursor": first["next"]})
    assert [s["session_id"] for s in rest.json()["sessions"]] == [ids[1]]
    assert rest.json()["next"] is None
    api.server.is_down = True
    assert api.client.get("/api/sessions").json()["complete"] is False


def test_writes_go_on_and_reads_too_while_supabase_is_away(api: Api) -> None:
    session = api.new()
    api.server.deliver(api.local)
    api.server.is_down = True
    calls = api.server.calls
    path = f"/{session['session_id']}"
    assert api.post(f"{path}/holes/h/resolve", {"resolution_text": "x"}).status_code == 200
    assert api.new()["status"] == "active"
    assert api.server.calls == calls, "no write asks the server"
    other = api.new()
    api.server.deliver(api.local)
    shown = api.client.get(f"/api/sessions/{other['session_id']}").json()
    assert shown["sync"]["stale"] is True


def test_an_id_that_can_not_be_asked_for_is_503_and_not_404(api: Api) -> None:
    api.server.is_down = True
    for call in (
        api.client.get(f"/api/sessions/{new_id()}"),
        api.post(f"/{new_id()}/finalize"),
        api.client.delete(f"/api/sessions/{new_id()}"),
    ):
        assert error_of(call, 503, "unavailable")["retry_after_s"] > 0


async def test_five_concurrent_resolutions_over_http_all_succeed(api: Api) -> None:
    session = api.new()
    transport = httpx.ASGITransport(api.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://api", headers=auth()
    ) as client:
        path = f"/api/sessions/{session['session_id']}/holes"
        replies = await asyncio.gather(
            *(
                client.post(f"{path}/hole_{n}/resolve", json={"resolution_text": f"{n}"})
                for n in range(5)
            )
        )
    assert [reply.status_code for reply in replies] == [200] * 5
    shown = api.client.get(f"/api/sessions/{session['session_id']}").json()
    assert {r["hole_id"] for r in shown["pending_resolutions"]} == {f"hole_{n}" for n in range(5)}


# -- who may ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/sessions"),
        ("POST", "/api/sessions"),
        ("GET", f"/api/sessions/{new_id()}"),
        ("DELETE", f"/api/sessions/{new_id()}"),
        ("POST", f"/api/sessions/{new_id()}/holes/h/resolve"),
        ("POST", f"/api/sessions/{new_id()}/finalize"),
        ("POST", f"/api/sessions/{new_id()}/abandon"),
        ("POST", f"/api/sessions/{new_id()}/rollback"),
        ("GET", f"/api/sessions/{new_id()}/history"),
    ],
)
def test_no_route_lets_a_stranger_in_nor_reads_the_body_first(
    api: Api, method: str, path: str
) -> None:
    for header in ("", "Bearer nonsense"):
        reply = api.client.request(
            method, path, content=b"{not json", headers={"Authorization": header}
        )
        error_of(reply, 401, "unauthorized")
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_foreign_session_is_404_for_every_call(api: Api) -> None:
    path = f"/api/sessions/{api.new()['session_id']}"
    bob = auth("bob")
    for method, tail, body in (
        ("GET", "", None),
        ("GET", "/history", None),
        ("DELETE", "", None),
        ("POST", "/finalize", None),
        ("POST", "/abandon", None),
        ("POST", "/rollback", {"version": 1}),
        ("POST", "/holes/h/resolve", {"resolution_text": "x"}),
    ):
        reply = api.client.request(method, path + tail, json=body, headers=bob)
        error_of(reply, 404, "not_found")
    assert api.client.get("/api/sessions", headers=bob).json()["sessions"] == []
    assert api.client.get(path).json()["status"] == "active"
