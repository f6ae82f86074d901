"""Who is asking: Supabase access tokens, checked here without asking Supabase.

A token never chooses how it is checked: `HS256` by the project's JWT secret alone, `ES256` and
`RS256` by a key of the project's own set that is meant for it. Only the verified user id goes on
from here; the token itself is kept nowhere, since it has expired when a buffered write is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from syncer.errors import SettingsError
from syncer.service.http_errors import RETRY_LATER_S, ApiError, ErrorReply
from syncer.service.jwks import PublicKeys, VerifyingKey
from syncer.settings import Settings

AUDIENCE = "authenticated"
SERVICE = "service_role"
OPERATOR_ROLE = "syncer_admin"  # in app_metadata, which users can't write
LEEWAY_S = 10.0  # clocks of containers and of the token's issuer differ by seconds
SUBJECT_CHARS_MAX = 255
TOKEN_CHARS_MAX = 16 * 1024  # what a server takes as headers in all
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a token proves: a user, or the service itself (`user_id` None)."""

    user_id: str | None
    is_operator: bool


class Authenticator:
    """Verifies access tokens by the project's JWT secret, its public keys, or both."""

    def __init__(
        self, secret: str | None, issuer: str | None = None, keys: PublicKeys | None = None
    ) -> None:
        self._secret = None if secret is None else VerifyingKey("HS256", secret)
        self._issuer = issuer
        self._keys = keys

    def __repr__(self) -> str:
        return f"Authenticator(issuer={self._issuer!r})"  # never the secret

    @classmethod
    def from_settings(cls, settings: Settings) -> Authenticator:
        """Build from settings; raises SettingsError naming what is missing.

        A hosted project's tokens must name it as their issuer. Those signed by the secret may leave
        it out, as older ones do. A local stack is reached by several names, so its issuer isn't
        compared; it signs by its secret, which must therefore be given.
        """
        url, secret = settings.supabase_url, settings.supabase_jwt_secret
        is_local = url is None or urlsplit(url).hostname in _LOOPBACK
        if secret is None and is_local:
            raise SettingsError(
                "SUPABASE_JWT_SECRET",
                "is not set",
                hint="users can't be told apart without it; find it in the project's JWT settings",
            )
        return cls(
            None if secret is None else secret.get_secret_value(),
            None if is_local else f"{url}/auth/v1",
            None if url is None else PublicKeys(url, settings.data_dir),
        )

    def user_of(self, authorization: str | None) -> str:
        """Return the user id an `Authorization` header proves; raises ApiError 401 otherwise."""
        user_id = self.identify(authorization).user_id
        if user_id is None:
            raise _refused("the access token isn't a user's")
        return user_id

    def identify(self, authorization: str | None) -> Identity:
        """Return who an `Authorization` header proves; raises ApiError 401, or 503 when a key is
        unknown and the project can't be asked for it.
        """
        token = _bearer(authorization)
        try:
            header = jwt.get_unverified_header(token)
            key = self._key_for(header)
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                leeway=LEEWAY_S,
                options={"require": ["exp"], "verify_aud": False},
            )
        except jwt.ExpiredSignatureError:
            raise _refused("the access token has expired") from None
        except (jwt.PyJWTError, UnicodeError):
            raise _refused("the access token isn't valid") from None
        return self._identity(claims, is_by_secret=key is self._secret)

    def needs_keys(self, authorization: str | None) -> bool:
        """Tell whether `ask_for_keys` may make a difference to this header; asks nobody."""
        try:
            header = jwt.get_unverified_header(_bearer(authorization))
        except (ApiError, jwt.PyJWTError, UnicodeError):
            return False
        key_id = header.get("kid")
        is_public = header.get("alg") in ("ES256", "RS256")
        return bool(is_public and key_id and self._keys and self._keys.may_bring(key_id))

    def ask_for_keys(self) -> None:
        """Ask the project for its keys, at most once per interval; blocks for some seconds."""
        if self._keys is not None:
            self._keys.refresh()

    def _key_for(self, header: Mapping[str, Any]) -> VerifyingKey:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm == "HS256" and self._secret is not None:
            return self._secret
        if algorithm not in ("ES256", "RS256") or self._keys is None or not key_id:
            raise _refused("the access token isn't valid")
        found = self._keys.find(key_id)
        if found is not None:
            return found
        if not self._keys.answered:
            # Told 401, a client would sign its user out because of an outage.
            message = "the keys that prove users can't be had now"
            raise ApiError(ErrorReply(503, "unavailable", message, retry_after_s=RETRY_LATER_S))
        raise _refused("the access token isn't valid")

    def _identity(self, claims: Mapping[str, Any], *, is_by_secret: bool) -> Identity:
        if claims.get("role") == SERVICE and is_by_secret:
            return Identity(None, is_operator=True)
        audience = claims.get("aud")
        if audience != AUDIENCE and not (isinstance(audience, list) and AUDIENCE in audience):
            raise _refused("the access token isn't valid")
        if claims.get("role", AUDIENCE) != AUDIENCE:
            raise _refused("the access token isn't a user's")
        issuer = claims.get("iss", self._issuer if is_by_secret else None)
        if self._issuer is not None and issuer != self._issuer:
            raise _refused("the access token is of another project")
        metadata = claims.get("app_metadata")
        is_operator = isinstance(metadata, dict) and metadata.get("role") == OPERATOR_ROLE
        return Identity(_subject(claims), is_operator)


def _bearer(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("an access token is needed", 'Bearer realm="syncer"')
    if len(token) > TOKEN_CHARS_MAX:
        raise _refused("the access token isn't valid")
    return token.strip()


def _subject(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT_CHARS_MAX:
        raise _refused("the access token names no user")
    try:
        subject.encode()
    except UnicodeEncodeError:
        raise _refused("the access token names no user") from None
    return subject


class AuthenticatedRoute(APIRoute):
    """A route that knows its user before a byte of the body is read.

    As a dependency the check would run after the body was parsed, and a stranger could tell a
    valid request from an invalid one.
    """

    def admit(self, request: Request, authenticator: Authenticator) -> None:
        """Let the request in as its user, or raise ApiError."""
        request.state.user_id = authenticator.user_of(request.headers.get("authorization"))

    def get_route_handler(self) -> Any:
        """Return the handler that authenticates first."""
        handle = super().get_route_handler()

        async def authenticated(request: Request) -> Response:
            state = request.app.state
            authenticator: Authenticator = state.authenticator
            try:
                self.admit(request, authenticator)
            except ApiError:
                if not authenticator.needs_keys(request.headers.get("authorization")):
                    raise
                await state.off_loop_keys(authenticator.ask_for_keys)
                self.admit(request, authenticator)
            response: Response = await handle(request)
            return response

        return authenticated


class OperatorRoute(AuthenticatedRoute):
    """A route for operators: 401 for strangers, 403 for users."""

    def admit(self, request: Request, authenticator: Authenticator) -> None:
        """Let an operator in; `user_id` is None for the service itself."""
        identity = authenticator.identify(request.headers.get("authorization"))
        if not identity.is_operator:
            raise ApiError(ErrorReply(403, "forbidden", "this is for operators"))
        request.state.user_id = identity.user_id


def _refused(message: str) -> ApiError:
    return _unauthorized(message, 'Bearer realm="syncer", error="invalid_token"')


def _unauthorized(message: str, challenge: str) -> ApiError:
    headers = {"WWW-Authenticate": challenge}
    return ApiError(ErrorReply(401, "unauthorized", message, headers=headers))
