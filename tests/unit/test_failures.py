"""The error table, line by line; what can be provoked is, in integration/test_error_table.py."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from syncer.core.failures import (
    TABLE,
    FailedReply,
    Line,
    as_markdown,
    classify,
    error_for,
    error_for_exception,
    line_for,
    line_for_exception,
    retry_after_s,
)
from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    NotSent,
    OutcomeUnknown,
    ProtocolMismatch,
    Refused,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SyncError,
    Throttled,
    TookTooLong,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)

REPLIES: list[tuple[FailedReply, type[SyncError]]] = [
    *[(FailedReply(503, f"PGRST00{n}"), RemoteUnavailable) for n in range(3)],
    (FailedReply(504, "PGRST003"), Throttled),
    *[(FailedReply(401, f"PGRST30{n}"), NotAuthorized) for n in range(1, 4)],
    (FailedReply(500, "PGRST300"), NotAuthorized),
    *[(FailedReply(404, f"PGRST20{n}"), ProtocolMismatch) for n in range(2, 6)],
    (FailedReply(400, "PGRST102"), BatchTooLarge),
    (FailedReply(400, "0A000", "cannot execute INSERT during recovery"), RemoteUnavailable),
    (FailedReply(405, "25006"), RemoteUnavailable),
    (FailedReply(503, "53300"), Throttled),
    *[(FailedReply(500, code), Throttled) for code in ("40001", "40P01", "55P03")],
    (FailedReply(500, "57014"), TookTooLong),
    (FailedReply(403, "42501"), NotAuthorized),
    *[(FailedReply(404, code), ProtocolMismatch) for code in ("42P01", "42703", "42883")],
    (FailedReply(400, "SYP01"), ProtocolMismatch),
    *[(FailedReply(400, code), BatchTooLarge) for code in ("22P05", "22P02", "22003", "21000")],
    (FailedReply(503, "08006"), RemoteUnavailable),
    (FailedReply(500, "53100"), RemoteUnavailable),
    *[(FailedReply(503, code), RemoteUnavailable) for code in ("57P01", "57P02", "57P03")],
    (FailedReply(403, "28P01"), NotAuthorized),
    (FailedReply(401), NotAuthorized),
    (FailedReply(402), NotAuthorized),
    (FailedReply(413), BatchTooLarge),
    (FailedReply(429), Throttled),
    (FailedReply(429, retry_after_s=2.0), Throttled),
    (FailedReply(503, retry_after_s=3.0), Throttled),
    (FailedReply(503), RemoteUnavailable),
    *[(FailedReply(status), ReplyUnreadable) for status in (301, 302, 307, 308)],
    *[(FailedReply(status), ReplyUnreadable) for status in (200, 204, 400, 404, 409)],
    *[(FailedReply(status), ReplyUnreadable) for status in (500, 502, 504, *range(520, 531))],
    *[(FailedReply(status), ReplyUnreadable) for status in (540, 544, 546, 556)],
    (FailedReply(400, "0A000", "not supported"), ReplyUnreadable),
    (FailedReply(500, "XX000"), ReplyUnreadable),
]
EXCEPTIONS: list[tuple[list[str], str, type[SyncError]]] = [
    (["ConnectError", "TransportError", "HTTPError"], "SSL", NotAuthorized),
    (["ConnectError", "TransportError", "HTTPError"], "Connection refused", RemoteUnavailable),
    (["ConnectTimeout", "TimeoutException", "HTTPError"], "", RemoteUnavailable),
    (["PoolTimeout", "TimeoutException", "HTTPError"], "", RemoteUnavailable),
    (["ReadTimeout", "TimeoutException", "HTTPError"], "", ReplyTimedOut),
    (["WriteTimeout", "TimeoutException", "HTTPError"], "", ReplyTimedOut),
    (["ReadError", "NetworkError", "HTTPError"], "", ReplyUnreadable),
    (["RemoteProtocolError", "ProtocolError", "HTTPError"], "", ReplyUnreadable),
    (["APIError", "Exception"], "", ReplyUnreadable),
    (["JSONDecodeError", "ValueError"], "", ReplyUnreadable),
]


@pytest.mark.parametrize(("reply", "error"), REPLIES, ids=lambda value: str(value)[:60])
def test_each_reply_becomes_the_error_that_says_what_happened(
    reply: FailedReply, error: type[SyncError]
):
    assert type(error_for(reply)) is error


@pytest.mark.parametrize(("names", "text", "error"), EXCEPTIONS)
def test_each_exception_of_the_client_becomes_an_error_of_ours(
    names: list[str], text: str, error: type[SyncError]
):
    assert type(error_for_exception(names, text)) is error


def test_every_line_of_the_table_is_needed_by_some_case():
    """A line that no case reaches is dead, or hides behind a line above it."""
    hit: set[Line | None] = {line_for(reply) for reply, _ in REPLIES}
    hit |= {line_for_exception(names, text) for names, text, _ in EXCEPTIONS}
    assert [line for line in TABLE if line not in hit] == []


def test_only_what_certainly_did_not_happen_is_called_not_sent():
    for reply, error in REPLIES:
        definite = issubclass(error, NotSent | Refused)
        assert definite or issubclass(error, OutcomeUnknown)
        if not reply.code and reply.status in (200, 204, 400, 500, 502, 504):
            assert not definite


def test_an_unknown_code_keeps_the_data():
    assert classify(FailedReply(418, "ZZ999")) == "unknown"
    assert isinstance(error_for(FailedReply(418, "ZZ999")), OutcomeUnknown)


def test_an_error_reply_never_repeats_the_servers_text():
    told = str(error_for(FailedReply(500, "XX000", "secret user text")))
    assert "secret user text" not in told
    assert "XX000" in told


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("-1", 0.0),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        ("Wed, 31 Dec 2025 23:00:00 GMT", 0.0),
        ("soon", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None):
    assert retry_after_s(header, NOW) == seconds


def test_the_documentation_shows_the_table_as_it_is():
    text = Path(__file__).parents[2].joinpath("docs/RELIABILITY.md").read_text(encoding="utf-8")
    assert as_markdown() in text
