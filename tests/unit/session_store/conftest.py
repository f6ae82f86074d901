"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local_store import LocalStore
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
)
from tests.unit.session_server import ReadServer
from tests.unit.session_store.support import ALICE


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        yield store


@pytest.fixture
def sessions(local: LocalStore) -> BufferedSessionStore:
    return BufferedSessionStore(local, ALICE)


@pytest.fixture
def server() -> ReadServer:
    return ReadServer()


@pytest.fixture
def through(local: LocalStore, server: ReadServer) -> BufferedSessionStore:
    """Alice's sessions with a server to read through to."""
    return BufferedSessionStore(local, ALICE, server, lambda: not server.is_down)
