"""The running app against its own description, with a real Supabase behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from syncer.service.runtime import Runtime
from syncer.settings import Settings
from tests.described_api import DescribedApi, served

OPERATORS = [
    "GET /api/sync/status",
    "GET /api/sync/audit",
    "GET /api/sync/dead-letters",
    "GET /api/sync/dead-letters/{txn_id}",
    "POST /api/sync/dead-letters/{txn_id}/retry",
    "POST /api/sync/dead-letters/{txn_id}/edit",
    "POST /api/sync/dead-letters/{txn_id}/discard",
    "GET /api/sync/conflicts",
    "GET /api/sync/conflicts/{conflict_id}",
    "POST /api/sync/conflicts/{conflict_id}/resolve",
]


@pytest.fixture
def api(fresh_supabase, tmp_path: Path) -> Iterator[DescribedApi]:
    env = {name.lower(): value for name, value in fresh_supabase.env().items()}
    runtime = Runtime.start(Settings.load(**env, data_dir=tmp_path / "buffer"))
    with served(runtime.app) as running:
        yield running


def test_every_operators_route_is_tried(api):
    assert {route for route in api.operations if "/api/sync/" in route} == set(OPERATORS)


def test_no_request_meets_a_server_error_or_an_undescribed_reply(api, fresh_supabase):
    token = {"Authorization": f"Bearer {fresh_supabase.secret_key}"}
    for route in OPERATORS:
        api.try_route(route, token, examples=15)
        api.try_without_token(route)
    user = {"Authorization": f"Bearer {fresh_supabase.user_token('github:42')}"}
    for route in sorted(api.operations):
        if "/api/sync/" not in route:
            api.try_route(route, user, examples=15)
