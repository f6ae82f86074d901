"""Fixtures of the tests on real parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from syncer.remote import SupabaseRemote
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


@pytest.fixture
def remote(fresh_supabase) -> Iterator[SupabaseRemote]:
    made = SupabaseRemote(fresh_supabase.url, fresh_supabase.secret_key)
    yield made
    made.close()
