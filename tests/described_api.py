"""A running API held against its own description, with requests that the description makes up."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

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

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
HEALTH = list(HealthCheck)


class DescribedApi(NamedTuple):
    """Where it is served, and its routes as it describes them."""

    url: str
    operations: dict[str, Any]

    def try_route(self, route: str, headers: Mapping[str, str], examples: int = 40) -> None:
        """Send made-up requests, half of them about a session that exists."""

        @settings(max_examples=examples, deadline=None, suppress_health_check=HEALTH)
        @given(case=self.operations[route].as_strategy(), is_there=booleans())
        def try_it(case: schemathesis.Case, is_there: bool) -> None:
            if is_there and "session_id" in case.path_parameters:
                made = requests.post(
                    f"{self.url}/api/sessions",
                    json={"prompt": "Sort a list"},
                    headers=headers,
                    timeout=30,
                )
                case.path_parameters["session_id"] = made.json()["session_id"]
            case.call_and_validate(headers=dict(headers), checks=CHECKS)

        try_it()

    def try_without_token(self, route: str) -> None:
        """Send made-up requests without a token: each is refused as that."""

        @settings(max_examples=5, deadline=None, suppress_health_check=HEALTH)
        @given(case=self.operations[route].as_strategy())
        def try_it(case: schemathesis.Case) -> None:
            reply = case.call(headers={"Authorization": ""})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized")

        try_it()


@contextmanager
def served(app: Any) -> Iterator[DescribedApi]:
    """Serve on a free port; a test client would end the app behind every request."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()  # who comes before the server runs waits for it
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found = [result.ok() for result in schema.get_all_operations()]
        yield DescribedApi(url, {operation.label: operation for operation in found})
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
