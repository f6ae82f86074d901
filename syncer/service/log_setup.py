"""Logs: one structured line per event, on stderr, without secrets or user data.

What is taken out: values that look like a key, a token or a password in a URL; the secrets of the
settings by their very text; fields whose name says that they hold one. An error that isn't one of
ours is told by its class and where it happened, never by its text, which may quote what a user
wrote.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, MutableMapping
from types import TracebackType
from typing import Any

import structlog

from local_store import LocalStoreError
from syncer.errors import SyncError
from syncer.settings import Settings

HIDDEN = "[redacted]"
SECRET_CHARS_MIN = 8  # a shorter one would blank out ordinary words
# Keys and tokens are JWTs or carry a telling prefix; passwords stand in connection URLs.
_SECRETS = re.compile(
    r"eyJ[\w-]+\.[\w-]+\.[\w-]*|sb_secret_[\w-]+|sb_publishable_[\w-]+"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?i:(?<=bearer )[\w.~+/=-]+)"
)
_NAMES = re.compile(r"(?i)authorization|apikey|api_key|secret|password|token\Z|cookie|database_url")
_NOISY = ("httpx", "httpcore", "hpack", "h11", "h2")

log = structlog.get_logger("syncer.process")


class Redactor:
    """Takes secrets out of what is about to be written."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # The longest first: one may be part of another.
        known = sorted({s for s in secrets if len(s) >= SECRET_CHARS_MIN}, key=len, reverse=True)
        self._known = tuple(known)

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        return _SECRETS.sub(HIDDEN, text)

    def value(self, value: Any, name: str = "") -> Any:
        """Return a value without secrets, however deep they are in it."""
        if _NAMES.search(name) and value is not None and not isinstance(value, bool):
            return HIDDEN
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bytes):
            return self.text(value.decode("utf-8", "replace"))
        if isinstance(value, Mapping):
            return {self.text(str(k)): self.value(v, str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self.text(told(value) if isinstance(value, BaseException) else str(value))

    def event(
        self, _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Redact one event, as a processor of structlog."""
        return {key: self.value(value, key) for key, value in event.items()}


def secrets_of(settings: Settings) -> list[str]:
    """Return the texts that must never be written anywhere."""
    held = (
        settings.supabase_secret_key,
        settings.supabase_jwt_secret,
        settings.database_url,
        settings.segment_key,
        settings.segment_key_previous,
    )
    found = [secret.get_secret_value() for secret in held if secret is not None]
    return [*found, *([settings.supabase_anon_key] if settings.supabase_anon_key else [])]


def told(error: BaseException) -> str:
    """Return what may be said of an error: our own ones are made to be read."""
    if isinstance(error, SyncError | LocalStoreError):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def where(trace: TracebackType | None) -> str:
    """Return where an error happened, without any value."""
    return "".join(traceback.format_tb(trace)).rstrip()


def set_up_logging(
    *, json: bool = False, level: int = logging.INFO, secrets: Iterable[str] = ()
) -> None:
    """Send structlog and the standard library's logging to stderr, redacted.

    `secrets` are hidden wherever they stand. Calling it again replaces the earlier set-up.
    """
    redactor = Redactor(secrets)
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _tell_error,
            redactor.event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(redactor))
    logging.basicConfig(level=min(level, logging.WARNING), handlers=[handler], force=True)
    # At DEBUG the HTTP stack prints headers, and with them the key; APScheduler warns whenever a
    # nudge meets a run that is already under way, which is the normal case under load.
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)


def log_uncaught() -> None:
    """Log what nobody caught, in any thread, instead of printing it with its text.

    For the start of a process.
    """

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = None if args.thread is None else args.thread.name
        _log_uncaught(args.exc_type, args.exc_traceback, name)

    def in_main(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        _log_uncaught(kind, trace, "main")

    threading.excepthook = in_thread
    sys.excepthook = in_main


def _log_uncaught(
    kind: type[BaseException], trace: TracebackType | None, thread: str | None
) -> None:
    log.error("uncaught", error=kind.__name__, thread=thread, where=where(trace))


def _tell_error(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Turn the exception of an event into what may be said of it."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event["error"] = told(error)
        event["where"] = where(error.__traceback__)
    return event


class _RedactingFormatter(logging.Formatter):
    """Writes the standard library's records as ours: redacted, and errors without their text."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.text(super().format(record))

    def formatException(self, ei: Any) -> str:
        return f"{told(ei[1])}\n{where(ei[2])}" if ei[1] is not None else ""
