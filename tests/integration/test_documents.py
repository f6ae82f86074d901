"""What the documents show works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_testing_your_app_passes_as_pasted(tmp_path):
    [example] = python_blocks("docs/TESTING_YOUR_APP.md")
    (tmp_path / "test_example.py").write_text(example)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_example_of_the_readme_runs(fresh_supabase, tmp_path):
    [example] = python_blocks("README.md")
    # The example's table isn't in the demo schema; its folder isn't ours to write.
    changed = example.replace("/var/lib/app/buffer", str(tmp_path / "buffer"))
    script = tmp_path / "example.py"
    script.write_text(changed)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**fresh_supabase.env(), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "host" in done.stdout
    assert "hello" in done.stdout


def test_every_local_link_of_the_documents_leads_somewhere():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
