"""The curl examples of docs/API_SESSIONS.md, run in order against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "API_SESSIONS.md"
USER = "demo:alice"


def examples() -> list[tuple[str, Any]]:
    """Return each command with the document that is shown behind it, if there is one."""
    text = DOCUMENT.read_text()
    blocks = re.findall(r"^```(bash|json)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    found: list[tuple[str, Any]] = []
    for kind, content in blocks:
        if kind == "bash":
            found.append((content, None))
        else:
            found[-1] = (found[-1][0], json.loads(content))
    return found


def assert_shaped(shown: Any, got: Any, at: str) -> None:
    """Objects have the keys that are shown, and values their types; ids and times differ."""
    if isinstance(shown, dict) and shown:
        assert isinstance(got, dict), at
        assert set(got) == set(shown), f"{at}: {sorted(got)}"
        for name, value in shown.items():
            assert_shaped(value, got[name], f"{at}.{name}")
    elif isinstance(shown, list) and shown:
        assert isinstance(got, list), at
        assert got, f"{at} is empty"
        assert_shaped(shown[0], got[0], f"{at}[0]")
    elif isinstance(shown, bool) or shown is None:
        assert got is None or isinstance(got, bool | int | float | str), at
    else:
        assert isinstance(got, type(shown)) or got is None, f"{at}: {got!r}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are curl commands")
def test_the_examples_run_as_they_stand_and_answer_what_is_shown(api, fresh_supabase, tmp_path):
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "API": api.url}
    env["TOKEN"] = fresh_supabase.user_token(USER)
    script, answers = ["set -eu"], examples()
    for number, (command, _) in enumerate(answers):
        script += [f"exec > answer-{number}", command]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(answers) > 9
    for number, (command, shown) in enumerate(answers):
        if shown is not None:
            got = json.loads((tmp_path / f"answer-{number}").read_text())
            assert_shaped(shown, got, command.splitlines()[0])
