"""The real API in a process of its own, to be killed and restarted on its folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from local_store.clock import Clock, SystemClock

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 25.0  # what a container platform grants a process after the signal
_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ApiProcess:
    """`syncer serve` as a subprocess on 127.0.0.1; `start`, `kill` and `stop` as often as needed.

    The port and the environment stay the same over restarts, as they do behind a load balancer.
    """

    def __init__(
        self, env: Mapping[str, str], data_dir: Path, log_file: Path, clock: Clock | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_dir = data_dir
        self.log_file = log_file
        self._clock = clock or SystemClock()
        self._process: subprocess.Popen[bytes] | None = None
        self._env = {
            **_without_settings(os.environ),
            **env,
            "SYNCER_DATA_DIR": str(data_dir),
            "SYNCER_HOST": "127.0.0.1",
            "SYNCER_PORT": str(self.port),
        }

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and wait until it accepts writes; raises RuntimeError with its log."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "syncer", "serve"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        end = self._clock.monotonic() + READY_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or self._clock.monotonic() > end:
                tail = self.log_file.read_text(errors="replace")[-2_000:]
                self.kill()
                raise RuntimeError(f"the API did not become ready; its log ends:\n{tail}")
            self._clock.sleep(0.05)

    def kill(self) -> None:
        """End the process with SIGKILL, as a lost machine does."""
        self._end(signal.SIGKILL)

    def stop(self) -> int | None:
        """End the process with SIGTERM and wait; returns its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(number)
        try:
            return process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"the API ignored {number.name} for {STOP_TIMEOUT_S} s") from None

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False


def _without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out the product's own variables: a drill must not reach anybody's real project."""
    ours = ("SYNCER_", "SUPABASE_", "USE_SUPABASE", "DATABASE_URL")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
