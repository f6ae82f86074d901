"""Cases for every store: the life of a session as an application plays it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from syncer.sessions import (
    DraftNotFound,
    IdempotencyMismatch,
    PromptSession,
    RequestKey,
    SessionNotFound,
    SessionStore,
    SpecSessionManager,
)
from syncer.sessions.models import hole_ids
from tests.unit.session_store.support import ALICE, BOB, OpenStore, got

PROMPT = "Create a function that adds two numbers"
HOLES = [f"hole_{number}" for number in range(5)]
FIVE_HOLES = {
    "intent": {
        "summary": "five open questions",
        "rationale": None,
        "holes": [{"identifier": hole, "kind": "intent"} for hole in HOLES],
    }
}


def key(name: str, asks: str = "this") -> RequestKey:
    return RequestKey.derive(ALICE, name, asks)


class AsyncTranslator:
    """Translates and fills as a model behind a network would."""

    async def translate(self, prompt: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"said": prompt, "holes": [{"identifier": "h"}]}

    async def fill(self, ir: dict[str, Any], hole_id: str, text: str, type: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {**ir, "holes": [], "filled": [hole_id, text, type]}


class SyncTranslator:
    """The same without coroutines."""

    def translate(self, prompt: str) -> dict[str, Any]:
        return {"said": prompt, "holes": [{"identifier": "h"}]}

    def fill(self, ir: dict[str, Any], hole_id: str, text: str, type: str) -> dict[str, Any]:
        return {**ir, "holes": [], "filled": [hole_id, text, type]}


class LifeCases:
    """SpecSessionManager on the store."""

    async def test_a_session_lives_from_its_prompt_to_its_end(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        manager = SpecSessionManager(sessions)
        session = await manager.create_from_prompt(PROMPT, {"client": "cli"})
        assert got(sessions, session) == session
        hole = session.get_unresolved_holes()[0]
        after = await manager.resolve_hole(session.session_id, hole, "int", "refine_signature")
        assert [s.session_id for s in await manager.list_active_sessions()] == [session.session_id]
        await manager.finalize_session(session.session_id)
        found = got(open_store(ALICE), session)
        assert (found.status, len(found.revisions)) == ("finalized", 2)
        assert found.ir_drafts == after.ir_drafts
        assert await manager.list_active_sessions() == []
        assert await manager.get_session(session.session_id) == found
        assert await manager.delete_session(session.session_id) == found
        assert await manager.get_session(session.session_id) is None

    async def test_a_rollback_is_kept_and_opens_the_holes_again(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        manager = SpecSessionManager(sessions)
        session = await manager.create_from_prompt(PROMPT)
        holes = session.get_unresolved_holes()
        await manager.resolve_hole(session.session_id, holes[0], "int")
        after = await manager.rollback(session.session_id, 1)
        found = got(open_store(ALICE), session)
        assert found == after
        assert [d.version for d in found.ir_drafts] == [1, 2, 3]
        assert found.current_draft is found.ir_drafts[2]
        assert found.current_draft.ir == session.ir_drafts[0].ir
        assert found.get_unresolved_holes() == holes
        filled = await manager.resolve_hole(session.session_id, holes[0], "float")
        assert got(open_store(ALICE), session) == filled
        with pytest.raises(DraftNotFound):
            await manager.rollback(session.session_id, 17)

    @pytest.mark.parametrize("translator", [AsyncTranslator(), SyncTranslator()])
    async def test_a_translator_may_be_plain_or_made_of_coroutines(
        self, sessions: SessionStore, translator: Any
    ) -> None:
        manager = SpecSessionManager(sessions, translator)
        session = await manager.create_from_prompt(PROMPT)
        after = await manager.resolve_hole(session.session_id, "h", "x", "add_constraint")
        assert got(sessions, session) == after
        assert after.ir_drafts[0].ir == {"said": PROMPT, "holes": [{"identifier": "h"}]}
        assert after.ir_drafts[1].ir["filled"] == ["h", "x", "add_constraint"]

    @pytest.mark.parametrize("translate", [AsyncTranslator().translate, SyncTranslator().translate])
    async def test_a_function_or_a_coroutine_function_may_translate(
        self, sessions: SessionStore, translate: Any
    ) -> None:
        session = await SpecSessionManager(sessions, translate).create_from_prompt(PROMPT)
        assert got(sessions, session).ir_drafts[0].ir["said"] == PROMPT

    async def test_five_answers_at_once_all_succeed_and_all_five_are_there(
        self, sessions: SessionStore
    ) -> None:
        manager = SpecSessionManager(sessions)
        session = await manager.create_from_reverse_mode(FIVE_HOLES)
        await asyncio.gather(
            *(manager.resolve_hole(session.session_id, hole, f"about {hole}") for hole in HOLES)
        )
        assert_five_are_answered(got(sessions, session))

    async def test_five_answers_at_once_through_five_stores_all_succeed(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        session = await SpecSessionManager(sessions).create_from_reverse_mode(FIVE_HOLES)
        await asyncio.gather(
            *(
                SpecSessionManager(open_store(ALICE)).resolve_hole(
                    session.session_id, hole, f"about {hole}"
                )
                for hole in HOLES
            )
        )
        assert_five_are_answered(got(sessions, session))

    async def test_two_users_see_and_change_only_their_own(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        bobs = SpecSessionManager(open_store(BOB))
        session = await SpecSessionManager(sessions).create_from_prompt(PROMPT)
        own = await bobs.create_from_prompt(PROMPT)
        assert [s.session_id for s in await bobs.list_active_sessions()] == [own.session_id]
        assert await bobs.get_session(session.session_id) is None
        for call in (
            bobs.finalize(session.session_id),
            bobs.abandon(session.session_id),
            bobs.resolve_hole(session.session_id, "h", "x"),
            bobs.rollback(session.session_id, 1),
            bobs.delete_session(session.session_id),
        ):
            with pytest.raises(SessionNotFound):
                await call
        assert got(sessions, session) == session

    async def test_a_keyed_call_twice_has_one_effect_and_one_answer(
        self, sessions: SessionStore, open_store: OpenStore
    ) -> None:
        first, again = (SpecSessionManager(store) for store in (sessions, open_store(ALICE)))
        session = await first.create_from_prompt(PROMPT, request=key("k1"))
        assert await again.create_from_prompt(PROMPT, request=key("k1")) == session
        sid = session.session_id
        for name, call in (
            ("k2", lambda m, r: m.resolve_hole(sid, "h", "x", request=r)),
            ("k3", lambda m, r: m.rollback(sid, 1, request=r)),
            ("k4", lambda m, r: m.finalize(sid, request=r)),
        ):
            once = await call(first, key(name))
            assert await call(again, key(name)) == once
        assert await first.delete_session(sid, request=key("k5")) is not None
        assert await again.delete_session(sid, request=key("k5")) is None

    async def test_the_same_keyed_calls_at_once_have_one_effect(
        self, sessions: SessionStore
    ) -> None:
        manager = SpecSessionManager(sessions)
        made = await asyncio.gather(
            *(manager.create_from_prompt(PROMPT, request=key("k1")) for _ in range(5))
        )
        assert all(session == made[0] for session in made)
        sid = made[0].session_id
        answered = await asyncio.gather(
            *(manager.resolve_hole(sid, "h", "x", request=key("k2")) for _ in range(5))
        )
        assert all(len(session.pending_resolutions) == 1 for session in answered)
        assert len(got(sessions, made[0]).ir_drafts) == 2

    async def test_a_key_used_for_something_else_changes_nothing(
        self, sessions: SessionStore
    ) -> None:
        manager = SpecSessionManager(sessions)
        session = await manager.create_from_prompt(PROMPT, request=key("k1", "create this"))
        other = await manager.create_from_prompt(PROMPT)
        for call in (
            manager.create_from_prompt("another", request=key("k1", "create that")),
            manager.resolve_hole(session.session_id, "h", "x", request=key("k1", "resolve")),
            manager.finalize(other.session_id, request=key("k1", "finalize")),
            manager.delete_session(other.session_id, request=key("k1", "delete")),
        ):
            with pytest.raises(IdempotencyMismatch):
                await call
        assert got(sessions, session) == session
        assert got(sessions, other) == other


def assert_five_are_answered(found: PromptSession) -> None:
    assert {r.hole_id for r in found.pending_resolutions} == set(HOLES)
    assert all(r.applied for r in found.pending_resolutions)
    assert {r.target_hole for r in found.revisions} == set(HOLES)
    assert sorted(d.version for d in found.ir_drafts) == [1, 2, 3, 4, 5, 6]
    assert found.current_draft is not None
    assert hole_ids(found.current_draft.ir) == []
    for hole in HOLES:
        assert f"about {hole}" in found.current_draft.ir["intent"]["rationale"]
