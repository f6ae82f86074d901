"""Fixtures of the fault proxy tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from syncer.testkit.fault_proxy import FaultProxy
from tests.integration.proxy_upstream import Upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.stop()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy.start("127.0.0.1", upstream.port, control_port=0) as running:
        yield running
