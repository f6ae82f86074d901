"""A container's end and its acknowledgements, on a real server process with real signals."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from local_store import LocalStore
from local_store.clock import SystemClock
from local_store.segments import SegmentKey
from syncer.adopter import Adopter
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit import wait_until
from syncer.testkit.api_process import ApiProcess
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import Delay, Refuse
from syncer.volume import Volume

SECRET = "the secret of these containers"
USER = "github:42"
CLIENTS = 6
SHUTDOWN_MAX_S = 25.0

Serve = Callable[..., ApiProcess]


@pytest.fixture
def serve(fresh_supabase, fault_proxy: FaultProxy, tmp_path: Path) -> Iterator[Serve]:
    """Start the API behind the fault proxy, with a folder as its Volume."""
    made: list[ApiProcess] = []

    def start(**settings: str) -> ApiProcess:
        env = {
            **fresh_supabase.env(),
            "SUPABASE_URL": fault_proxy.url,
            "SYNCER_FLUSH_INTERVAL_S": "0.2",
            "SYNCER_BREAKER_INTERVAL_S": "0.5",
            "SYNCER_VOLUME_DIR": str(tmp_path / "volume"),
            "SYNCER_SEGMENT_KEY": SECRET,
            **settings,
        }
        (tmp_path / "volume").mkdir(exist_ok=True)
        process = ApiProcess(env, tmp_path / "disk", tmp_path / "api.log")
        process.start()
        made.append(process)
        return process

    yield start
    for process in made:
        process.kill()


@pytest.fixture
def headers(fresh_supabase) -> dict[str, str]:
    return {"Authorization": f"Bearer {fresh_supabase.user_token(USER)}"}


class Load:
    """Clients that create and resolve, and note what was acknowledged and how far."""

    def __init__(self, api: ApiProcess, headers: dict[str, str]) -> None:
        self.acknowledged: dict[str, str] = {}
        self._api = api
        self._headers = headers
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._api.url, headers=self._headers, timeout=30.0) as client:
            while not self._stopping.is_set():
                try:
                    reply = client.post("/api/sessions", json={"prompt": "Sort by ???"})
                except httpx.HTTPError:
                    continue  # not acknowledged
                if reply.status_code == 201:
                    durability = reply.headers["X-Durability"]
                    self.acknowledged[reply.json()["session_id"]] = durability

    def end(self) -> dict[str, str]:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return self.acknowledged


def create(api: ApiProcess, headers: dict[str, str]) -> httpx.Response:
    reply = httpx.post(
        f"{api.url}/api/sessions", json={"prompt": "x"}, headers=headers, timeout=30.0
    )
    assert reply.status_code == 201, reply.text
    return reply


def health(api: ApiProcess) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{api.url}/health", timeout=30.0).json()
    return found


def adopt_all(fresh_supabase: Any, tmp_path: Path) -> int:
    """Deliver what is on the Volume by somebody who has nothing else; returns what was new."""
    remote = SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key)
    adopter = Adopter(
        Volume(tmp_path / "volume"),
        remote,
        tmp_path / "scratch",
        tables=SESSION_TABLES,
        keys=[SegmentKey.derive(SECRET)],
        environment="127.0.0.1",
    )
    report = adopter.adopt(older_than_s=0.0, budget_s=60.0)
    remote.close()
    assert (report.quarantined, report.left, report.remaining) == ((), (), 0)
    return report.flush.applied


def stored(fresh_supabase: Any) -> set[str]:
    with psycopg.connect(fresh_supabase.database_url) as sql:
        return {row[0] for row in sql.execute("select id::text from sessions").fetchall()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("supabase_is", ["up", "down"])
def test_a_signal_under_load_leaves_everything_acknowledged_on_the_volume_or_the_server(
    serve, headers, fault_proxy, fresh_supabase, tmp_path, number, supabase_is
):
    api = serve(SYNCER_ACK="local")
    if supabase_is == "down":
        fault_proxy.set(Refuse())
    load = Load(api, headers)
    wait_until(lambda: len(load.acknowledged) > 30)
    clock = SystemClock()
    began = clock.monotonic()
    assert api._end(number) == 0
    assert clock.monotonic() - began < SHUTDOWN_MAX_S
    acknowledged = load.end()
    with LocalStore.open(tmp_path / "disk", tables=SESSION_TABLES) as store:
        written = {row["id"] for row in store.select("sessions", user_id=USER, limit=-1)}
    assert set(acknowledged) <= written
    shutil.rmtree(tmp_path / "disk")  # the container is gone, with its disk
    fault_proxy.clear()
    adopt_all(fresh_supabase, tmp_path)
    assert set(acknowledged) <= stored(fresh_supabase)


def test_a_call_that_hangs_does_not_keep_a_container_from_ending_in_time(
    serve, headers, fault_proxy, fresh_supabase, tmp_path
):
    api = serve(SYNCER_ACK="local")
    fault_proxy.set(Delay(60.0))
    made = create(api, headers).json()["session_id"]
    clock = SystemClock()
    began = clock.monotonic()
    assert api.stop() == 0
    assert clock.monotonic() - began < SHUTDOWN_MAX_S
    fault_proxy.clear()
    shutil.rmtree(tmp_path / "disk")
    adopt_all(fresh_supabase, tmp_path)
    assert made in stored(fresh_supabase)


def test_adaptive_turns_to_the_volume_in_an_outage_and_back(serve, headers, fault_proxy):
    api = serve(SYNCER_ACK="adaptive")
    assert create(api, headers).headers["X-Durability"] == "host"
    wait_until(lambda: health(api)["pending"] == 0)
    fault_proxy.set(Refuse())
    create(api, headers)
    wait_until(lambda: health(api)["breaker"] != "closed")
    made = create(api, headers)
    assert made.headers["X-Durability"] == "container"
    assert made.json()["sync"]["durability"] == "container"
    found = health(api)
    assert (found["at_risk_transactions"], found["acknowledge"]) == (0, "adaptive")
    assert found["pending"] == 2
    fault_proxy.clear()
    wait_until(lambda: health(api)["pending"] == 0)
    assert create(api, headers).headers["X-Durability"] in ("host", "remote")


def test_adaptive_turns_to_the_volume_when_supabase_is_merely_slow(serve, headers, fault_proxy):
    api = serve(SYNCER_ACK="adaptive", SYNCER_ADAPTIVE_AFTER_S="0.3")
    fault_proxy.set(Delay(3.0))
    create(api, headers)
    wait_until(lambda: create(api, headers).headers["X-Durability"] == "container")
    assert health(api)["breaker"] == "closed"


def test_with_supabase_switched_off_every_write_outlives_its_container(
    serve, headers, fresh_supabase, tmp_path
):
    api = serve(SYNCER_ACK="adaptive", USE_SUPABASE="false")
    made = create(api, headers)
    assert made.headers["X-Durability"] == "container"
    found = health(api)
    assert (found["supabase"], found["at_risk_transactions"], found["pending"]) == ("off", 0, 1)
    api.kill()
    shutil.rmtree(tmp_path / "disk")
    assert adopt_all(fresh_supabase, tmp_path) == 1
    assert made.json()["session_id"] in stored(fresh_supabase)


def test_remote_waits_for_supabase_and_says_host_in_an_outage(serve, headers, fault_proxy):
    api = serve(SYNCER_ACK="remote", SYNCER_ACK_TIMEOUT_S="0.5")
    assert create(api, headers).headers["X-Durability"] == "remote"
    fault_proxy.set(Refuse())
    assert create(api, headers).headers["X-Durability"] == "host"
    assert health(api)["at_risk_transactions"] == 1


def test_a_container_without_the_secret_key_ships_and_a_worker_delivers(
    serve, headers, fresh_supabase, tmp_path
):
    api = serve(
        SYNCER_ACK="volume",
        SYNCER_EMBEDDED_FLUSHER="false",
        SUPABASE_SECRET_KEY="",
        SUPABASE_SERVICE_ROLE_KEY="",
    )
    made = create(api, headers)
    assert made.headers["X-Durability"] == "container"
    api.kill()
    shutil.rmtree(tmp_path / "disk")
    adopt_all(fresh_supabase, tmp_path)
    assert made.json()["session_id"] in stored(fresh_supabase)


def test_a_volume_that_cannot_be_written_is_an_honest_host_and_degraded(serve, headers, tmp_path):
    api = serve(SYNCER_ACK="volume", SYNCER_EMBEDDED_FLUSHER="false")
    shutil.rmtree(tmp_path / "volume")
    (tmp_path / "volume").write_text("a file stands in its place")
    assert create(api, headers).headers["X-Durability"] == "host"
    found = health(api)
    assert (found["status"], found["at_risk_transactions"]) == ("degraded", 1)
