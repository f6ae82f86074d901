"""Processes that a stack starts: found again after a crash, ended by identity, never by guess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from local_store.clock import Clock, SystemClock

END_TIMEOUT_S = 10.0


def started_at(pid: int) -> str | None:
    """Return what tells this process from a later one with its number; None when it's gone.

    A process that has ended but wasn't collected by its parent counts as gone.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    told = subprocess.run(  # no /proc, as on macOS
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or None


class PidFile:
    """Remembers one process by number and start time."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or SystemClock()

    def write(self, pid: int) -> None:
        """Remember `pid`; written whole or not at all."""
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": pid, "started_at": started_at(pid)}))
        temporary.replace(self._path)

    def pid(self) -> int | None:
        """Return the process's number while it is that process, else None."""
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        pid = int(known["pid"])
        alive = known["started_at"] is not None and started_at(pid) == known["started_at"]
        return pid if alive else None

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the process with `number`, with SIGKILL when it doesn't listen; wait until gone."""
        pid = self.pid()
        if pid is not None:
            _signal(pid, number)
            if not self._gone(END_TIMEOUT_S):
                _signal(pid, signal.SIGKILL)
                self._gone(END_TIMEOUT_S)
        self._path.unlink(missing_ok=True)

    def _gone(self, timeout_s: float) -> bool:
        end = self._clock.monotonic() + timeout_s
        while (pid := self.pid()) is not None:
            _collect(pid)
            if self._clock.monotonic() > end:
                return False
            self._clock.sleep(0.01)
        return True


def spawn(
    command: Sequence[str],
    *,
    log_file: Path,
    env: dict[str, str] | None = None,
    user: int | None = None,
) -> int:
    """Start a detached process that outlives this one; returns its pid.

    A session of its own keeps the terminal's Ctrl-C away from the database.
    """
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
            user=user,
            group=None if user is None else _group_of(user),
            extra_groups=None if user is None else [],
            cwd="/",
        )
    return process.pid


def watch_parent(folder: Path) -> int:
    """Start a watcher that stops the stack in `folder` when this process ends, however it ends.

    The watcher holds the read end of a pipe whose write end only this process has.
    """
    read_end, write_end = os.pipe()
    subprocess.Popen(
        [sys.executable, "-m", "syncer.testkit.local_supabase", str(folder)],
        stdin=read_end,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_end)
    return write_end


def _group_of(uid: int) -> int:
    import pwd

    return pwd.getpwuid(uid).pw_gid


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _collect(pid: int) -> None:
    """Collect an ended child, so that it doesn't stay as a zombie; others are init's."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
