"""The life of an open buffer file: how it is opened, moved after, copied, and replaced if damaged.

Nothing here waits for callers, and nothing is deleted: what can't be used any more is moved to the
folder's quarantine, and what it still holds comes into a new file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from local_store import integrity, opening, salvage
from local_store.decoding import RecordDamaged
from local_store.errors import CommitUnknown, StoreCorrupt
from local_store.file_forks import FileForks, close_all
from local_store.listing import unlisted
from local_store.space import Ballast


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What only the store can do to its file; each runs inside a transaction that writes.

    `list_new` makes findable what was appended, before anybody looks (listing.py). `mend` sets
    damaged records aside, `relist` makes anew everything by which the others are found, `adopt`
    takes note of the tables' schema versions. `now` is the wall time as text.
    """

    list_new: Callable[[sqlite3.Connection], object]
    mend: Callable[[sqlite3.Connection], object]
    relist: Callable[[sqlite3.Connection], object]
    adopt: Callable[[sqlite3.Connection], object]
    now: Callable[[], str]


class FileLife(FileForks):
    """The half of a BufferFile that opens and replaces it; both locks are held by the caller."""

    _ids: Callable[[], str]
    _free_bytes_min: int
    _upkeep: Upkeep
    _ballast: Ballast
    _identity: tuple[int, int] | None
    _damaged: tuple[int, int] | None

    def backup(self, target: Path) -> None:
        """Copy one consistent state to a new file, page by page beside the writes."""
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        part = target.with_name(target.name + ".part")
        try:
            # A connection of its own: a long copy must not keep readers waiting.
            with self._copying, closing(opening.connect(self._path, readonly=True)) as source:
                opening.copy(source, part)
            with closing(opening.connect(part)) as copied:
                (found,) = copied.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise StoreCorrupt(part, str(found))
            os.rename(part, target)
            opening.sync_folder(target.parent)
        except BaseException:
            for name in (part, target):
                with suppress(FileNotFoundError):
                    os.unlink(name)
            raise

    def quarantined_files(self) -> list[str]:
        """Return the names of what was moved aside in this folder."""
        folder = self._folder / salvage.FOLDER_NAME
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def _connect(self) -> None:
        connection = self._begun(self._usable())
        try:
            reader = opening.connect(self._path, readonly=True)
            # It opens all its files now, and not when descriptors are short.
            reader.execute("SELECT only FROM totals").fetchone()
        except BaseException:
            connection.close()
            raise
        self._damaged, self._identity = None, self._identity_on_disk()
        with self._read_lock:
            self._connection, self._reader = connection, reader
        self.generation += 1
        self._ballast.restore(self._free_bytes_min)

    def _usable(self) -> sqlite3.Connection:
        """Open the file; one that is damaged as a whole is replaced by what it still holds."""
        if salvage.unfinished(self._folder):
            return self._carry_over("found damaged before, and not carried over to the end")
        if self._damaged is not None and self._damaged == self._identity_on_disk():
            return self._carry_over("found damaged while in use")
        try:
            return opening.open_file(self._path)
        except sqlite3.DatabaseError as error:
            if not (opening.is_corrupt(error) or opening.is_nonsense(error)):
                raise
            return self._carry_over(str(error))

    def _begun(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Begin with an opened file, or with what is left of it when that shows its damage."""
        try:
            self._begin(connection)
        except BaseException as error:
            connection.close()
            if not opening.is_corrupt(error):
                raise
            connection = self._carry_over(str(error))
            self._begin(connection)
        return connection

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Bring an opened file up to date: its end, its lists, its identity."""
        connection.execute("SELECT log_id FROM logs").fetchall()  # readable, or nothing is written
        integrity.check_totals(connection)
        try:
            self._list_unsynced(connection)
        except (RecordDamaged, sqlite3.Error, UnicodeDecodeError) as error:
            in_lists = isinstance(error, RecordDamaged | sqlite3.IntegrityError)
            if not in_lists and not opening.is_undecodable(error):
                raise
            connection.execute("BEGIN IMMEDIATE")
            self._upkeep.mend(connection)
            connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._upkeep.adopt(connection)
            lost = opening.note_end(connection, self._high_water.read())
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise
        opening.identify(connection, self._path, self._ids(), renew=lost)

    def _carry_over(self, cause: str) -> sqlite3.Connection:
        """Move a file that can't be used aside, and what it still holds into a new one."""
        moved = salvage.move_aside(self._folder)
        connection = opening.open_file(self._path)
        try:
            salvage.carry_over(connection, moved, cause, self._upkeep.now())
            connection.execute("BEGIN IMMEDIATE")
            salvage.name_logs(connection, self._high_water.read(), self._ids)
            self._upkeep.relist(connection)
            connection.execute("COMMIT")
            salvage.finish(moved)
        except BaseException:
            connection.close()
            raise
        return connection

    def _give_up(self) -> None:
        """Close both connections."""
        with self._read_lock:
            opened = self._let_go()
        close_all(opened)

    def _is_found(self) -> bool:
        """Tell whether the folder still leads to the open file: nothing is put where it is lost."""
        return self._identity_on_disk() == self._identity

    def _follow(self, what: str) -> None:
        """Bring what was committed to a file that was moved away back to where it is looked for.

        Raises CommitUnknown when another file took its place: then both are kept.
        """
        assert self._connection is not None
        if self._identity_on_disk() is None:
            target, rescued = self._path, self._path.with_suffix(".rescued")
        else:
            target = salvage.free_folder(self._folder) / opening.FILE_NAME
            rescued = target
        opening.copy(self._connection, rescued)
        self._give_up()
        if target != rescued:
            for suffix in ("-wal", "-shm"):  # they belong to the file that is gone
                with suppress(FileNotFoundError):
                    os.unlink(f"{self._path}{suffix}")
            os.rename(rescued, target)
        opening.sync_folder(target.parent)
        if target != self._path:
            reason = f"another file stands in its place; what was here is in {target}"
            raise CommitUnknown(what, reason)

    def _list_unsynced(self, connection: sqlite3.Connection) -> None:
        """List in a commit without a sync: what it makes can be made again from what is durable."""
        if not unlisted(connection):
            return
        with self._unsynced(connection):
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._upkeep.list_new(connection)
                connection.execute("COMMIT")
            except BaseException as error:
                self._undo(connection, error)
                raise

    @contextmanager
    def _unsynced(self, connection: sqlite3.Connection) -> Iterator[None]:
        """Commit without a sync inside the block; the next commit after it syncs this one too."""
        (durable,) = connection.execute("PRAGMA synchronous").fetchone()
        connection.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            with suppress(sqlite3.ProgrammingError):  # given up meanwhile: then there is no next
                connection.execute(f"PRAGMA synchronous = {durable}")

    def _undo(self, connection: sqlite3.Connection, error: BaseException) -> None:
        with suppress(sqlite3.Error):
            connection.rollback()
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            self._ballast.release()  # the next attempt, or the drain, has that much room
