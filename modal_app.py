"""The deployment on Modal: the API, the worker's schedule, the replay, a smoke test. Wiring only.

    modal deploy modal_app.py                 modal run modal_app.py::replay --dry-run
    modal run modal_app.py::smoke             docs/SUPABASE_SETUP.md has the way from empty accounts

Importing this touches no disk and no network: what is named here is looked up when Modal runs it.
Deployment settings are read from the environment of `modal deploy`; run-time settings come from the
Secret and, for what is the same everywhere, from the image.
"""

from __future__ import annotations

import signal
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import modal

from local_store.ops import Selection
from syncer.service.buffers import moment
from syncer.service.deployment import DeploySettings
from syncer.service.runtime import Runtime
from syncer.service.server import set_up_logging_of, tune_interpreter
from syncer.service.smoke import smoke as run_smoke
from syncer.service.volume_replay import opened_volume
from syncer.sessions.tables import SESSION_TABLES
from syncer.settings import Settings
from syncer.volume import Volume
from syncer.worker import Worker

MOUNT = "/syncer/volume"
BUFFER = "/syncer/buffer"  # on the container's own disk: it dies with it
PASS_BUDGET_S = 40.0  # with one call that overruns it, below the schedule's minute
WORKER_TIMEOUT_S = 120
REPLAY_TIMEOUT_S = 3_900  # the replay's own hour, and its last call
HERE = Path(__file__).parent

deploy = DeploySettings.load()
app = modal.App(deploy.app)
handle = modal.Volume.from_name(
    deploy.volume, create_if_missing=True, version=deploy.volume_version
)
secret = modal.Secret.from_name(
    deploy.secret, required_keys=["SUPABASE_URL", "SUPABASE_SECRET_KEY", "SYNCER_SEGMENT_KEY"]
)
image = (
    modal.Image.debian_slim(python_version=deploy.python)
    .pip_install_from_requirements(str(HERE / "requirements.lock"))
    .env(
        {
            "SYNCER_DATA_DIR": BUFFER,
            "SYNCER_VOLUME_DIR": MOUNT,
            "SYNCER_ACK": deploy.ack,
            "SYNCER_EMBEDDED_FLUSHER": "true",
        }
    )
    .add_local_python_source("syncer", "local_store")
    .add_local_dir(str(HERE / "migrations"), "/root/migrations")
)


def mounted() -> Volume:
    """Return the Volume as this container has it; one for all, since Modal locks by handle."""
    folder = Settings.load().require_volume()[0]
    on_modal = not modal.is_local()
    return Volume(
        folder,
        commit=handle.commit if on_modal else None,
        reload=handle.reload if on_modal else None,
    )


def end_on_sigterm() -> None:
    """Let SIGTERM end the container as SIGINT does: Modal runs the shutdown for that one only.

    A process that a shell started in the background ignores SIGINT; then neither would end it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


if not modal.is_local():
    end_on_sigterm()


@app.function(
    image=image,
    secrets=[secret],
    volumes={MOUNT: handle},
    min_containers=deploy.min_containers,
    max_containers=deploy.max_containers,
    scaledown_window=deploy.scaledown_s,
)
@modal.concurrent(max_inputs=deploy.requests_per_container)
@modal.asgi_app()
def api() -> Any:
    """Serve the HTTP API from this container's buffer; its end seals and ships what is left."""
    set_up_logging_of(Settings.load())
    runtime = Runtime.start(Settings.load(), volume=mounted())
    tune_interpreter()
    return runtime.app


@app.function(
    image=image,
    secrets=[secret],
    volumes={MOUNT: handle},
    schedule=modal.Cron(deploy.cron),
    max_containers=1,
    timeout=WORKER_TIMEOUT_S,
)
def worker() -> dict[str, Any]:
    """Do one pass: deliver what containers left, collect, prune, ask the canary."""
    set_up_logging_of(Settings.load())
    settings = Settings.load()
    if not settings.use_supabase:
        return {"leased": False, "ok": True, "errors": [], "detail": "USE_SUPABASE is false"}
    return container_worker().work(budget_s=PASS_BUDGET_S).to_json()


@cache
def container_worker() -> Worker:
    """Return this container's worker: it remembers when it last let the server forget."""
    scratch = Path(tempfile.mkdtemp(prefix="syncer-worker-"))
    return Worker.from_settings(mounted(), SESSION_TABLES, scratch)


@app.function(image=image, secrets=[secret], volumes={MOUNT: handle}, timeout=REPLAY_TIMEOUT_S)
def replay(
    since: str | None = None,
    until: str | None = None,
    table: str | None = None,
    user: str | None = None,
    settled: bool = False,
    dead_letters: bool = False,
    dry_run: bool = False,
) -> Any:
    """Deliver every segment now, however young; the options are those of `syncer replay`."""
    set_up_logging_of(Settings.load())
    selection = Selection(moment("since", since), moment("until", until), table, user)
    with opened_volume(Settings.load(), mounted()) as found:
        if dry_run:
            return [difference.to_json() for difference in found.differences(selection)]
        return found.replay(selection, settled=settled, dead_letters=dead_letters).to_json()


@app.function(image=image, secrets=[secret])
def smoke(url: str | None = None) -> dict[str, Any]:
    """Try the deployed API and the project behind it; raises when something doesn't work."""
    set_up_logging_of(Settings.load())
    report = run_smoke(url or str(api.get_web_url()), Settings.load()).to_json()
    if not report["ok"]:
        raise RuntimeError(f"the smoke test failed: {report['checks']}")
    return report
