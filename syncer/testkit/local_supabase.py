"""A Supabase data plane on this machine: Postgres, PostgREST, gateway. No Docker, no account.

    with LocalSupabase.start() as stack:
        client = supabase.create_client(stack.url, stack.secret_key)

State lives in a folder: ports and keys survive `stop` and `start`. Everything binds 127.0.0.1. What
hosted projects load and this doesn't: `safeupdate`, the auth server, storage, realtime.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import jwt
import psycopg

from local_store.clock import Clock, SystemClock
from local_store.ops import user_uuid
from syncer.testkit.api_process import free_port
from syncer.testkit.postgres import Cluster
from syncer.testkit.postgrest import find_postgrest
from syncer.testkit.processes import PidFile, spawn, watch_parent

READY_TIMEOUT_S = 20.0
STARTS_MAX = 3  # a port that was free a moment ago may be taken by now
KEY_LIFETIME_S = 10 * 365 * 24 * 3600

_ROLES = """
do $$ begin
  if not exists (select 1 from pg_roles where rolname = 'anon') then
    create role anon nologin noinherit;
    create role authenticated nologin noinherit;
    create role service_role nologin noinherit bypassrls;
    create role authenticator login noinherit;
    grant anon, authenticated, service_role to authenticator;
  end if;
end $$;
create schema if not exists auth;
create schema if not exists extensions;
grant usage on schema auth, public to anon, authenticated, service_role;
create table if not exists auth.users (id uuid primary key, email text);
create or replace function auth.uid() returns uuid language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
$$;
create or replace function auth.role() returns text language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.role', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role')
$$;
create or replace function auth.jwt() returns jsonb language sql stable as $$
  select coalesce(nullif(current_setting('request.jwt.claims', true), ''), '{}')::jsonb
$$;
-- As hosted projects since October 2026: new tables and functions grant nothing to the API's roles.
alter default privileges in schema public revoke execute on functions from public;
alter role authenticator set statement_timeout = '8s';
"""


@dataclass(frozen=True, slots=True)
class _State:
    """What a stack's folder remembers."""

    gateway_port: int
    rest_port: int
    postgres_port: int
    password: str
    jwt_secret: str
    anon_key: str
    secret_key: str


class LocalSupabase:
    """One stack. `start` brings it up, `stop` leaves no process; also a context manager."""

    def __init__(self, folder: Path, state: _State, clock: Clock, temporary: bool) -> None:
        self.folder = folder
        self.anon_key = state.anon_key
        self.secret_key = state.secret_key
        self.jwt_secret = state.jwt_secret
        self.url = f"http://127.0.0.1:{state.gateway_port}"
        self.rest_url = f"http://127.0.0.1:{state.rest_port}"
        self._state = state
        self._clock = clock
        self._temporary = temporary
        self._cluster = Cluster(folder, state.postgres_port, state.password, clock)
        self._rest = PidFile(folder / "postgrest.pid", clock)
        self._gateway = PidFile(folder / "gateway.pid", clock)
        self.database_url = self._cluster.url
        self._parent_pipe: int | None = None

    @classmethod
    def start(
        cls,
        folder: Path | None = None,
        *,
        migrated: bool = True,
        reap_with_parent: bool = True,
        clock: Clock | None = None,
    ) -> Self:
        """Bring up a stack in `folder` (None: a temporary one, removed by `stop`).

        A folder that a crash left behind is cleaned up first. With `reap_with_parent` the stack
        ends when this process does, even by SIGKILL. Raises RuntimeError with a log's tail.
        """
        clock = clock or SystemClock()
        temporary = folder is None
        root = Path(tempfile.mkdtemp(prefix="syncer-supabase-")) if folder is None else folder
        root.mkdir(parents=True, exist_ok=True)
        # Postgres runs as another user when we are root, and must be able to walk in; what is
        # secret in here has a mode of its own.
        root.chmod(0o755)
        for attempt in range(STARTS_MAX):
            stack = cls(root, _load_or_create(root, fresh=attempt > 0), clock, temporary)
            stack._end_processes()
            if reap_with_parent:
                stack._parent_pipe = watch_parent(root)
            try:
                stack._bring_up(migrated)
                return stack
            except BaseException as error:
                stack.stop()
                if not isinstance(error, _PortTaken) or attempt + 1 == STARTS_MAX:
                    raise
                root.mkdir(parents=True, exist_ok=True)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @classmethod
    def attach(cls, folder: Path, clock: Clock | None = None) -> Self:
        """Return the stack whose state is in `folder`; raises FileNotFoundError without one."""
        state = _State(**json.loads((folder / "state.json").read_text()))
        return cls(folder, state, clock or SystemClock(), temporary=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- what clients need --

    def env(self) -> dict[str, str]:
        """Return the settings that point the product at this stack."""
        return {
            "SUPABASE_URL": self.url,
            "SUPABASE_ANON_KEY": self.anon_key,
            "SUPABASE_SECRET_KEY": self.secret_key,
            "SUPABASE_JWT_SECRET": self.jwt_secret,
            "DATABASE_URL": self.database_url,
        }

    def user_token(self, user_id: str, **claims: Any) -> str:
        """Return an access token as Supabase Auth would issue it; `claims` win."""
        now_s = int(self._clock.now().timestamp())
        payload = {
            "role": "authenticated",
            "aud": "authenticated",
            "sub": user_uuid(user_id),
            "iss": f"{self.url}/auth/v1",
            "iat": now_s,
            "exp": now_s + 3600,
            **claims,
        }
        return jwt.encode(payload, self.jwt_secret, algorithm="HS256")

    def pids(self) -> list[int]:
        """Return the process ids of what runs."""
        found = (self._cluster.pid, self._rest.pid(), self._gateway.pid())
        return [pid for pid in found if pid is not None]

    # -- faults --

    def stop_postgres(self) -> None:
        """Stop Postgres as a crash does."""
        self._cluster.stop()

    def start_postgres(self) -> None:
        """Start Postgres again on its data."""
        self._cluster.start()

    def stop_postgrest(self) -> None:
        """Stop PostgREST; the gateway stays and answers as hosted gateways do."""
        self._rest.end()

    def start_postgrest(self) -> None:
        """Start PostgREST and wait until it serves the schema."""
        if self._rest.pid() is None:
            self._rest.write(self._spawn_postgrest())
        self._wait(f"{self.rest_url}/", self._rest, "postgrest.log")

    def stop_data_plane(self) -> None:
        """Take Supabase down: PostgREST and Postgres."""
        self.stop_postgrest()
        self.stop_postgres()

    def start_data_plane(self) -> None:
        """Bring Supabase back."""
        self.start_postgres()
        self.start_postgrest()

    def rotate_keys(self) -> None:
        """Give the project another JWT secret and API keys, as its owner does after a leak.

        The old ones and all users' tokens are refused from now on; ask `secret_key`, `anon_key` and
        `user_token` again.
        """
        secret = secrets.token_hex(32)
        self.jwt_secret = secret
        self.anon_key = _api_key("anon", secret)
        self.secret_key = _api_key("service_role", secret)
        self._state = replace(
            self._state, jwt_secret=secret, anon_key=self.anon_key, secret_key=self.secret_key
        )
        _write_private(self.folder / "state.json", json.dumps(asdict(self._state)))
        self._gateway.end()
        self.stop_postgrest()
        self.start_postgrest()
        self._start_gateway()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Supabase is down inside the block and up again after it, however the block ends."""
        self.stop_data_plane()
        try:
            yield
        finally:
            self.start_data_plane()

    def stop(self) -> None:
        """End every process of the stack; a temporary folder goes too."""
        self._end_processes()
        if self._parent_pipe is not None:
            os.close(self._parent_pipe)
            self._parent_pipe = None
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """End it and delete its data, also the part that stands elsewhere when root runs it."""
        self.stop()
        self._cluster.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- bringing up --

    def _bring_up(self, migrated: bool) -> None:
        postgrest = find_postgrest()
        self._cluster.create()
        self._cluster.start()
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(_ROLES)
            # The statement takes no parameters; the password is hex that we made ourselves.
            connection.execute(f"alter role authenticator password '{self._state.password}'")
        if migrated:
            from syncer.migrate import migrate

            migrate(self.database_url)
        (self.folder / "postgrest.path").write_text(str(postgrest))
        self.start_postgrest()
        self._start_gateway()

    def _start_gateway(self) -> None:
        self._gateway.write(self._spawn_gateway())
        self._wait(f"{self.url}/auth/v1/health", self._gateway, "gateway.log")

    def _spawn_postgrest(self) -> int:
        database = self.database_url.replace("//postgres:", "//authenticator:", 1)
        settings = {
            "PGRST_DB_URI": database,
            "PGRST_DB_SCHEMAS": "public",
            "PGRST_DB_ANON_ROLE": "anon",
            "PGRST_DB_POOL": "15",
            "PGRST_DB_POOL_ACQUISITION_TIMEOUT": "5",
            "PGRST_DB_CHANNEL_ENABLED": "true",
            "PGRST_DB_MAX_ROWS": "1000",
            "PGRST_JWT_SECRET": self.jwt_secret,
            "PGRST_SERVER_HOST": "127.0.0.1",
            "PGRST_SERVER_PORT": str(self._state.rest_port),
            "PGRST_LOG_LEVEL": "error",
        }
        binary = (self.folder / "postgrest.path").read_text()
        environment = {"PATH": os.environ.get("PATH", ""), **settings}
        return spawn([binary], log_file=self.folder / "postgrest.log", env=environment)

    def _spawn_gateway(self) -> int:
        keys = self.folder / "keys.json"
        _write_private(keys, json.dumps([self.anon_key, self.secret_key]))
        command = [sys.executable, "-m", "syncer.testkit.gateway"]
        command += ["--port", str(self._state.gateway_port), "--rest", self.rest_url]
        command += ["--keys", str(keys)]
        return spawn(command, log_file=self.folder / "gateway.log", env=dict(os.environ))

    def _wait(self, url: str, process: PidFile, log_name: str) -> None:
        end = self._clock.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                if httpx.get(url, timeout=2.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if process.pid() is None or self._clock.monotonic() > end:
                log = (self.folder / log_name).read_text(errors="replace")
                kind = _PortTaken if "in use" in log else RuntimeError
                raise kind(f"{url} did not answer; {log_name} ends:\n{log[-1_500:]}")
            self._clock.sleep(0.03)

    def _end_processes(self) -> None:
        self._gateway.end()
        self._rest.end()
        self._cluster.stop()


class _PortTaken(RuntimeError):
    """Somebody else took the port meanwhile; another one will do."""


def _load_or_create(folder: Path, *, fresh: bool) -> _State:
    path = folder / "state.json"
    known = json.loads(path.read_text()) if path.exists() else None
    if known is not None and not fresh:
        return _State(**known)
    secret = known["jwt_secret"] if known else secrets.token_hex(32)
    state = _State(
        gateway_port=free_port(),
        rest_port=free_port(),
        postgres_port=free_port(),
        password=known["password"] if known else secrets.token_hex(16),
        jwt_secret=secret,
        anon_key=_api_key("anon", secret),
        secret_key=_api_key("service_role", secret),
    )
    _write_private(path, json.dumps(asdict(state)))
    return state


def _api_key(role: str, secret: str) -> str:
    expires = int(SystemClock().now().timestamp()) + KEY_LIFETIME_S
    payload = {"iss": "supabase", "role": role, "exp": expires}
    return jwt.encode(payload, secret, algorithm="HS256")


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _stop_when_parent_ends(folder: Path) -> None:
    """Wait for the end of stdin, which only the parent holds open, then stop what still runs."""
    sys.stdin.buffer.read()
    try:
        stack = LocalSupabase.attach(folder)
    except FileNotFoundError:
        return  # stopped in the ordinary way
    stack.stop()
    if folder.name.startswith("syncer-supabase-"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _stop_when_parent_ends(Path(sys.argv[1]))
