"""Which tokens prove a user, and which don't."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from syncer.errors import SettingsError
from syncer.service.auth import Authenticator, Identity
from syncer.service.http_errors import ApiError
from syncer.settings import Settings

SECRET = "a secret of the project that is long enough for the longer algorithm too"
PROJECT = "https://abcdefgh.supabase.co"
NOW = datetime.now(UTC)  # noqa: TID251  tokens are checked against the machine's clock


def token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    payload = {
        "sub": "user-1",
        "aud": "authenticated",
        "role": "authenticated",
        "exp": NOW + timedelta(hours=1),
        **claims,
    }
    kept = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(kept, secret, algorithm=algorithm)


def unsigned(algorithm: str) -> str:
    def part(document: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")

    exp = int((NOW + timedelta(hours=1)).timestamp())
    claims = {"sub": "user-1", "aud": "authenticated", "exp": exp}
    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims)}."


def settings(**values: Any) -> Settings:
    return Settings.load(**{"supabase_url": PROJECT, "supabase_jwt_secret": SECRET, **values})


def test_a_valid_token_proves_its_subject() -> None:
    authenticator = Authenticator.from_settings(settings())
    assert authenticator.user_of(f"Bearer {token()}") == "user-1"
    assert authenticator.user_of(f"bearer  {token(iss=f'{PROJECT}/auth/v1')}") == "user-1"


@pytest.mark.parametrize(
    "refused",
    [
        token(secret="another secret that is also long enough"),
        token(exp=NOW - timedelta(minutes=1)),
        token(exp=None),
        token(aud="anon"),
        token(aud=None),
        token(sub=None),
        token(sub=""),
        token(sub="x" * 256),
        token(role="service_role"),
        token(role="anon"),
        token(nbf=NOW + timedelta(hours=1)),
        token(iss="https://another.supabase.co/auth/v1"),
        token(algorithm="HS512"),
        unsigned("none"),
        unsigned("NONE"),
        unsigned("HS256"),
        token()[:-2],
        "not.a.token",
        "",
        "é",
    ],
)
def test_any_other_token_is_refused_with_a_challenge(refused: str) -> None:
    authenticator = Authenticator.from_settings(settings())
    with pytest.raises(ApiError) as raised:
        authenticator.user_of(f"Bearer {refused}")
    reply = raised.value.reply
    assert (reply.status, reply.code) == (401, "unauthorized")
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    if refused:
        assert refused not in repr(raised.value)
        assert refused not in reply.message


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic dXNlcjpwYXNz", token()])
def test_without_a_bearer_token_nobody_is_let_in(header: str | None) -> None:
    with pytest.raises(ApiError) as raised:
        Authenticator(SECRET).user_of(header)
    assert raised.value.reply.headers["WWW-Authenticate"] == 'Bearer realm="syncer"'


def test_a_token_signed_with_a_private_key_is_refused() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    signed = jwt.encode(
        {"sub": "u", "aud": "authenticated", "exp": NOW + timedelta(hours=1)},
        private,
        algorithm="RS256",
    )
    with pytest.raises(ApiError):
        Authenticator(SECRET).user_of(f"Bearer {signed}")


def test_a_clock_a_few_seconds_apart_is_forgiven() -> None:
    now = datetime.now(UTC)  # noqa: TID251  as above; NOW may be some seconds old here
    late = token(exp=now - timedelta(seconds=2))
    assert Authenticator(SECRET).user_of(f"Bearer {late}") == "user-1"


def test_a_local_stacks_issuer_is_not_compared() -> None:
    authenticator = Authenticator.from_settings(settings(supabase_url="http://127.0.0.1:54321"))
    assert authenticator.user_of(f"Bearer {token(iss='http://kong:8000/auth/v1')}") == "user-1"


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:54321"])
def test_a_local_stack_without_its_secret_is_refused_at_the_start(url: str | None) -> None:
    with pytest.raises(SettingsError, match="SUPABASE_JWT_SECRET"):
        Authenticator.from_settings(settings(supabase_url=url, supabase_jwt_secret=None))


def test_a_hosted_project_may_have_public_keys_only(tmp_path: Path) -> None:
    made = Authenticator.from_settings(settings(supabase_jwt_secret=None, data_dir=tmp_path))
    with pytest.raises(ApiError) as raised:
        made.user_of(f"Bearer {token()}")
    assert raised.value.reply.status == 401, "nothing is signed by a secret that isn't set"


# -- operators -------------------------------------------------------------------------------------


def test_an_operator_is_who_the_project_says_so_and_nobody_else() -> None:
    made = Authenticator.from_settings(settings())

    def is_operator(**claims: Any) -> bool:
        return made.identify(f"Bearer {token(**claims)}").is_operator

    assert is_operator(app_metadata={"role": "syncer_admin"})
    assert not is_operator()
    assert not is_operator(user_metadata={"role": "syncer_admin"}), "users write that themselves"
    assert not is_operator(app_metadata={"role": "admin"})
    assert not is_operator(app_metadata=["syncer_admin"])
    assert not is_operator(app_metadata="syncer_admin")


def test_the_service_key_is_an_operator_and_no_user() -> None:
    made = Authenticator.from_settings(settings())
    key = token(role="service_role", iss="supabase", aud=None, sub=None)
    assert made.identify(f"Bearer {key}") == Identity(None, is_operator=True)
    with pytest.raises(ApiError):
        made.user_of(f"Bearer {key}")
    for claims in ({"exp": None}, {"exp": NOW - timedelta(minutes=1)}, {"secret": "x" * 40}):
        bad = {"role": "service_role", "aud": None, "sub": None, **claims}
        with pytest.raises(ApiError):
            made.identify(f"Bearer {token(**bad)}")


def test_the_secret_is_not_in_the_repr() -> None:
    assert SECRET not in repr(Authenticator.from_settings(settings()))
