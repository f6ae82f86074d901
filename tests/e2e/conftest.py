"""The command line and the API process, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from syncer.testkit.api_process import ApiProcess

TIMEOUT_S = 150


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


Run = Callable[..., Ran]


def bare_environment() -> dict[str, str]:
    """The caller's environment without any setting of ours."""
    ours = ("SYNCER_", "SUPABASE_", "USE_SUPABASE", "DATABASE_URL")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture
def syncer(tmp_path: Path) -> Run:
    """Run the `syncer` command in an empty folder with these settings alone."""

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "syncer", *arguments],
            env={**bare_environment(), **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def api(fresh_supabase, tmp_path: Path) -> Iterator[ApiProcess]:
    """The real API in its own process on the local Supabase."""
    settings = {
        **fresh_supabase.env(),
        "SYNCER_FLUSH_INTERVAL_S": "0.2",
        "SYNCER_BREAKER_INTERVAL_S": "0.5",
    }
    process = ApiProcess(settings, tmp_path / "buffer", tmp_path / "api.log")
    process.start()
    yield process
    process.kill()


@pytest.fixture
def client(api: ApiProcess, fresh_supabase) -> Iterator[httpx.Client]:
    """An HTTP client signed in as one user."""
    token = fresh_supabase.user_token("github:42")
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=api.url, headers=headers, timeout=30.0) as made:
        yield made
