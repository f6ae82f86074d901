"""Take each defence away in a copy of the project, and tell which tests notice.

    python -m tests.defences [--write] [NAME ...]

A defence is a piece of source; without it the named tests must fail. One that nobody misses is an
error. `--write` puts the table into docs/RELIABILITY.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from local_store.clock import SystemClock

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "RELIABILITY.md"
TEST_S = 100  # a test may wait for ever without the defence: it counts as failed then
FAILURES_MAX = 5  # enough to name
TIMEOUT_S = 2 * FAILURES_MAX * TEST_S


@dataclass(frozen=True)
class Defence:
    """`piece` of `file` becomes `instead`; `tests` are to notice."""

    name: str
    harm: str
    file: str
    piece: str
    instead: str
    tests: tuple[str, ...]


DEFENCES = (
    Defence(
        "fsync",
        "a power loss takes acknowledged transactions",
        "local_store/opening.py",
        '"PRAGMA synchronous = FULL"',
        '"PRAGMA synchronous = OFF"',
        ("tests/unit/test_power_loss.py",),
    ),
    Defence(
        "ledger",
        "a resent transaction meets its own rows",
        "tests/simulation/remote_model.py",
        "        if self.remembers:\n",
        "        if False:\n",
        ("tests/unit/test_flusher.py", "tests/simulation/test_simulation.py"),
    ),
    Defence(
        "ledger floor",
        "a forgotten transaction takes effect again",
        "migrations/009_create_sync_apply_batch.sql",
        "elsif v_seq <= p_floor then",
        "elsif false then",
        ("tests/sql/test_pruning.py",),
    ),
    Defence(
        "CRC",
        "a flipped bit shows as content",
        "local_store/schema.py",
        "crc = zlib.crc32(part, crc)",
        "crc = 0 * zlib.crc32(part, crc)",
        ("tests/unit/test_local_store_damage.py", "tests/unit/test_local_store_seals.py"),
    ),
    Defence(
        "closing before a fork",
        "a forked child can't use the buffer, or loses what it acknowledged",
        "local_store/forks.py",
        "        thing.before_fork()\n",
        "        pass\n",
        ("tests/unit/test_local_store_forks.py",),
    ),
    Defence(
        "role switch",
        "a stranger's transaction writes somebody else's row",
        "migrations/013_create_sync_effects.sql",
        "perform set_config('role', 'authenticated', true);",
        "",
        ("tests/sql/test_apply_batch_author.py",),
    ),
    Defence(
        "compare and set",
        "a stale edit overwrites",
        "migrations/009_create_sync_apply_batch.sql",
        "if v_moved then",
        "if false then",
        ("tests/sql/test_apply_batch.py", "tests/sql/test_apply_batch_author.py"),
    ),
    Defence(
        "one ground for a chain",
        "a late request overwrites what its author never saw",
        "migrations/013_create_sync_effects.sql",
        "if v_rewritten and v_base is not null then",
        "if false then",
        ("tests/sql/test_late_requests.py",),
    ),
    Defence(
        "parking together",
        "what waits behind refused work is sent again instead of being parked with it",
        "syncer/flusher.py",
        "        parked |= {park.transaction.txn_id for park in parks}\n",
        "",
        ("tests/unit/test_flusher.py",),
    ),
    Defence(
        "reply validation",
        "somebody else's reply counts as delivered",
        "syncer/core/wire.py",
        "    if found != expected:\n",
        "    if False:\n",
        ("tests/unit/test_core.py", "tests/integration/test_remote.py"),
    ),
    Defence(
        "write gate",
        "a request writes after the last shipment",
        "syncer/service/health.py",
        "            if not self._is_open:\n",
        "            if False:\n",
        ("tests/unit/api",),
    ),
    Defence(
        "flusher lock",
        "two flushers send the same batch",
        "local_store/opening.py",
        "            flock(turn.descriptor, LOCK_EX | LOCK_NB)\n",
        "            pass\n",
        ("tests/unit/test_flusher_turns.py", "tests/unit/test_local_store_turns.py"),
    ),
    Defence(
        "digest",
        "another content under a known id passes for the first",
        "local_store/door.py",
        "    return hashlib.sha256(orjson.dumps(ops, option=orjson.OPT_SORT_KEYS)).hexdigest()\n",
        '    return "0" * 64\n',
        ("tests/unit/test_local_store.py", "tests/unit/test_local_store_door.py"),
    ),
    Defence(
        "door",
        "a text that Postgres can't store is acknowledged",
        "local_store/door.py",
        '    if "\\x00" in value:\n',
        "    if False:\n",
        ("tests/unit/test_local_store_door.py",),
    ),
    Defence(
        "look at the inode",
        "acknowledgements go into an unlinked file",
        "local_store/buffer_file.py",
        '        if not self._is_found():\n            self._follow("a group")\n',
        "",
        ("tests/unit/test_local_store_damage.py",),
    ),
    Defence(
        "parking behind parked work",
        "what can't be merged is sent without end",
        "syncer/flusher.py",
        "blocker = None if is_merged else parked_before(chains, transaction, rows)",
        "blocker = None",
        ("tests/unit/test_flusher.py",),
    ),
)


def copy_of_the_project(folder: Path) -> None:
    """Copy what git knows of, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def noticed_by(defence: Defence) -> list[str]:
    """Return the tests that fail without a defence."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_project(folder)
        source = (folder / defence.file).read_text()
        if defence.piece not in source:
            sys.exit(f"{defence.name}: {defence.file} has no such piece any more")
        (folder / defence.file).write_text(source.replace(defence.piece, defence.instead))
        env = {**os.environ, "PYTHONPATH": name, "SIMULATION_HISTORIES": "40"}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-rfE", f"--maxfail={FAILURES_MAX}"),
                *("-p", "no:cacheprovider", "--timeout", str(TEST_S), *defence.tests),
            ],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    found = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", done.stdout, re.MULTILINE)
    return list(dict.fromkeys(found))


def row_of(defence: Defence, failed: list[str]) -> str:
    """Return a defence's line of the table."""
    names = [test.removeprefix("tests/") for test in failed[:2]]
    more = ", and more" if len(failed) > len(names) else ""
    tests = ", ".join(f"`{name}`" for name in names)
    return f"| {defence.name} (`{defence.file}`) | {defence.harm} | {tests}{more} |"


def main() -> None:
    """Try the defences; exit with 1 when one survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    rows, survived = [], []
    for defence in DEFENCES:
        if given.names and defence.name not in given.names:
            continue
        failed = noticed_by(defence)
        print(f"{defence.name}: {len(failed)} tests notice", flush=True)
        rows.append(row_of(defence, failed))
        if not failed:
            survived.append(defence.name)
    if survived:
        sys.exit(f"nobody misses: {', '.join(survived)}")
    if given.write:
        before, _, rest = TABLE.read_text().partition("<!-- defences -->")
        _, _, after = rest.partition("<!-- /defences -->")
        today = SystemClock().now().date()
        head = f"Run on {today}.\n\n| taken away | then | noticed by |\n|---|---|---|\n"
        table = "\n".join(rows)
        TABLE.write_text(f"{before}<!-- defences -->\n{head}{table}\n<!-- /defences -->{after}")


if __name__ == "__main__":
    main()
