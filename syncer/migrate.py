"""Apply the SQL migrations in order, each in its own transaction; running twice is harmless.

Every file is re-runnable by itself, so a file that changed since it was applied is applied again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from syncer.errors import NotAuthorized, RemoteUnavailable, SettingsError, SyncError

CONNECT_TIMEOUT_S = 10
LOCK_KEY = 0x73796E6372  # "syncr": the advisory lock that makes simultaneous runs queue

_VERSION_TABLE = """
create schema if not exists sync;
create table if not exists sync.schema_migrations (
  name text primary key,
  sha256 text not null,
  applied_at timestamptz not null default clock_timestamp()
);
alter table sync.schema_migrations enable row level security;
revoke all on sync.schema_migrations from public;
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file and what tells whether it changed."""

    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """The digest of the file's text."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations_folder() -> Path:
    """Return the folder of the SQL files: installed in the package, else beside it."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def load_migrations() -> list[Migration]:
    """Return the migrations in the order of their numbers."""
    return [
        Migration(path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(migrations_folder().glob("[0-9][0-9][0-9]_*.sql"))
    ]


def migrate(database_url: str, *, dry_run: bool = False) -> list[str]:
    """Bring the database up to date; returns the names applied (`dry_run`: to be applied).

    Raises SettingsError for a malformed URL, RemoteUnavailable when the server can't be reached,
    NotAuthorized when the role may not; then the migrations before the failing one are in place.
    """
    with _connect(database_url) as connection:
        try:
            return _migrate(connection, dry_run)
        except psycopg.errors.InsufficientPrivilege as error:
            raise NotAuthorized(
                f"the role of DATABASE_URL may not migrate ({error.diag.message_primary})",
                hint="use the project's postgres role",
            ) from None
        except psycopg.OperationalError as error:
            raise RemoteUnavailable(
                f"the connection to Postgres broke ({type(error).__name__})", hint="run it again"
            ) from None


def _migrate(connection: psycopg.Connection[Any], dry_run: bool) -> list[str]:
    if dry_run:
        return [item.name for item in load_migrations() if _is_due(connection, item)]
    applied = []
    with connection.transaction():
        _lock(connection)
        connection.execute(_VERSION_TABLE)
    for item in load_migrations():
        # Looked up under the lock: a simultaneous run may just have applied it.
        with connection.transaction():
            _lock(connection)
            if _is_due(connection, item):
                _apply(connection, item)
                applied.append(item.name)
    return applied


def _lock(connection: psycopg.Connection[Any]) -> None:
    """Make simultaneous runs queue until the transaction ends.

    A lock of the session would stay behind on a pooler that shares connections by transaction.
    """
    connection.execute("select pg_advisory_xact_lock(%s)", (LOCK_KEY,))


def _is_due(connection: psycopg.Connection[Any], item: Migration) -> bool:
    exists = connection.execute("select to_regclass('sync.schema_migrations')").fetchone()
    if exists is None or exists[0] is None:
        return True
    found = connection.execute(
        "select sha256 from sync.schema_migrations where name = %s", (item.name,)
    ).fetchone()
    return found is None or found[0] != item.sha256


def _apply(connection: psycopg.Connection[Any], item: Migration) -> None:
    try:
        connection.execute(item.sql.encode())
    except (psycopg.errors.InsufficientPrivilege, psycopg.OperationalError):
        raise
    except psycopg.DatabaseError as error:
        raise SyncError(
            f"migration {item.name} failed: {error.diag.sqlstate} {error.diag.message_primary}",
            hint="nothing of it was applied; the ones before it are in place",
        ) from None
    connection.execute(
        "insert into sync.schema_migrations (name, sha256) values (%s, %s)"
        " on conflict (name) do update set sha256 = excluded.sha256,"
        " applied_at = clock_timestamp()",
        (item.name, item.sha256),
    )


def _connect(database_url: str) -> psycopg.Connection[Any]:
    """Connect; no error repeats the URL, which carries the password."""
    if not database_url.startswith(("postgresql://", "postgres://")):
        raise SettingsError(
            "DATABASE_URL",
            "is not a postgresql:// URL",
            hint="copy the connection string from the project's dashboard",
        )
    try:
        return psycopg.connect(
            database_url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            prepare_threshold=None,  # prepared statements don't survive a transaction pooler
        )
    except psycopg.ProgrammingError:
        raise SettingsError(
            "DATABASE_URL", "can't be read", hint="percent-encode special characters in it"
        ) from None
    except psycopg.OperationalError as error:
        if "authentication failed" in str(error):
            raise NotAuthorized(
                "Postgres refused the password of DATABASE_URL", hint="reset it in the dashboard"
            ) from None
        raise RemoteUnavailable(
            "Postgres can't be reached at the host of DATABASE_URL", hint="check host and port"
        ) from None
