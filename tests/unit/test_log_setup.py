"""What is written to the log, and what never is."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from local_store import InvalidWrite
from syncer.errors import RemoteUnavailable, SyncError
from syncer.remote import SupabaseRemote
from syncer.service.log_setup import HIDDEN, log_uncaught, secrets_of, set_up_logging
from syncer.settings import Settings
from tests.unit.key_server import key_server

PLAIN = "a-secret-that-looks-like-nothing"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoiY2FuYXJ5In0.c2lnbmF0dXJl"
WORDS = "what the user wrote"
NOISY = ("httpx", "httpcore", "hpack", "h11", "h2", "apscheduler")


@pytest.fixture
def logged() -> Iterator[Any]:
    """Set logging up as a process does, at DEBUG, and read what was written; put back after."""
    written = io.StringIO()
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in NOISY}
    handlers, level = root.handlers[:], root.level
    hooks = threading.excepthook, sys.excepthook
    with contextlib.redirect_stderr(written):
        set_up_logging(json=True, level=logging.DEBUG, secrets=[PLAIN])
    yield written.getvalue
    threading.excepthook, sys.excepthook = hooks
    root.handlers[:], root.level = handlers, level
    for name, known in levels.items():
        logging.getLogger(name).setLevel(known)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "value",
    [
        JWT,
        "sb_secret_abc123DEF",
        "postgresql://postgres:hunter22@db:5432/x",
        PLAIN,
        f"before {PLAIN} after",
        PLAIN.encode(),
        {"deep": [{"in": (JWT, PLAIN)}]},
        {PLAIN: 1},
        ValueError(WORDS),
        RemoteUnavailable(f"refused {JWT}"),
    ],
)
def test_a_secret_is_taken_out_however_it_comes(logged: Any, value: Any) -> None:
    structlog.get_logger("x").info("event", told=value, more="kept")
    logging.getLogger("library").debug("told %s", value)
    text = logged()
    for secret in (JWT, "sb_secret_abc", "hunter22", PLAIN):
        assert secret not in text
    assert json.loads(text.splitlines()[0])["more"] == "kept"


@pytest.mark.parametrize(
    "name", ["authorization", "Authorization", "apikey", "jwt_secret", "password", "access_token"]
)
def test_a_field_whose_name_tells_is_hidden_whatever_is_in_it(logged: Any, name: str) -> None:
    structlog.get_logger("x").info("event", headers={name: "innocent"}, **{name: "innocent"})
    event = json.loads(logged())
    assert (event[name], event["headers"][name]) == (HIDDEN, HIDDEN)


def test_an_error_is_told_by_class_and_place_and_never_by_its_text(logged: Any) -> None:
    def fail() -> None:
        raise ValueError(f"can't read {WORDS}")

    try:
        fail()
    except ValueError:
        structlog.get_logger("x").exception("failed")
        logging.getLogger("library").exception("failed")
    first, *rest = logged().splitlines()
    event = json.loads(first)
    assert event["error"] == "ValueError"
    assert "in fail" in event["where"]
    assert any("in fail" in line for line in rest)
    assert WORDS not in first + "".join(rest)


def test_our_own_errors_are_made_to_be_read(logged: Any) -> None:
    for error in (SyncError("it is so", hint="do that"), InvalidWrite("t", "c", "is too long")):
        try:
            raise error
        except Exception:
            structlog.get_logger("x").exception("failed")
    text = logged()
    assert "it is so; do that" in text
    assert "is too long" in text


def test_what_nobody_caught_is_logged_without_its_text(logged: Any) -> None:
    log_uncaught()

    def fail() -> None:
        raise ValueError(WORDS)

    thread = threading.Thread(target=fail, name="lost")
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    events = [json.loads(line) for line in logged().splitlines()]
    assert [event["thread"] for event in events] == ["lost", "main"]
    assert all("in fail" in event["where"] for event in events)
    assert WORDS not in str(events)


@pytest.mark.parametrize("key", [JWT, "sb_secret_canary0000000000"])
def test_the_http_stack_writes_no_key_even_at_debug(logged: Any, key: str) -> None:
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.DEBUG)
    with key_server() as server:
        remote = SupabaseRemote(server.url, key)
        with pytest.raises(SyncError) as raised:
            remote.audit()
        remote.close()
    text = logged()
    assert "httpcore" in text, "it is switched on"
    assert key not in text
    assert key not in repr(raised.value) + repr(remote) + str(raised.value)


def test_every_secret_setting_is_known_to_the_log() -> None:
    given = {
        "supabase_secret_key": "one-secret",
        "supabase_jwt_secret": "two-secret",
        "database_url": "three-secret",
        "supabase_anon_key": "four-secret",
        "segment_key": "five-secret of some length",
        "segment_key_previous": "six-secret of some length",
    }
    settings = Settings.load(**given)
    assert set(secrets_of(settings)) == set(given.values())
    secret = {n for n, info in Settings.model_fields.items() if "Secret" in str(info.annotation)}
    assert secret <= set(given), "a new secret setting must be hidden too"
    assert not any(value in repr(settings) for name, value in given.items() if name in secret)
