"""What the doctor finds on this machine: SQLite, the folder, the disk, the buffer file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from local_store import opening
from syncer.core.diagnosis import Check, failed, passed

SQLITE_STRICT = (3, 37, 0)  # the first with STRICT tables
# Before it, the reset of a WAL can race a commit and corrupt the file; the folder's lock covers it.
SQLITE_SOUND_WAL = (3, 51, 3)
SPACE_MIN_BYTES = 64 * 1024 * 1024  # less, and the next checkpoint may be the one that fails
SYNCHRONOUS_FULL = 2


def local_checks(folder: Path, buffer_bytes_max: int) -> list[Check]:
    """Examine SQLite, the folder and the buffer file in it; a scratch file is made and removed."""
    checks = [judge_sqlite(sqlite3.sqlite_version_info)]
    if not folder.exists():
        checks.append(_absent_folder(folder))
        return checks
    writable = _writable(folder)
    checks.append(writable)
    if not writable.ok:
        return checks
    checks += [_mode("folder.mode", folder, 0o700), _space(folder, buffer_bytes_max)]
    checks.append(_new_connection(folder))
    file = folder / opening.FILE_NAME
    if file.exists():
        checks += [_mode("buffer.mode", file, 0o600), _journal(file), _damage(folder, file)]
    else:
        checks.append(passed("buffer.journal", "no buffer yet; it is made by the first start"))
    return checks


def judge_sqlite(version: tuple[int, ...]) -> Check:
    """Judge the version of the SQLite library in this Python."""
    told = "SQLite " + ".".join(str(part) for part in version)
    if version < SQLITE_STRICT:
        remedy = "use a Python built with SQLite 3.37 or newer"
        return failed("sqlite", f"{told} has no STRICT tables", remedy)
    if version < SQLITE_SOUND_WAL:
        told += "; its WAL-reset race is kept out by the folder's lock"
    return passed("sqlite", told)


def _absent_folder(folder: Path) -> Check:
    nearest = next(path for path in folder.absolute().parents if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return passed("folder", f"{folder} isn't there yet; it is made by the first start")
    return failed(
        "folder",
        f"{folder} can't be made: {nearest} isn't a folder that may be written",
        "set SYNCER_DATA_DIR to a folder on a disk that may be written",
    )


def _writable(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"syncer")
    except OSError as error:
        return failed(
            "folder",
            f"{folder} can't be written: {error.strerror}",
            "set SYNCER_DATA_DIR to a folder on a disk that may be written",
        )
    return passed("folder", f"{folder} can be written")


def _mode(name: str, path: Path, wanted: int) -> Check:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077 == 0:
        return passed(name, f"{path.name}: mode {mode:o}")
    detail = f"{path} has mode {mode:o}: others on this machine can get at users' data"
    return failed(name, detail, f"chmod {wanted:o} {path}", "warning")


def _space(folder: Path, buffer_bytes_max: int) -> Check:
    used = sum(path.stat().st_size for path in folder.glob(opening.FILE_NAME + "*"))
    return judge_space(shutil.disk_usage(folder).free, used, buffer_bytes_max)


def judge_space(free_bytes: int, used_bytes: int, buffer_bytes_max: int) -> Check:
    """Judge the disk: the buffer should reach its own limit before the disk is full."""
    told = f"{free_bytes // 2**20} MiB free, the buffer may grow to {buffer_bytes_max // 2**20} MiB"
    if free_bytes >= SPACE_MIN_BYTES and free_bytes + used_bytes >= buffer_bytes_max:
        return passed("space", told)
    return failed(
        "space",
        told,
        "free space, use a larger disk, or lower SYNCER_BUFFER_BYTES_MAX",
        "error" if free_bytes < SPACE_MIN_BYTES else "warning",
    )


def _new_connection(folder: Path) -> Check:
    """See what the store's own way of connecting gets on this file system."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as scratch,
            closing(opening.connect(Path(scratch) / "scratch.db")) as connection,
        ):
            journal = str(connection.execute("PRAGMA journal_mode").fetchone()[0])
            synchronous = int(connection.execute("PRAGMA synchronous").fetchone()[0])
    except (sqlite3.Error, OSError) as error:
        remedy = "put SYNCER_DATA_DIR on a local disk"
        return failed("durability", f"SQLite can't work in {folder}: {error}", remedy)
    return judge_durability(journal, synchronous)


def judge_durability(journal: str, synchronous: int) -> Check:
    """Judge the modes of a fresh connection; only WAL with FULL survives a power loss here."""
    if journal == "wal" and synchronous >= SYNCHRONOUS_FULL:
        return passed("durability", "new connections get WAL with synchronous=FULL")
    return failed(
        "durability",
        f"new connections get journal_mode={journal}, synchronous={synchronous}",
        "put SYNCER_DATA_DIR on a local disk: WAL needs shared memory, which network disks lack",
    )


def _damage(folder: Path, file: Path) -> Check:
    """See what the buffer set aside, read-only as `_journal` does."""
    aside = folder / "quarantine"
    files = sorted(path.name for path in aside.iterdir()) if aside.is_dir() else []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as connection:
            (records,) = connection.execute("SELECT count(*) FROM quarantine").fetchone()
            (lost,) = connection.execute("SELECT coalesce(sum(lost), 0) FROM logs").fetchone()
    except sqlite3.Error:
        return passed("buffer.damage", "not looked at: see buffer.journal")
    if not (records or lost or files):
        return passed("buffer.damage", "nothing was found damaged or missing")
    return failed(
        "buffer.damage",
        f"{records} damaged records set aside, {lost} acknowledged transactions missing at the end"
        f" of a log, {len(files)} files in {aside}",
        "check the disk; `syncer audit` tells what the server has; keep the quarantine",
    )


def _journal(file: Path) -> Check:
    """Read the buffer file's mode, read-only.

    Through SQLite, never by opening the file: closing a descriptor of one's own would drop the
    locks that a store in this process holds on it. When nobody has the file open an empty -wal is
    left beside it, which the next start takes over.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as connection:
            journal = str(connection.execute("PRAGMA journal_mode").fetchone()[0])
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        return failed(
            "buffer.journal",
            f"{file} can't be read: {error}",
            "keep the folder as it is and restore the file from a copy, or start in a new folder",
        )
    if journal == "wal":
        return passed("buffer.journal", "the buffer is in WAL mode")
    return failed(
        "buffer.journal",
        f"the buffer is in journal_mode={journal}",
        "stop whatever opened it with other settings; the next start puts WAL back",
    )
