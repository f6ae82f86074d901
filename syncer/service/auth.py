"""Who is asking: Supabase access tokens, checked here without asking Supabase.

The algorithm is pinned: a token never chooses how it is checked. Only the verified user id goes on
from here; the token itself is kept nowhere, since it has expired when a buffered write is sent.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import jwt
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from syncer.errors import SettingsError
from syncer.service.http_errors import ApiError, ErrorReply
from syncer.settings import Settings

AUDIENCE = "authenticated"
ALGORITHM = "HS256"
LEEWAY_S = 10.0  # clocks of containers and of the token's issuer differ by seconds
SUBJECT_CHARS_MAX = 255
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Authenticator:
    """Verifies access tokens signed with the project's JWT secret."""

    def __init__(self, secret: str, issuer: str | None = None) -> None:
        self._secret = secret
        self._issuer = issuer

    def __repr__(self) -> str:
        return f"Authenticator(issuer={self._issuer!r})"  # never the secret

    @classmethod
    def from_settings(cls, settings: Settings) -> Authenticator:
        """Build from settings; raises SettingsError naming what is missing.

        Tokens of a hosted project must name it as their issuer, if they name any. A local stack is
        reached by several names, so its issuer isn't compared; its secret is its own anyway.
        """
        if settings.supabase_jwt_secret is None:
            raise SettingsError(
                "SUPABASE_JWT_SECRET",
                "is not set",
                hint="users can't be told apart without it; find it in the project's JWT settings",
            )
        issuer = None
        if settings.supabase_url and urlsplit(settings.supabase_url).hostname not in _LOOPBACK:
            issuer = f"{settings.supabase_url}/auth/v1"
        return cls(settings.supabase_jwt_secret.get_secret_value(), issuer)

    def user_of(self, authorization: str | None) -> str:
        """Return the user id an `Authorization` header proves; raises ApiError 401 otherwise."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unauthorized("an access token is needed", 'Bearer realm="syncer"')
        try:
            claims = jwt.decode(
                token.strip(),
                self._secret,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                leeway=LEEWAY_S,
                options={"require": ["exp", "sub", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise _refused("the access token has expired") from None
        except jwt.PyJWTError:
            raise _refused("the access token isn't valid") from None
        return self._subject(claims)

    def _subject(self, claims: dict[str, Any]) -> str:
        subject = claims["sub"]
        if claims.get("role", AUDIENCE) != AUDIENCE:
            raise _refused("the access token isn't a user's")
        if self._issuer is not None and claims.get("iss", self._issuer) != self._issuer:
            raise _refused("the access token is of another project")
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

    def get_route_handler(self) -> Any:
        """Return the handler that authenticates first."""
        handle = super().get_route_handler()

        async def authenticated(request: Request) -> Response:
            authenticator: Authenticator = request.app.state.authenticator
            request.state.user_id = authenticator.user_of(request.headers.get("authorization"))
            response: Response = await handle(request)
            return response

        return authenticated


def _refused(message: str) -> ApiError:
    return _unauthorized(message, 'Bearer realm="syncer", error="invalid_token"')


def _unauthorized(message: str, challenge: str) -> ApiError:
    headers = {"WWW-Authenticate": challenge}
    return ApiError(ErrorReply(401, "unauthorized", message, headers=headers))
