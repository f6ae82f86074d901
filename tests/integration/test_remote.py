"""SupabaseRemote through the real supabase-py, against a server that answers as gateways do."""

from __future__ import annotations

import json
import logging
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest

from local_store.ops import PendingTransaction, WireOp
from syncer.core.batch import Batch
from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    OutcomeUnknown,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SettingsError,
    SyncError,
    Throttled,
)
from syncer.remote import SupabaseRemote, TableRead
from syncer.settings import Settings
from syncer.testkit.api_process import free_port
from syncer.transport import PoolUse

KEY = jwt.encode({"role": "service_role"}, "k" * 32)
BATCH = Batch(
    "log",
    1,
    (
        PendingTransaction(
            seq=1,
            txn_id="t1",
            user_id="u",
            digest="d",
            accepted_at="2026-01-01T00:00:00+00:00",
            ops=(WireOp("notes", "insert", "a", {"text": "user text"}),),
            bases=(None,),
            chained=(False,),
            after=(),
            size_bytes=1,
            attempts=0,
            position=1,
            log_id="log",
            before=(None,),
            children=(None,),
        ),
    ),
)
APPLIED = json.dumps({"verdicts": [{"txn_id": "t1", "verdict": "applied"}]})

Answer = Callable[["Gateway"], None]


class Gateway(BaseHTTPRequestHandler):
    """Answers each request as the test says and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    answer: Answer
    seen: list[tuple[str, str]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.command, self.path))
        type(self).answer(self)

    do_GET = do_POST

    def say(self, status: int, body: str, kind: str = "application/json", **headers: str) -> None:
        encoded = body.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(encoded)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[type[Gateway]]:
    handler = type("Handler", (Gateway,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def remote(gateway) -> Iterator[SupabaseRemote]:
    made = SupabaseRemote(gateway.url, KEY)
    yield made
    made.close()


def test_a_json_reply_with_the_verdicts_is_believed(gateway, remote):
    gateway.answer = lambda g: g.say(200, APPLIED)
    assert [v.kind for v in remote.apply_batch(BATCH)] == ["applied"]
    assert gateway.seen == [("POST", "/rest/v1/rpc/sync_apply_batch_v1")]


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, "<html>welcome to the hotel</html>", "text/html"),
        (200, "", "application/json"),
        (200, "{broken", "application/json"),
        (200, "[]", "application/json"),
        (200, '{"verdicts": []}', "application/json"),
        (204, "", "application/json"),
        (200, APPLIED, "text/plain"),
    ],
)
def test_a_success_that_is_no_answer_is_an_unknown_outcome(gateway, remote, status, body, kind):
    gateway.answer = lambda g: g.say(status, body, kind)
    with pytest.raises(OutcomeUnknown):
        remote.apply_batch(BATCH)


def test_a_redirect_is_not_followed(gateway, remote):
    gateway.answer = lambda g: g.say(302, "", location=f"{gateway.url}/elsewhere")
    with pytest.raises(ReplyUnreadable):
        remote.apply_batch(BATCH)
    assert gateway.seen == [("POST", "/rest/v1/rpc/sync_apply_batch_v1")]


def error_body(code: str, message: str = "m") -> str:
    return json.dumps({"code": code, "message": message, "details": None, "hint": None})


@pytest.mark.parametrize(
    ("status", "body", "kind", "error"),
    [
        (401, error_body("PGRST301"), "application/json", NotAuthorized),
        (401, '{"message":"Invalid API key"}', "application/json", NotAuthorized),
        (404, error_body("PGRST202"), "application/json", ProtocolMismatch),
        (503, error_body("PGRST001"), "application/json", RemoteUnavailable),
        (405, error_body("25006"), "application/json", RemoteUnavailable),
        (400, error_body("", ""), "application/json", ReplyUnreadable),
        (502, "<html>bad gateway</html>", "text/html", ReplyUnreadable),
        (540, "<html>paused</html>", "text/html", ReplyUnreadable),
        (413, "too big", "text/plain", BatchTooLarge),
        (429, '{"message":"slow down"}', "application/json", Throttled),
    ],
)
def test_an_error_reply_becomes_an_error_that_says_whether_it_happened(
    gateway, remote, status, body, kind, error
):
    gateway.answer = lambda g: g.say(status, body, kind)
    with pytest.raises(error):
        remote.apply_batch(BATCH)


def test_retry_after_is_carried_in_the_error(gateway, remote):
    gateway.answer = lambda g: g.say(429, "{}", Retry_After="17")
    with pytest.raises(Throttled) as raised:
        remote.apply_batch(BATCH)
    assert raised.value.retry_after_s == 17.0


def test_a_connection_cut_in_the_reply_is_an_unknown_outcome(gateway, remote):
    def cut(g: Gateway) -> None:
        g.send_response(200)
        g.send_header("content-type", "application/json")
        g.send_header("content-length", "10000")
        g.end_headers()
        g.wfile.write(b'{"verdicts"')
        g.wfile.flush()
        g.connection.shutdown(socket.SHUT_RDWR)
        g.close_connection = True

    gateway.answer = cut
    with pytest.raises(OutcomeUnknown):
        remote.apply_batch(BATCH)


def test_a_refused_connection_did_not_happen():
    remote = SupabaseRemote(f"http://127.0.0.1:{free_port()}", KEY)
    with pytest.raises(RemoteUnavailable):
        remote.apply_batch(BATCH)


def test_a_dripping_reply_ends_at_the_deadline(gateway, remote):
    release = threading.Event()

    def drip(g: Gateway) -> None:
        g.send_response(200)
        g.send_header("content-type", "application/json")
        g.send_header("content-length", "100000")
        g.end_headers()
        while not release.wait(0.01):
            try:
                g.wfile.write(b" ")
            except OSError:
                return

    gateway.answer = drip
    try:
        with pytest.raises(ReplyTimedOut):
            remote.read("u", [TableRead("notes", {})], timeout_s=0.2)
    finally:
        release.set()


def test_a_malformed_read_reply_is_not_believed(gateway, remote):
    gateway.answer = lambda g: g.say(200, '{"reads": [{}]}')
    with pytest.raises(ReplyUnreadable):
        remote.read("u", [TableRead("notes", {})])


def test_the_key_and_the_users_text_appear_in_no_error_repr_or_log(gateway, remote, caplog):
    caplog.set_level(logging.DEBUG)
    leaked = error_body("22P02", "invalid input: user text")
    told = [repr(remote)]
    for answer in (
        lambda g: g.say(500, leaked),
        lambda g: g.say(401, leaked),
        lambda g: g.say(200, "<html>user text</html>", "text/html"),
    ):
        gateway.answer = answer
        with pytest.raises(SyncError) as raised:
            remote.apply_batch(BATCH)
        told += traceback.format_exception(raised.value)
        told += [repr(raised.value), str(raised.value)]
    text = "\n".join(told)
    assert KEY not in text
    assert "invalid input: user text" not in text
    assert KEY not in "\n".join(r.getMessage() for r in caplog.records if r.name != "hpack")


def test_a_rebuilt_client_spares_the_calls_under_way_on_the_old_one(gateway, remote):
    asked, may_answer = threading.Event(), threading.Event()
    callers = []

    def slowly(g: Gateway) -> None:
        callers.append(g.client_address)
        if len(callers) == 1:
            asked.set()
            assert may_answer.wait(10)
            g.say(200, APPLIED)
        elif len(callers) <= 4:
            g.say(502, "", "text/html")
        else:
            g.say(200, APPLIED)

    gateway.answer = slowly
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(remote.apply_batch, BATCH)
        assert asked.wait(10)
        for _ in range(3):
            with pytest.raises(ReplyUnreadable):
                remote.apply_batch(BATCH)
        assert remote.pool_use() == PoolUse(0, 0), "the next call opens new connections"
        assert remote.apply_batch(BATCH)
        may_answer.set()
        assert under_way.result(10)
    assert callers[4] not in callers[:4]


# -- settings -----------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch) -> pytest.MonkeyPatch:
    for name in ("SUPABASE_URL", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "url",
    ["not a url", "ftp://x.example", "https://", "https://a.example/rest/v1", "https://u:p@a"],
)
def test_a_malformed_project_url_is_named_and_not_repeated(bare, url):
    bare.setenv("SUPABASE_URL", url)
    with pytest.raises(SettingsError, match="SUPABASE_URL") as raised:
        Settings.load()
    assert url not in str(raised.value) or url == "https://"


def test_a_missing_key_is_named(bare):
    bare.setenv("SUPABASE_URL", "https://x.example")
    with pytest.raises(SettingsError, match="SUPABASE_SECRET_KEY"):
        SupabaseRemote.from_settings(Settings.load())


def test_a_missing_url_is_named(bare):
    with pytest.raises(SettingsError, match="SUPABASE_URL"):
        SupabaseRemote.from_settings(Settings.load())


def test_the_older_name_of_the_key_is_taken_too(bare):
    bare.setenv("SUPABASE_URL", "https://x.example/")
    bare.setenv("SUPABASE_SERVICE_ROLE_KEY", "k")
    assert Settings.load().require_supabase() == ("https://x.example", "k")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SYNCER_PORT", "http"),
        ("SYNCER_BATCH_OPS_MAX", "0"),
        ("SYNCER_FLUSH_INTERVAL_S", "-1"),
        ("USE_SUPABASE", "perhaps"),
        ("SYNCER_ACK", "sometimes"),
    ],
)
def test_a_bad_value_names_its_setting(bare, name, value):
    bare.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        Settings.load()


def test_a_secret_is_never_shown_by_the_settings(bare):
    bare.setenv("SUPABASE_SECRET_KEY", "canary-key")
    assert "canary-key" not in repr(Settings.load())
    assert "canary-key" not in str(Settings.load())
