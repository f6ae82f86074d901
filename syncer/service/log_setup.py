"""Logs: one structured line per event, on stderr, without secrets or user data."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

# Keys and tokens are JWTs or carry a telling prefix; passwords stand in connection URLs.
_SECRETS = re.compile(
    r"eyJ[\w-]+\.[\w-]+\.[\w-]+|sb_secret_[\w-]+|sb_publishable_[\w-]+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(text: str) -> str:
    """Replace anything that looks like a key, a token or a password in a URL."""
    return _SECRETS.sub("[redacted]", text)


def set_up_logging(*, json: bool = False, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's logging to stderr, redacted."""
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
            structlog.processors.format_exc_info,
            _redact_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # At DEBUG the HTTP stack prints headers, and with them the key; APScheduler warns whenever a
    # nudge meets a run that is already under way, which is the normal case under load.
    for name in ("httpx", "httpcore", "hpack"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _redact_event(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {key: redact(v) if isinstance(v, str) else v for key, v in event.items()}
