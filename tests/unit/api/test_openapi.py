"""The API against its own description, with requests that its description makes up."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.unit.api.support import Api, auth

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


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


class Served(NamedTuple):
    """A running API and what it says of itself."""

    url: str
    operations: dict[str, Any]


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as folder:
        behind = Api(Path(folder))
        with served(behind) as url:
            schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
            found = [result.ok() for result in schema.get_all_operations()]
            yield Served(url, {operation.label: operation for operation in found})
        behind.local.close()


@contextmanager
def served(api: Api) -> Iterator[str]:
    """Serve on a free port; a test client would end the app behind every request."""
    config = uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()  # who comes before the server runs waits for it
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def test_every_route_is_described_and_tried(api: Served) -> None:
    assert sorted(api.operations) == sorted(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_no_request_meets_a_server_error_or_an_undescribed_reply(api: Served, route: str) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api.operations[route].as_strategy(), is_there=booleans())
    def try_it(case: schemathesis.Case, is_there: bool) -> None:
        if is_there and "session_id" in case.path_parameters:
            made = requests.post(
                f"{api.url}/api/sessions",
                json={"prompt": "Sort a list"},
                headers=auth(),
                timeout=30,
            )
            case.path_parameters["session_id"] = made.json()["session_id"]
        case.call_and_validate(headers=auth(), checks=CHECKS)

    try_it()


@pytest.mark.parametrize("route", [route for route in ROUTES if "/api/" in route])
def test_without_a_token_every_route_answers_unauthorized(api: Served, route: str) -> None:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api.operations[route].as_strategy())
    def try_it(case: schemathesis.Case) -> None:
        reply = case.call(headers={"Authorization": ""})
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized")

    try_it()
