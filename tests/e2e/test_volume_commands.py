"""`syncer worker --volume-dir` and `syncer replay --volume-dir`, as an operator runs them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local_store import Insert, LocalStore, Update
from local_store.clock import new_id
from local_store.segments import SegmentKey
from syncer.remote import SupabaseRemote
from syncer.sessions.tables import SESSION_TABLES
from syncer.shipper import Shipper
from syncer.testkit.api_process import free_port
from syncer.volume import Volume

SECRET = "the secret of these containers"
USER, OTHER = "github:42", "github:43"


class Container:
    """A container's disk, shipped to a folder that outlives it."""

    def __init__(self, root: Path) -> None:
        self.volume = root / "volume"
        self.volume.mkdir(exist_ok=True)
        self.disk = root / new_id()
        self.store = LocalStore.open(self.disk, tables=SESSION_TABLES)
        self._shipper = Shipper(
            self.store,
            Volume(self.volume),
            SegmentKey.derive(SECRET),
            environment="127.0.0.1",
        )

    def session(self, user: str = USER, **values: Any) -> str:
        row_id = new_id()
        self.store.write([Insert("sessions", {"id": row_id, **values})], user_id=user)
        return row_id

    def ship(self) -> None:
        assert self._shipper.ship().state == "committed"

    def die(self) -> None:
        self.store.close()
        shutil.rmtree(self.disk)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


@pytest.fixture
def env(fresh_supabase, container: Container) -> dict[str, str]:
    return {
        **fresh_supabase.env(),
        "SYNCER_VOLUME_DIR": str(container.volume),
        "SYNCER_SEGMENT_KEY": SECRET,
        "SYNCER_ADOPT_AFTER_S": "0",
    }


@pytest.fixture
def sql(fresh_supabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_supabase.database_url, autocommit=True) as connection:
        yield connection


def statuses(sql: psycopg.Connection[Any]) -> list[str]:
    found = sql.execute("select status from sessions where user_id <> %s order by 1", [CANARY])
    return [row[0] for row in found.fetchall()]


CANARY = "00000000-0000-4000-8000-0000000000c1"


def test_one_pass_of_the_worker_delivers_a_dead_containers_writes(syncer, env, container, sql):
    row_id = container.session()
    container.store.write([Update("sessions", row_id, {"status": "finalized"})], user_id=USER)
    container.ship()
    container.die()
    ran = syncer("worker", "--once", "--json", env=env)
    assert ran.code == 0, ran.err
    adoption = ran.document["adoption"]
    assert (adoption["adopted"], adoption["collected"], adoption["remaining"]) == (2, 1, 0)
    assert (ran.document["leased"], ran.document["leaks"]) == (True, [])
    assert statuses(sql) == ["finalized"]
    audited = syncer("audit", "--json", env=env)
    assert (audited.code, audited.document["total"]["applied"]) == (0, 2)


def test_a_damaged_segment_is_trouble_that_is_named(syncer, env, container, sql):
    container.session()
    container.ship()
    container.session()
    container.ship()
    first = sorted(container.volume.rglob("*.seg"))[0]
    first.write_bytes(first.read_bytes()[:-5])
    ran = syncer("worker", "--once", "--json", env=env)
    assert ran.code == 1
    assert len(ran.document["adoption"]["quarantined"]) == 1
    assert statuses(sql) == ["active"]


def test_replay_delivers_however_young_and_says_what_it_did(syncer, env, container, sql):
    container.session()
    container.session(OTHER)
    container.ship()
    container.die()
    volume = ("--volume-dir", str(container.volume))
    shown = syncer("replay", *volume, "--dry-run", "--json", env=env)
    assert (shown.code, len(shown.document)) == (0, 2)
    assert statuses(sql) == []
    mine = syncer("replay", *volume, "--user", USER, "--json", env=env)
    assert (mine.document["selected"], mine.document["applied"]) == (1, 1)
    assert statuses(sql) == ["active"]
    ran = syncer("replay", *volume, "--json", env=env)
    assert ran.code == 0, ran.err
    assert ran.document["remaining"] == 0
    assert statuses(sql) == ["active", "active"]
    assert not list(container.volume.rglob("*.seg"))
    again = syncer("replay", *volume, "--json", env=env)
    assert (again.code, again.document["selected"]) == (0, 0)


def test_after_a_restore_settled_segments_are_sent_again(syncer, env, container, sql):
    container.session()
    container.ship()
    segment = next(container.volume.rglob("*.seg"))
    kept = segment.read_bytes()
    volume = ("--volume-dir", str(container.volume))
    assert syncer("replay", *volume, "--json", env=env).document["applied"] == 1
    segment.parent.mkdir(exist_ok=True)
    segment.write_bytes(kept)
    ran = syncer("replay", *volume, "--settled", "--json", env=env)
    assert (ran.code, ran.document["duplicate"]) == (0, 1)
    sql.execute("delete from sync.ledger")
    sql.execute("delete from sessions")
    sql.execute("delete from sync.tombstones")
    segment.parent.mkdir(exist_ok=True)
    segment.write_bytes(kept)
    ran = syncer("replay", *volume, "--settled", "--json", env=env)
    assert (ran.code, ran.document["applied"]) == (0, 1)
    assert statuses(sql) == ["active"]


def test_an_unreachable_project_and_missing_settings_are_told_apart(syncer, env, container):
    container.session()
    container.ship()
    volume = ("--volume-dir", str(container.volume))
    away = {**env, "SUPABASE_URL": f"http://127.0.0.1:{free_port()}"}
    assert syncer("worker", "--once", "--json", env=away).code == 3
    assert syncer("replay", *volume, "--json", env=away).code == 3
    keyless = {name: value for name, value in env.items() if name != "SYNCER_SEGMENT_KEY"}
    for command in (("worker", "--once"), ("replay", *volume)):
        ran = syncer(*command, env=keyless)
        assert ran.code == 2
        assert "SYNCER_SEGMENT_KEY" in ran.err
        assert SECRET not in ran.err
    short = {**env, "SYNCER_SEGMENT_KEY": "tiny"}
    ran = syncer("worker", "--once", env=short)
    assert (ran.code, "16 bytes" in ran.err, "tiny" in ran.err) == (2, True, False)
    ran = syncer("replay", "--volume-dir", "/no/such/folder", env=env)
    assert (ran.code, "SYNCER_VOLUME_DIR" in ran.err) == (2, True)


def test_a_replay_waits_its_turn_behind_a_worker(syncer, env, container, fresh_supabase):
    container.session()
    container.ship()
    remote = SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key)
    assert remote.lease("worker", "somebody", 60.0)
    ran = syncer("replay", "--volume-dir", str(container.volume), "--json", env=env)
    assert ran.code == 2
    assert "worker" in ran.err
    remote.lease("worker", "somebody", 0)
    remote.close()
