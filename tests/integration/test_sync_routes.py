"""What operators do over HTTP, on real Postgres and PostgREST; and that nobody else can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient

from local_store import Insert, LocalStore, TableSpec, Update, user_uuid
from local_store.clock import new_id
from syncer.remote import SupabaseRemote, TableRead
from syncer.service.app import create_app
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from syncer.testkit import BufferedApp

USER = "github:42"
UNKNOWN = "00000000-0000-7000-8000-000000000000"
CANARY = "canary-7f3a"  # a user's words
ROUTES = [
    ("GET", "/status"),
    ("GET", "/audit"),
    ("GET", "/dead-letters"),
    ("GET", f"/dead-letters/{UNKNOWN}"),
    ("POST", f"/dead-letters/{UNKNOWN}/retry"),
    ("POST", f"/dead-letters/{UNKNOWN}/edit"),
    ("POST", f"/dead-letters/{UNKNOWN}/discard"),
    ("GET", "/conflicts"),
    ("GET", f"/conflicts/{UNKNOWN}"),
    ("POST", f"/conflicts/{UNKNOWN}/resolve"),
]


def _loosened(spec: TableSpec) -> TableSpec:
    """The table as older code knew it: any status passes the door, the server refuses some."""
    columns = dict(spec.columns)
    if "status" in columns:
        columns["status"] = replace(columns["status"], enum=None)
    return replace(spec, columns=columns, policy="merge")


TABLES = [_loosened(spec) for spec in SESSION_TABLES]


class Desk:
    """The API as an operator sees it, and as others do."""

    def __init__(self, client: TestClient, supabase: Any) -> None:
        self._client = client
        admin = supabase.user_token("root", app_metadata={"role": "syncer_admin"})
        self.tokens = {
            "operator": admin,
            "service": supabase.secret_key,
            "user": supabase.user_token(USER),
            "anon": supabase.anon_key,
            "boaster": supabase.user_token(USER, user_metadata={"role": "syncer_admin"}),
        }

    def ask(self, method: str, path: str, body: Any = None, who: str = "operator") -> Any:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if who else {}
        return self._client.request(method, f"/api/sync{path}", json=body, headers=headers)

    def get(self, path: str) -> Any:
        reply = self.ask("GET", path)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def post(self, path: str, body: Any = None) -> list[dict[str, Any]]:
        reply = self.ask("POST", path, body)
        assert reply.status_code == 200, reply.text
        results: list[dict[str, Any]] = reply.json()["results"]
        return results

    def told(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, str]:
        reply = self.ask(method, path, body)
        return reply.status_code, reply.json()["error"]["code"]


@pytest.fixture
def desk(fresh_supabase: Any, tmp_path: Path) -> Iterator[Desk]:
    env = {name.lower(): value for name, value in fresh_supabase.env().items()}
    settings = Settings.load(**{**env, "data_dir": tmp_path / "api"})
    remote = SupabaseRemote.from_settings(settings)
    with LocalStore.open(settings.data_dir, tables=SESSION_TABLES) as store:
        app = create_app(settings, store, remote=remote)
        with TestClient(app, raise_server_exceptions=False) as client:
            yield Desk(client, fresh_supabase)
    remote.close()


@pytest.fixture
def container(fresh_supabase: Any, tmp_path: Path) -> Iterator[Any]:
    made: list[BufferedApp] = []

    def make() -> BufferedApp:
        folder = tmp_path / f"container-{len(made)}"
        made.append(BufferedApp(folder, TABLES, fresh_supabase.url, fresh_supabase.secret_key))
        return made[-1]

    yield make
    for app in made:
        app.close()


def refused(app: BufferedApp) -> tuple[str, str]:
    """A session that the server refuses, and behind it an update; returns both transactions."""
    row_id = new_id()
    values = {"id": row_id, "status": "bogus", "metadata": {"said": CANARY}}
    first = app.store.write([Insert("sessions", values)], user_id=USER).txn_id
    update = Update("sessions", row_id, {"metadata": {"n": 1}})
    behind = app.store.write([update], user_id=USER).txn_id
    assert app.drain().rejected == 1
    return first, behind


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nobody_but_an_operator_gets_in_and_no_body_is_read_first(
    desk: Desk, method: str, path: str
) -> None:
    for who, status, code in (
        ("", 401, "unauthorized"),
        ("anon", 401, "unauthorized"),
        ("user", 403, "forbidden"),
        ("boaster", 403, "forbidden"),
    ):
        reply = desk.ask(method, path, ["no body that any route takes"], who)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), who


def test_every_route_of_the_operators_is_tried_above(desk: Desk) -> None:
    paths = desk._client.get("/openapi.json").json()["paths"]
    known = {path for path in paths if path.startswith("/api/sync")}
    tried = {
        "/api/sync" + path.replace(UNKNOWN, "{conflict_id}" if "conf" in path else "{txn_id}")
        for _, path in ROUTES
    }
    assert known == tried


def test_a_dead_letter_is_listed_shown_edited_and_retried(desk: Desk, container: Any) -> None:
    app = container()
    first, behind = refused(app)
    listed = desk.ask("GET", "/dead-letters")
    assert CANARY not in listed.text
    letters = {letter["txn_id"]: letter["state"] for letter in listed.json()["dead_letters"]}
    assert letters == {first: "dead", behind: "held"}
    assert desk.get("/dead-letters?user=somebody-else")["dead_letters"] == []
    shown = desk.get(f"/dead-letters/{first}")
    assert (shown["sqlstate"], shown["item"]["ops"][0]["values"]["status"]) == ("23514", "bogus")
    assert [r["verdict"] for r in desk.post(f"/dead-letters/{first}/retry")] == ["rejected"]
    edit = {"changes": {"status": "active"}}
    [edited] = desk.post(f"/dead-letters/{first}/edit", edit)
    assert desk.told(f"/dead-letters/{first}/edit", edit) == (409, "conflict")
    results = desk.post(f"/dead-letters/{edited['txn_id']}/retry")
    assert [result["verdict"] for result in results] == ["applied", "applied"]
    audit = desk.get("/audit")
    assert (audit["balanced"], audit["total"]["applied"]) == (True, 2)


def test_a_discard_is_final(desk: Desk, container: Any) -> None:
    first, _ = refused(container())
    assert desk.post(f"/dead-letters/{first}/discard")[0]["state"] == "discarded"
    assert desk.told(f"/dead-letters/{first}/discard") == (409, "conflict")
    assert desk.told(f"/dead-letters/{first}/retry") == (409, "conflict")


@pytest.fixture
def clashed(container: Any, desk: Desk) -> dict[str, Any]:
    """Two containers disagree on a status."""
    mine, theirs, row_id = container(), container(), new_id()
    mine.store.write([Insert("sessions", {"id": row_id})], user_id=USER)
    mine.drain()
    as_of, where = theirs.store.change_counter(), {"id": row_id}
    [rows] = theirs.remote.read(user_uuid(USER), [TableRead("sessions", where)])
    theirs.store.refresh("sessions", rows, user_id=USER, as_of=as_of, where=where)
    for app, status in ((theirs, "abandoned"), (mine, "finalized")):
        app.store.write([Update("sessions", row_id, {"status": status})], user_id=USER)
        app.drain()
    [record] = desk.get("/conflicts?open=true")["conflicts"]
    return dict(record)


@pytest.mark.parametrize(
    ("decision", "status"),
    [
        ({"take": "mine"}, "finalized"),
        ({"take": "theirs"}, "abandoned"),
        ({"row": {"status": "active"}}, "active"),
    ],
)
def test_a_conflict_is_listed_shown_and_decided_once(
    desk: Desk, clashed: dict[str, Any], fresh_supabase: Any, decision: Any, status: str
) -> None:
    path = f"/conflicts/{clashed['id']}"
    shown = desk.get(path)
    assert (shown["mine"], shown["theirs"]) == ({"status": "finalized"}, {"status": "abandoned"})
    assert desk.told(f"{path}/resolve", {}) == (422, "invalid")
    assert [r["verdict"] for r in desk.post(f"{path}/resolve", decision)] == ["applied"]
    assert desk.told(f"{path}/resolve", decision) == (409, "conflict")
    assert desk.get("/conflicts?open=true")["conflicts"] == []
    [kept] = desk.get("/conflicts")["conflicts"]
    assert kept["id"] == clashed["id"]
    with psycopg.connect(fresh_supabase.database_url) as sql:
        assert sql.execute("select status from sessions").fetchone() == (status,)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", f"/dead-letters/{UNKNOWN}", None, 404),
        ("GET", "/dead-letters/nonsense", None, 404),
        ("POST", f"/dead-letters/{UNKNOWN}/retry", None, 404),
        ("POST", "/dead-letters/nonsense/retry", None, 404),
        ("POST", f"/dead-letters/{UNKNOWN}/discard", None, 404),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {"changes": {"status": "x"}}, 404),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {}, 422),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {"changes": {}}, 422),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {"changes": {"a": "\x00"}}, 422),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {"changes": {"a": 2**70}}, 422),
        ("POST", f"/dead-letters/{UNKNOWN}/edit", {"changes": {"a": 1}, "op": -1}, 422),
        ("GET", f"/conflicts/{UNKNOWN}", None, 404),
        ("GET", "/conflicts/nonsense", None, 404),
        ("POST", f"/conflicts/{UNKNOWN}/resolve", {"take": "mine"}, 404),
        ("POST", f"/conflicts/{UNKNOWN}/resolve", {"take": "mine", "row": {"a": 1}}, 422),
        ("POST", f"/conflicts/{UNKNOWN}/resolve", {"take": "ours"}, 422),
        ("GET", "/dead-letters?log=nonsense", None, 404),
    ],
)
def test_a_wrong_id_or_body_is_named_and_changes_nothing(
    desk: Desk, method: str, path: str, body: Any, status: int
) -> None:
    code = {404: "not_found", 422: "invalid"}[status]
    assert desk.told(path, body, method) == (status, code)


def test_an_op_that_is_not_there_is_named(desk: Desk, container: Any) -> None:
    first, _ = refused(container())
    body = {"changes": {"status": "active"}, "op": 7}
    reply = desk.ask("POST", f"/dead-letters/{first}/edit", body)
    assert (reply.status_code, reply.json()["error"]["fields"][0]["field"]) == (422, "op")


def test_the_service_key_is_an_operator_too(desk: Desk) -> None:
    reply = desk.ask("GET", "/status", who="service")
    assert reply.status_code == 200
    assert set(reply.json()) == {"supabase", "breaker", "refused", "error", "logs"}


def test_in_an_outage_the_status_is_told_and_the_rest_is_unavailable(
    desk: Desk, fresh_supabase: Any
) -> None:
    fresh_supabase.stop_postgrest()
    try:
        assert desk.get("/status")["logs"][0]["pending"] == 0
        assert desk.told("/dead-letters", method="GET") == (503, "unavailable")
        assert desk.told("/audit", method="GET") == (503, "unavailable")
        assert desk.told(f"/dead-letters/{UNKNOWN}/retry") == (503, "unavailable")
    finally:
        fresh_supabase.start_postgrest()


def test_without_supabase_there_is_nothing_to_operate_on(tmp_path: Path) -> None:
    settings = Settings.load(
        data_dir=tmp_path, supabase_jwt_secret="s" * 40, use_supabase=False, supabase_url=None
    )
    import jwt

    key = jwt.encode({"role": "service_role", "exp": 2**33}, "s" * 40)
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        with TestClient(create_app(settings, store)) as client:
            headers = {"Authorization": f"Bearer {key}"}
            assert client.get("/api/sync/status", headers=headers).json()["supabase"] == "off"
            assert client.get("/api/sync/audit", headers=headers).status_code == 503
