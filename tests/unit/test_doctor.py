"""The doctor's local half on real files, its judgements on values, and its silence on secrets."""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from local_store import Column, Insert, LocalStore, TableSpec
from local_store.ops import Row
from syncer.core.diagnosis import Check, judge_clock, judge_key, key_role
from syncer.doctor import DoctorReport, examine
from syncer.doctor_local import judge_durability, judge_space, judge_sqlite
from syncer.errors import (
    NotAuthorized,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    SettingsError,
    SyncError,
)
from syncer.settings import Settings

NOTES = TableSpec("notes", {"id": Column("uuid"), "text": Column("text")})
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECRETS = {
    "supabase_secret_key": "sb_secret_9d1f7c",
    "supabase_anon_key": "sb_publishable_77ab01",
    "supabase_jwt_secret": "jwt-5e55e7",
    "database_url": "postgresql://postgres:pa55w0rd@db.example/postgres",
}


class Answering:
    """A server that answers with what it was given, or raises it."""

    def __init__(self, answer: Row | SyncError) -> None:
        self._answer = answer

    def doctor(self) -> Row:
        if isinstance(self._answer, SyncError):
            raise self._answer
        return self._answer


def look(folder: Path, settings: Settings | SettingsError | None = None, **given) -> DoctorReport:
    given = {"environ": {}, **given}
    return examine(settings or Settings(), folder, [NOTES], **given)


def named(report: DoctorReport, name: str) -> Check:
    [found] = [check for check in report.checks if check.name == name]
    return found


def token(role: str) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"role": role}).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{claims}.c2lnbmVk"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "buffer"
    with LocalStore.open(path, tables=[NOTES]) as store:
        store.write([Insert("notes", {"text": "hello"})], user_id="ana")
    return path


# -- the whole report --


def test_a_sound_folder_passes_and_the_server_is_only_missing(folder):
    report = look(folder)
    assert report.ok
    assert [check.name for check in report.checks if not check.ok] == ["server.configured"]
    assert named(report, "server.configured").severity == "warning"


def test_the_report_is_the_document_of_the_command(folder):
    document = json.loads(json.dumps(look(folder).to_json()))
    assert set(document) == {"ok", "checks"}
    for check in document["checks"]:
        assert set(check) == {"name", "ok", "severity", "detail", "remedy"}
        assert check["severity"] in ("error", "warning", "info")
        assert bool(check["remedy"]) == (not check["ok"])


def test_names_of_checks_are_unique(folder):
    names = [check.name for check in look(folder).checks]
    assert len(names) == len(set(names))


def test_looking_leaves_the_buffer_as_it_was(folder):
    before = (folder / "buffer.db").read_bytes()
    look(folder)
    assert (folder / "buffer.db").read_bytes() == before
    # A reader of a WAL database makes these two when nobody has it open; both may be empty.
    left = {path.name for path in folder.iterdir()} - {"buffer.db-shm", "buffer.db-wal"}
    assert left == {"buffer.db", "buffer.lock", "acknowledged", "ballast"}


def test_what_the_buffer_set_aside_is_an_error_with_what_to_do(folder):
    (folder / "buffer.db").write_bytes(b"not a database at all" * 300)
    with LocalStore.open(folder, tables=[NOTES]) as store:
        store.write([Insert("notes", {"text": "goes on"})], user_id="ana")
    report = look(folder)
    found = named(report, "buffer.damage")
    assert not report.ok
    assert "1 files in" in found.detail
    assert "1 acknowledged transactions missing" in found.detail
    assert "syncer audit" in found.remedy


def test_a_store_in_use_is_examined_and_goes_on(folder):
    with LocalStore.open(folder, tables=[NOTES]) as store:
        assert look(folder).ok
        store.write([Insert("notes", {"text": "more"})], user_id="ana")
        assert len(store.select("notes", user_id="ana")) == 2


# -- settings --


def test_each_setting_is_told_with_its_default_and_unit(tmp_path):
    report = look(tmp_path, Settings(flush_interval_s=7))
    assert named(report, "setting.SYNCER_FLUSH_INTERVAL_S").detail == "7.0 (default 2.0, in s)"
    assert "in bytes" in named(report, "setting.SYNCER_BUFFER_BYTES_MAX").detail
    assert named(report, "setting.SUPABASE_URL").detail == "not set (default not set)"
    told = {check.name for check in report.checks if check.name.startswith("setting.")}
    assert len(told) == len(Settings.model_fields)


def test_no_secret_is_part_of_any_answer(tmp_path):
    settings = Settings(supabase_url="https://abc.supabase.co", **SECRETS)
    report = look(tmp_path, settings, remote=Answering(NotAuthorized("refused")))
    text = json.dumps(report.to_json())
    assert not [value for value in SECRETS.values() if value in text]
    assert "pa55w0rd" not in text
    for name in SECRETS:
        assert named(report, f"setting.{name.upper()}").detail == "set"


def test_a_malformed_setting_is_an_error_and_the_rest_is_examined(folder, monkeypatch):
    monkeypatch.setenv("SYNCER_FLUSH_INTERVAL_S", "soon")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    report = look(folder, caught.value)
    found = named(report, "setting.SYNCER_FLUSH_INTERVAL_S")
    assert (found.ok, found.severity) == (False, "error")
    assert "soon" not in found.detail
    assert named(report, "buffer.journal").ok
    assert not report.ok


def test_a_misspelt_setting_is_a_warning(tmp_path):
    report = look(tmp_path, environ={"SYNCER_FLUSH_INTERVL_S": "7", "SYNCER_PORT": "1"})
    assert named(report, "setting.SYNCER_FLUSH_INTERVL_S").severity == "warning"
    assert named(report, "setting.SYNCER_PORT").ok


# -- this machine --


def test_a_folder_that_is_made_later_is_fine(tmp_path):
    found = named(look(tmp_path / "a" / "b"), "folder")
    assert found.ok
    assert "first start" in found.detail


@pytest.mark.parametrize("place", ["/proc/self", "/proc/self/buffer", "a file"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, place):
    if place == "a file":
        (tmp_path / "file").write_text("")
        place = str(tmp_path / "file")
    found = named(look(Path(place)), "folder")
    assert (found.ok, found.severity) == (False, "error")


@pytest.mark.parametrize(("name", "path"), [("folder.mode", "."), ("buffer.mode", "buffer.db")])
def test_what_others_may_read_is_a_warning(folder, name, path):
    (folder / path).chmod(0o755)
    found = named(look(folder), name)
    assert (found.ok, found.severity) == (False, "warning")
    assert "chmod" in found.remedy


def test_a_buffer_that_may_outgrow_its_disk_is_a_warning(folder):
    found = named(look(folder, Settings(buffer_bytes_max=2**60)), "space")
    assert (found.ok, found.severity) == (False, "warning")


def test_a_disk_that_is_nearly_full_is_an_error():
    assert judge_space(1024, 0, 2**20).severity == "error"
    assert judge_space(2**30, 2**30, 2**31).ok


def test_a_buffer_that_left_wal_mode_is_an_error(folder):
    with closing(sqlite3.connect(folder / "buffer.db")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    found = named(look(folder), "buffer.journal")
    assert (found.ok, found.severity) == (False, "error")


def test_a_buffer_that_is_no_database_is_an_error(folder):
    (folder / "buffer.db").write_bytes(b"not a database at all" * 100)
    found = named(look(folder), "buffer.journal")
    assert (found.ok, found.severity) == (False, "error")


@pytest.mark.parametrize(("journal", "synchronous"), [("delete", 2), ("wal", 1), ("wal", 0)])
def test_modes_that_a_power_loss_defeats_are_an_error(journal, synchronous):
    assert judge_durability(journal, synchronous).severity == "error"
    assert judge_durability("wal", 2).ok


def test_the_version_of_sqlite_is_judged():
    assert judge_sqlite((3, 36, 0)).severity == "error"
    assert "lock" in judge_sqlite((3, 40, 1)).detail
    assert "lock" not in judge_sqlite((3, 51, 3)).detail


# -- the key, the clock, the line --


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("sb_secret_x", "service_role"),
        ("sb_publishable_x", "anon"),
        (token("service_role"), "service_role"),
        (token("anon"), "anon"),
        ("a.b.c", "unknown"),
        ("a.!.c", "unknown"),
        ("eyJ.W10.c", "unknown"),
        ("whatever", "unknown"),
    ],
)
def test_a_key_tells_its_role(key, role):
    assert key_role(key) == role
    assert judge_key(key).ok == (role != "anon")


def test_an_anon_key_in_the_secrets_place_is_named_as_such(tmp_path):
    settings = Settings(supabase_secret_key=token("anon"))
    found = named(look(tmp_path, settings), "server.key")
    assert (found.ok, found.severity) == (False, "error")
    assert "anon" in found.detail


@pytest.mark.parametrize(
    ("skew_s", "severity"),
    [(0, "info"), (-4, "info"), (6, "warning"), (-6, "warning"), (301, "error"), (-301, "error")],
)
def test_the_clock_is_compared_with_the_servers(skew_s, severity):
    server = NOON + timedelta(seconds=skew_s)
    assert judge_clock({"now": server.isoformat()}, NOON, NOON).severity == severity


def test_a_slow_call_is_no_skew():
    middle = (NOON + timedelta(seconds=20)).isoformat()
    assert judge_clock({"now": middle}, NOON, NOON + timedelta(seconds=40)).ok


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RemoteUnavailable("Supabase can't be reached"), "server.reachable"),
        (ReplyTimedOut("no reply"), "server.reachable"),
        (NotAuthorized("Supabase answered 401"), "server.authorized"),
        (ProtocolMismatch("Supabase answered 404 (PGRST202)"), "server.functions"),
    ],
)
def test_a_server_that_does_not_answer_is_one_error_and_no_other_check(tmp_path, error, name):
    report = look(tmp_path, remote=Answering(error))
    [found] = [check for check in report.checks if check.name.startswith(("server", "table"))]
    assert (found.name, found.severity) == (name, "error")
    assert found.remedy
    assert not report.ok


@pytest.mark.parametrize("answer", [{}, {"protocol": 1, "now": "?"}, {"protocol": 2}])
def test_an_answer_of_another_shape_is_an_error(tmp_path, answer):
    report = look(tmp_path, remote=Answering(answer))
    [found] = [check for check in report.checks if not check.ok]
    assert found.name in ("server.facts", "server.protocol")
    assert found.severity == "error"
