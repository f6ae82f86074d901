"""What every session store promises, as one suite.

A test class inherits it and gives the fixture `open_store`: a function that opens a user's store,
each time as another object on the same rows, which are empty when a test begins. It passes on
`ids`, the store's source of fresh ids.
"""

from __future__ import annotations

import pytest

from syncer.sessions import SessionStore
from tests.unit.session_store.cases_life import LifeCases
from tests.unit.session_store.cases_races import RaceCases
from tests.unit.session_store.cases_refusals import RefusalCases
from tests.unit.session_store.cases_requests import RequestCases
from tests.unit.session_store.cases_round_trip import RoundTripCases
from tests.unit.session_store.cases_stale_copies import StaleCopyCases
from tests.unit.session_store.support import ALICE, OpenStore


class SessionStoreConformance(
    RoundTripCases, StaleCopyCases, RaceCases, RefusalCases, RequestCases, LifeCases
):
    """All cases; `sessions` is Alice's store."""

    @pytest.fixture
    def sessions(self, open_store: OpenStore) -> SessionStore:
        return open_store(ALICE)
