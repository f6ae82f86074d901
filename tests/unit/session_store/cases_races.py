"""Cases for every store: writes that meet, in threads and between reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from local_store.clock import new_id
from syncer.sessions import ConcurrentModificationError, SessionNotFound, SessionStore
from tests.unit.session_store.support import ALICE, OpenStore, a_revision, a_session, got


class Between:
    """An id source that lets something happen once, after the rows were read."""

    def __init__(self) -> None:
        self.then: Callable[[], object] | None = None

    def __call__(self) -> str:
        then, self.then = self.then, None
        if then is not None:
            then()
        return new_id()


class RaceCases:
    """Whatever comes between, nothing is lost and nobody overwrites."""

    def test_disjoint_changes_from_racing_copies_are_all_kept(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        stores = [open_store(ALICE) for _ in range(6)]
        copies = [got(store, session) for store in stores]

        def change(number: int) -> None:
            copies[number].metadata[f"k{number}"] = number
            copies[number].revisions.append(a_revision(str(number)))
            stores[number].update(copies[number])

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(change, range(6)))
        found = got(sessions, session)
        assert found.metadata == {f"k{number}": number for number in range(6)}
        assert {r.content for r in found.revisions[1:]} == {str(number) for number in range(6)}

    def test_of_racing_changes_of_one_field_exactly_one_gets_through(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session(key="before")
        sessions.create(session)
        stores = [open_store(ALICE) for _ in range(6)]
        copies = [got(store, session) for store in stores]

        def change(number: int) -> bool:
            copies[number].metadata["key"] = number
            try:
                stores[number].update(copies[number])
            except ConcurrentModificationError:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(change, range(6)))
        assert won.count(True) == 1
        assert got(sessions, session).metadata == {"key": won.index(True)}

    def test_an_update_that_races_a_deletion_is_kept_whole_or_told(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        other = open_store(ALICE)
        stale = got(other, session)
        stale.revisions.append(a_revision("late"))

        def change() -> bool:
            try:
                other.update(stale)
            except SessionNotFound:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            told = pool.submit(change)
            pool.submit(sessions.delete, session.session_id).result()
        assert told.result() in (True, False)
        assert sessions.get(session.session_id) is None, "the deletion came through in any case"
        assert sessions.list_all() == []

    def test_appends_from_many_threads_all_stay(self, sessions: SessionStore) -> None:
        session = a_session()
        sessions.create(session)

        def append(number: int) -> None:
            mine = got(sessions, session)
            mine.add_revision(a_revision(str(number)))
            sessions.update(mine)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(append, range(24)))
        contents = {r.content for r in got(sessions, session).revisions[1:]}
        assert contents == {str(number) for number in range(24)}

    def test_a_loaded_session_that_was_changed_since_is_merged_with_that(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        store = open_store(ALICE)
        loaded = store.load(session.session_id)
        assert loaded is not None
        theirs = got(sessions, session)
        theirs.add_revision(a_revision("theirs"))
        sessions.update(theirs)
        loaded.metadata["mine"] = 1
        loaded.add_revision(a_revision("mine"))
        store.update(loaded)
        found = got(sessions, session)
        assert found.metadata == {"mine": 1}
        assert [r.content for r in found.revisions[1:]] == ["theirs", "mine"]

    def test_a_loaded_session_that_was_deleted_since_is_missing_even_if_nothing_changed(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        store = open_store(ALICE)
        loaded = store.load(session.session_id)
        assert loaded is not None
        sessions.delete(session.session_id)
        with pytest.raises(SessionNotFound):
            store.update(loaded)

    def test_a_session_loaded_by_one_store_can_be_changed_in_another(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = a_session()
        sessions.create(session)
        loaded = open_store(ALICE).load(session.session_id)
        assert loaded is not None
        loaded.finalize()
        sessions.update(loaded)
        assert got(sessions, session) == loaded

    def test_a_change_between_reading_and_writing_is_merged_or_told(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        between = Between()
        store = open_store(ALICE, ids=between)
        session = a_session(key=1)
        sessions.create(session)

        def elsewhere(**metadata: Any) -> None:
            found = got(sessions, session)
            found.metadata.update(metadata)
            sessions.update(found)

        mine = got(store, session)
        mine.metadata["mine"] = 1
        mine.revisions.append(a_revision("mine"))
        between.then = lambda: elsewhere(theirs=1)
        store.update(mine)
        found = got(sessions, session)
        assert found.metadata == {"key": 1, "mine": 1, "theirs": 1}
        assert [r.content for r in found.revisions] == ["Sort a list", "mine"]
        mine.metadata["key"] = 2
        mine.revisions.append(a_revision("more"))
        between.then = lambda: elsewhere(key=3)
        with pytest.raises(ConcurrentModificationError):
            store.update(mine)
        assert got(sessions, session).metadata == {"key": 3, "mine": 1, "theirs": 1}

    def test_a_deletion_between_reading_and_writing_is_told(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        between = Between()
        store = open_store(ALICE, ids=between)
        session = a_session()
        sessions.create(session)
        mine = got(store, session)
        mine.revisions.append(a_revision("late"))
        between.then = lambda: sessions.delete(session.session_id)
        with pytest.raises(SessionNotFound):
            store.update(mine)
        assert sessions.list_all() == []
