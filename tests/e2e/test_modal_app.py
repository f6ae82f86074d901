"""The deployment's module: it imports anywhere, and its functions run on a local stack."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn

from syncer.errors import SettingsError
from tests.e2e.conftest import bare_environment

ROOT = Path(__file__).parents[2]
SECRET = "the secret of these containers"
USER = "github:42"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**bare_environment(), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


IMPORT_OFFLINE = """
import builtins, os, socket, sys

def refuse(*args, **kwargs):
    raise RuntimeError(f"at import: {args[:1]}")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
os.chdir(os.environ["FOLDER"])
real = builtins.open
def watched(file, mode="r", *args, **kwargs):
    if set(mode) & set("wax+"):
        refuse(file)
    return real(file, mode, *args, **kwargs)
builtins.open = watched
import modal_app
print(modal_app.app.name)
"""


def test_it_imports_without_a_token_a_network_or_a_folder_to_write_to(tmp_path):
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        done = run_python(IMPORT_OFFLINE, FOLDER=str(folder), HOME=str(folder))
    finally:
        folder.chmod(stat.S_IRWXU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "syncer"
    assert list(folder.iterdir()) == []


def test_its_settings_come_from_the_environment_of_the_deploy():
    code = "import modal_app as m; print(m.app.name, m.deploy.max_containers, m.deploy.cron)"
    env = {
        "SYNCER_MODAL_APP": "syncer-staging",
        "SYNCER_MODAL_MAX_CONTAINERS": "3",
        "SYNCER_MODAL_CRON": "*/5 * * * *",
    }
    assert run_python(code, **env).stdout.strip() == "syncer-staging 3 */5 * * * *"
    bad = run_python("import modal_app", SYNCER_MODAL_SCALEDOWN_S="soon")
    assert bad.returncode != 0
    assert "SYNCER_MODAL_SCALEDOWN_S" in bad.stderr


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_sigterm_ends_a_container_as_sigint_does(before):
    code = f"""
import signal, threading, modal_app
signal.signal(signal.SIGINT, signal.{before})
modal_app.end_on_sigterm()
try:
    # Only the main thread may take it: taken by another, a pause in this one would go on.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run_python(code).stdout.strip() == "interrupted"


def test_importing_it_outside_a_container_leaves_the_signals_alone():
    code = "import signal, modal_app; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    assert run_python(code).stdout.strip() == "True"


@pytest.fixture
def deployed(fresh_supabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module with the environment that a container has."""
    for name in list(os.environ):
        if name.startswith(("SYNCER_", "SUPABASE_", "USE_SUPABASE")):
            monkeypatch.delenv(name)
    (tmp_path / "volume").mkdir()
    settings = {
        **fresh_supabase.env(),
        "SYNCER_DATA_DIR": str(tmp_path / "disk"),
        "SYNCER_VOLUME_DIR": str(tmp_path / "volume"),
        "SYNCER_SEGMENT_KEY": SECRET,
        "SYNCER_ACK": "adaptive",
        "SYNCER_ADOPT_AFTER_S": "0",
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    module = importlib.import_module("modal_app")
    module.container_worker.cache_clear()
    yield module
    module.container_worker.cache_clear()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve as Modal does: with the app's lifespan, in a thread that isn't the main one."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def create(url: str, fresh_supabase: Any) -> httpx.Response:
    token = fresh_supabase.user_token(USER)
    reply = httpx.post(
        f"{url}/api/sessions",
        json={"prompt": "Sort by ???"},
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert reply.status_code == 201, reply.text
    return reply


def stored(fresh_supabase: Any) -> set[str]:
    with psycopg.connect(fresh_supabase.database_url) as sql:
        return {row[0] for row in sql.execute("select id::text from sessions").fetchall()}


def test_write_through_the_api_worker_flushes_replay_drains(
    deployed, fresh_supabase, tmp_path, monkeypatch
):
    monkeypatch.setenv("SYNCER_EMBEDDED_FLUSHER", "false")
    with served(deployed.api.local()) as url:
        first = create(url, fresh_supabase)
        assert first.headers["X-Durability"] == "container"
    shutil.rmtree(tmp_path / "disk")
    report = deployed.worker.local()
    assert report["ok"], report
    assert report["adoption"]["collected"] == 1
    assert first.json()["session_id"] in stored(fresh_supabase)

    with served(deployed.api.local()) as url:
        second = create(url, fresh_supabase)
    shutil.rmtree(tmp_path / "disk")
    shown = deployed.replay.local(dry_run=True)
    assert second.json()["session_id"] in {item["id"] for item in shown}
    assert second.json()["session_id"] not in stored(fresh_supabase)
    done = deployed.replay.local()
    assert (done["applied"], done["remaining"]) == (1, 0)
    assert second.json()["session_id"] in stored(fresh_supabase)


def test_the_end_of_the_api_ships_what_it_did_not_deliver(
    deployed, fresh_supabase, tmp_path, monkeypatch
):
    monkeypatch.setenv("SYNCER_ACK", "local")
    monkeypatch.setenv("SYNCER_EMBEDDED_FLUSHER", "false")
    with served(deployed.api.local()) as url:
        made = create(url, fresh_supabase)
        assert made.headers["X-Durability"] == "host"
    shutil.rmtree(tmp_path / "disk")
    assert deployed.worker.local()["adoption"]["adopted"] == 1
    assert made.json()["session_id"] in stored(fresh_supabase)


def test_the_worker_does_nothing_while_supabase_is_switched_off(deployed, monkeypatch):
    monkeypatch.setenv("USE_SUPABASE", "false")
    assert deployed.worker.local()["leased"] is False


def test_the_smoke_test_tries_the_api_and_the_project(deployed, fresh_supabase):
    with served(deployed.api.local()) as url:
        report = deployed.smoke.local(url=url)
    assert report["ok"], report
    assert [check["name"] for check in report["checks"]] == ["ready", "health", "write", "supabase"]
    with pytest.raises(RuntimeError, match="ready"):
        deployed.smoke.local(url=url)  # it has ended


def test_the_smoke_test_names_what_fails(deployed, fresh_supabase, monkeypatch):
    with served(deployed.api.local()) as url:
        monkeypatch.setenv("SUPABASE_JWT_SECRET", "another secret than the API was started with")
        with pytest.raises(RuntimeError, match="unauthorized") as raised:
            deployed.smoke.local(url=url)
        monkeypatch.delenv("SUPABASE_JWT_SECRET")
        assert "not tried" in str(deployed.smoke.local(url=url))
    assert "another secret" not in str(raised.value)


def test_a_missing_key_is_named_before_anything_is_opened(deployed, tmp_path, monkeypatch):
    monkeypatch.delenv("SYNCER_SEGMENT_KEY")
    with pytest.raises(SettingsError, match="SYNCER_SEGMENT_KEY"):
        deployed.api.local()
    assert not (tmp_path / "disk").exists()


def test_a_container_serves_until_sigterm_and_leaves_its_writes_on_the_volume(
    fresh_supabase, tmp_path
):
    """The container's life cycle in a process of its own: import, serve, SIGTERM, exit."""
    code = """
import threading, uvicorn, modal_app
modal_app.end_on_sigterm()
config = uvicorn.Config(modal_app.api.local(), host="127.0.0.1", port=0, log_level="critical")
server = uvicorn.Server(config)
server.install_signal_handlers = lambda: None
listening = config.bind_socket()
listening.listen()
print(listening.getsockname()[1], flush=True)
server.run([listening])
"""
    (tmp_path / "volume").mkdir()
    env = {
        **bare_environment(),
        **fresh_supabase.env(),
        "PYTHONPATH": str(ROOT),
        "SYNCER_DATA_DIR": str(tmp_path / "disk"),
        "SYNCER_VOLUME_DIR": str(tmp_path / "volume"),
        "SYNCER_SEGMENT_KEY": SECRET,
        "SYNCER_EMBEDDED_FLUSHER": "false",
        "SYNCER_ACK": "local",
    }
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        made = create(url, fresh_supabase)
        process.send_signal(signal.SIGTERM)
        process.wait(25)
    assert made.headers["X-Durability"] == "host"
    assert len(list((tmp_path / "volume").rglob("*.seg"))) == 1
