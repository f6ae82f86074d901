"""The project's public keys, which check tokens that Supabase signed with a private one.

They are kept in the data folder, so that a container that starts in an outage knows its users, and
go on being used while Supabase can't be asked. Whoever sends tokens with made-up key ids can cause
one question per ASK_INTERVAL_S at most.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import orjson
import structlog

from local_store import opening
from local_store.clock import Clock, SystemClock
from syncer.errors import Refused, SyncError
from syncer.transport import fetch_public

PATH = "/auth/v1/.well-known/jwks.json"
FILE_NAME = "jwks.json"
ASK_INTERVAL_S = 30.0
FRESH_S = 600.0  # how long Supabase's own edge keeps them: sooner there is nothing new
DEADLINE_S = 4.0  # a request waits for it
BYTES_MAX = 64 * 1024  # a dozen keys are 6 KB
KEYS_MAX = 32
KEY_ID_CHARS_MAX = 256
RSA_BITS = range(2048, 8193)  # below it is broken, above it checking a signature takes too long
# Only what is public is kept, should a private or a symmetric key ever get into the document.
_ALGORITHMS = {"EC": "ES256", "RSA": "RS256"}
_PUBLIC = {"EC": ("kty", "crv", "x", "y"), "RSA": ("kty", "n", "e")}

log = structlog.get_logger("syncer.jwks")


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A public key with the one algorithm that it is used with."""

    algorithm: str
    key: Any


class PublicKeys:
    """The keys of one project. Thread-safe; only `refresh` waits for the network."""

    def __init__(self, project_url: str, folder: Path, clock: Clock | None = None) -> None:
        self._url = f"{project_url}{PATH}"
        self._file = folder / FILE_NAME
        self._clock = clock or SystemClock()
        self._asking = threading.Lock()
        self._asked_at: float | None = None
        self._fresh_until = 0.0
        self._keys: Mapping[str, VerifyingKey] = {}
        with suppress(OSError, ValueError):  # none yet, another project's, or damaged: ask anew
            self._keys = self._read()
        self.answered = False

    def find(self, key_id: str) -> VerifyingKey | None:
        """Return a key by its id; keys past FRESH_S are used and asked for behind the caller."""
        known = self._keys.get(key_id)
        if known is not None and self._is_stale() and not self._asking.locked():
            threading.Thread(target=self.refresh, name="syncer-jwks", daemon=True).start()
        return known

    def may_bring(self, key_id: str) -> bool:
        """Tell whether `refresh` may bring a key that isn't known."""
        return key_id not in self._keys and (self._is_due() or self._asking.locked())

    def refresh(self) -> None:
        """Ask for the keys, unless that was done just now; blocks up to DEADLINE_S, never raises.

        Who comes while somebody asks waits for that answer. `answered` tells whether the last
        question was.
        """
        with self._asking:
            if not self._is_due():
                return
            try:
                body = fetch_public(self._url, bytes_max=BYTES_MAX, deadline_s=DEADLINE_S)
                documents = _public_parts(body)
                self._keys = _parsed(documents)
            except (SyncError, ValueError) as error:
                # Refused (404, say) is an answer too: this project has no key set.
                self.answered = isinstance(error, Refused)
                log.warning("keys_not_had", error=type(error).__name__, known=len(self._keys))
            else:
                self.answered = True
                self._fresh_until = self._clock.monotonic() + FRESH_S
                self._keep(documents)
            finally:
                self._asked_at = self._clock.monotonic()

    def _is_due(self) -> bool:
        asked_at = self._asked_at
        return asked_at is None or self._clock.monotonic() >= asked_at + ASK_INTERVAL_S

    def _is_stale(self) -> bool:
        return self._is_due() and self._clock.monotonic() >= self._fresh_until

    def _read(self) -> Mapping[str, VerifyingKey]:
        with self._file.open("rb") as file:
            document = orjson.loads(file.read(2 * BYTES_MAX))
        if not isinstance(document, dict) or document.get("url") != self._url:
            raise ValueError("not this project's keys")
        return _parsed(_public_parts(orjson.dumps(document)))

    def _keep(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Write the keys whole or not at all; without a file they are asked for at each start."""
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            descriptor = os.open(temporary, flags, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(orjson.dumps({"url": self._url, "keys": documents}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._file)
            opening.sync_folder(self._file.parent)
        except OSError as error:
            log.warning("keys_not_kept", error=type(error).__name__)
            with suppress(OSError):
                temporary.unlink()


def _public_parts(body: bytes) -> list[dict[str, Any]]:
    """Return what is public of the usable keys; raises ValueError when it is no key set."""
    document = orjson.loads(body)
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ValueError("not a set of keys")
    usable = [item for item in listed if isinstance(item, dict) and _is_for_signatures(item)]
    return [
        {"kid": item["kid"], **{name: item.get(name) for name in _PUBLIC[item["kty"]]}}
        for item in usable
    ]


def _is_for_signatures(item: Mapping[str, Any]) -> bool:
    kind, key_id = str(item.get("kty")), item.get("kid")
    algorithm = _ALGORITHMS.get(kind)
    return (
        algorithm is not None
        and isinstance(key_id, str)
        and 0 < len(key_id) <= KEY_ID_CHARS_MAX
        and all(isinstance(item.get(name), str) for name in _PUBLIC[kind])
        and item.get("alg", algorithm) == algorithm
        and item.get("use", "sig") == "sig"
    )


def _parsed(documents: Sequence[Mapping[str, Any]]) -> dict[str, VerifyingKey]:
    found: dict[str, VerifyingKey] = {}
    for document in documents:
        algorithm = _ALGORITHMS[document["kty"]]
        try:
            key = jwt.PyJWK(dict(document), algorithm=algorithm).key
        except (jwt.PyJWTError, ValueError, TypeError):
            log.warning("key_not_usable", algorithm=algorithm)  # the others are
            continue
        is_strong = key.key_size in RSA_BITS if algorithm == "RS256" else document["crv"] == "P-256"
        if is_strong:
            found[document["kid"]] = VerifyingKey(algorithm, key)
    return found
