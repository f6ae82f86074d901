"""The sessions' routes against their own description."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.described_api import DescribedApi, served
from tests.unit.api.support import Api, auth

ROUTES = [
    "POST /api/sessions",
    "GET /api/sessions",
    "GET /api/sessions/{session_id}",
    "DELETE /api/sessions/{session_id}",
    "GET /api/sessions/{session_id}/history",
    "POST /api/sessions/{session_id}/holes/{hole_id}/resolve",
    "POST /api/sessions/{session_id}/finalize",
    "POST /api/sessions/{session_id}/abandon",
    "POST /api/sessions/{session_id}/rollback",
    "GET /health",
    "GET /health/live",
    "GET /health/ready",
]


@pytest.fixture(scope="module")
def api() -> Iterator[DescribedApi]:
    with tempfile.TemporaryDirectory() as folder:
        behind = Api(Path(folder))
        with served(behind.app) as running:
            yield running
        behind.local.close()


def test_every_route_is_described_and_tried(api: DescribedApi) -> None:
    described = {route for route in api.operations if "/api/sync/" not in route}
    assert described == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_no_request_meets_a_server_error_or_an_undescribed_reply(
    api: DescribedApi, route: str
) -> None:
    api.try_route(route, auth())


@pytest.mark.parametrize("route", [route for route in ROUTES if "/api/" in route])
def test_without_a_token_every_route_answers_unauthorized(api: DescribedApi, route: str) -> None:
    api.try_without_token(route)
