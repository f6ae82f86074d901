"""The life of a session as the application plays it, on the real buffer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from local_store import InvalidWrite, LocalStore
from local_store.clock import new_id
from syncer.core.batch import Batch
from syncer.core.verdict import Verdict
from syncer.sessions import (
    SESSION_TABLES,
    BufferedSessionStore,
    ConcurrentModificationError,
    DraftNotFound,
    IdempotencyMismatch,
    InMemorySessionStore,
    MemoryRows,
    PromptSession,
    RequestKey,
    SessionNotFound,
    SketchTranslator,
    SpecSessionManager,
    SupabaseSessionStore,
)
from syncer.sessions.manager import CHANGE_ATTEMPTS_MAX
from syncer.sessions.models import draft_of, hole_ids
from tests.simulation.session_model import SessionModel

T = TypeVar("T")

USER = "github:42"
PROMPT = "Create a function that adds two numbers"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path, tables=SESSION_TABLES) as store:
        yield store


@pytest.fixture
def store(local: LocalStore) -> BufferedSessionStore:
    return BufferedSessionStore(local, USER)


@pytest.fixture
def manager(store: BufferedSessionStore) -> SpecSessionManager:
    return SpecSessionManager(store)


def key(name: str, asks: str = "this") -> RequestKey:
    return RequestKey.derive(USER, name, asks)


def kept(store: BufferedSessionStore, session: PromptSession) -> PromptSession:
    found = store.get(session.session_id)
    assert found is not None
    return found


async def test_a_prompt_becomes_a_session_with_a_revision_and_a_draft_with_holes(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = await manager.create_from_prompt(PROMPT, {"client": "cli"})
    assert session.user_id == USER
    assert [(r.content, r.revision_type) for r in session.revisions] == [(PROMPT, "initial")]
    assert session.current_draft is session.ir_drafts[0]
    assert session.current_draft.ambiguities == hole_ids(session.current_draft.ir) != []
    assert session.current_draft.validation_status == "incomplete"
    assert kept(store, session) == session


async def test_a_lifted_ir_becomes_a_session_without_a_revision(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    ir = {"intent": {"summary": "lifted", "holes": []}}
    session = await manager.create_from_reverse_mode(ir)
    assert (session.source, session.revisions) == ("reverse_mode", [])
    ir["intent"]["summary"] = "changed by the caller"
    assert kept(store, session).ir_drafts[0].ir["intent"]["summary"] == "lifted"


async def test_resolving_a_hole_adds_answer_revision_and_draft(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = await manager.create_from_prompt(PROMPT)
    first, *rest = session.get_unresolved_holes()
    after = await manager.resolve_hole(session.session_id, first, "int", "refine_signature")
    assert after.get_unresolved_holes() == rest
    assert [d.version for d in after.ir_drafts] == [1, 2]
    assert after.current_draft is after.ir_drafts[1]
    [answer] = after.pending_resolutions
    assert (answer.hole_id, answer.resolution_type, answer.applied) == (
        first,
        "refine_signature",
        True,
    )
    assert (after.revisions[1].revision_type, after.revisions[1].target_hole) == (
        "hole_fill",
        first,
    )
    assert after.ir_drafts[0] == session.ir_drafts[0], "the older draft stays as it was"
    assert kept(store, session) == after


async def test_the_whole_life_of_a_session(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = await manager.create_from_prompt("Create a function")
    await manager.resolve_hole(session.session_id, "hole_function_name", "calculate_sum")
    assert await manager.list_active_sessions() == [kept(store, session)]
    await manager.finalize_session(session.session_id)
    found = await manager.get_session(session.session_id)
    assert found is not None
    assert (found.status, len(found.revisions)) == ("finalized", 2)
    assert await manager.list_active_sessions() == []
    gone = await manager.delete_session(session.session_id)
    assert gone == found
    assert await manager.get_session(session.session_id) is None


async def test_one_hole_may_be_answered_twice(manager: SpecSessionManager) -> None:
    session = await manager.create_from_prompt(PROMPT)
    hole = session.get_unresolved_holes()[0]
    await manager.resolve_hole(session.session_id, hole, "int")
    after = await manager.resolve_hole(session.session_id, hole, "float")
    assert [r.resolution_text for r in after.pending_resolutions] == ["int", "float"]
    assert len(after.ir_drafts) == 3


async def test_five_concurrent_answers_to_one_session_all_succeed(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = await manager.create_from_prompt(PROMPT)
    holes = session.get_unresolved_holes()
    names = (holes + [f"extra_{n}" for n in range(5)])[:5]
    await asyncio.gather(
        *(manager.resolve_hole(session.session_id, name, f"value of {name}") for name in names)
    )
    found = kept(store, session)
    assert {r.hole_id for r in found.pending_resolutions} == set(names)
    assert all(r.applied for r in found.pending_resolutions)
    assert sorted(d.version for d in found.ir_drafts) == [1, 2, 3, 4, 5, 6]
    assert found.get_unresolved_holes() == [h for h in holes if h not in names]
    assert found.current_draft is not None
    assert found.current_draft.version == 6


async def test_a_rollback_appends_the_older_draft_and_opens_its_holes_again(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = await manager.create_from_prompt(PROMPT)
    holes = session.get_unresolved_holes()
    await manager.resolve_hole(session.session_id, holes[0], "int")
    after = await manager.rollback(session.session_id, 1)
    assert [d.version for d in after.ir_drafts] == [1, 2, 3]
    assert after.current_draft is not None
    assert after.current_draft.ir == session.ir_drafts[0].ir
    assert after.get_unresolved_holes() == holes
    assert kept(store, session) == after
    with pytest.raises(DraftNotFound):
        await manager.rollback(session.session_id, 17)


async def test_a_session_that_is_not_there_is_said_to_be_missing(
    manager: SpecSessionManager,
) -> None:
    missing = new_id()
    assert await manager.get_session(missing) is None
    for call in (
        manager.finalize(missing),
        manager.abandon(missing),
        manager.resolve_hole(missing, "h", "x"),
        manager.rollback(missing, 1),
        manager.delete_session(missing),
    ):
        with pytest.raises(SessionNotFound):
            await call


async def test_a_coroutine_may_translate_and_carry_its_own_fill(
    store: BufferedSessionStore,
) -> None:
    class Model:
        async def translate(self, prompt: str) -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"said": prompt, "holes": [{"identifier": "h"}]}

        async def fill(self, ir: dict[str, Any], hole_id: str, text: str, type: str) -> Any:
            ir["holes"] = []  # in place, as it should not: the older draft must not notice
            return {**ir, "filled": [hole_id, text, type]}

    manager = SpecSessionManager(store, Model())
    session = await manager.create_from_prompt(PROMPT)
    after = await manager.resolve_hole(session.session_id, "h", "x", "add_constraint")
    assert after.ir_drafts[0].ir == {"said": PROMPT, "holes": [{"identifier": "h"}]}
    assert after.ir_drafts[1].ir["filled"] == ["h", "x", "add_constraint"]


async def test_a_plain_function_may_translate(store: BufferedSessionStore) -> None:
    manager = SpecSessionManager(store, lambda prompt: {"said": prompt})
    session = await manager.create_from_prompt(PROMPT)
    after = await manager.resolve_hole(session.session_id, "h", "x")
    assert [d.ir for d in after.ir_drafts] == [{"said": PROMPT}] * 2


async def test_a_session_without_a_draft_keeps_the_answer_unapplied(
    manager: SpecSessionManager, store: BufferedSessionStore
) -> None:
    session = PromptSession.create_new()
    store.create(session)
    after = await manager.resolve_hole(session.session_id, "h", "x")
    assert (after.ir_drafts, after.pending_resolutions[0].applied) == ([], False)


async def test_what_could_not_be_delivered_is_refused(
    manager: SpecSessionManager, local: LocalStore
) -> None:
    with pytest.raises(InvalidWrite):
        await manager.create_from_prompt("a\x00b")
    assert local.stats()["last_seq"] == 0


# -- idempotency keys ------------------------------------------------------------------------------


async def test_one_request_twice_has_one_effect_and_one_answer(
    manager: SpecSessionManager, local: LocalStore
) -> None:
    first = await manager.create_from_prompt(PROMPT, request=key("k1"))
    assert await manager.create_from_prompt(PROMPT, request=key("k1")) == first
    sid = first.session_id
    for name, call in (
        ("k2", lambda r: manager.resolve_hole(sid, "h", "x", request=r)),
        ("k3", lambda r: manager.rollback(sid, 1, request=r)),
        ("k4", lambda r: manager.finalize(sid, request=r)),
        ("k5", lambda r: manager.abandon(sid, request=r)),
    ):
        once = await call(key(name))
        twice = await call(key(name))
        assert once == twice
    assert local.stats()["last_seq"] == 5
    assert await manager.delete_session(sid, request=key("k6")) is not None
    assert await manager.delete_session(sid, request=key("k6")) is None
    assert local.stats()["last_seq"] == 6


async def test_the_ids_of_a_keyed_request_derive_from_its_key(
    manager: SpecSessionManager, local: LocalStore
) -> None:
    session = await manager.create_from_prompt(PROMPT, request=key("k1"))
    assert session.session_id == key("k1").row_id("sessions")
    [draft] = local.select("session_drafts", user_id=USER)
    assert draft["id"] == key("k1").row_id("session_drafts")
    [transaction] = local.pending(transactions_max=9, bytes_max=10**6)
    assert transaction.txn_id == key("k1").txn_id


async def test_a_key_used_for_something_else_is_refused_and_changes_nothing(
    manager: SpecSessionManager, store: BufferedSessionStore, local: LocalStore
) -> None:
    session = await manager.create_from_prompt(PROMPT, request=key("k1", "create this"))
    other = await manager.create_from_prompt(PROMPT)
    before = local.stats()["last_seq"]
    sid = session.session_id
    for call in (
        manager.create_from_prompt("another", request=key("k1", "create that")),
        manager.resolve_hole(sid, "h", "x", request=key("k1", "resolve")),
        manager.finalize(sid, request=key("k1", "finalize")),
        manager.finalize(other.session_id, request=key("k1", "finalize")),
        manager.delete_session(sid, request=key("k1", "delete")),
        manager.delete_session(other.session_id, request=key("k1", "delete")),
    ):
        with pytest.raises(IdempotencyMismatch):
            await call
    assert local.stats()["last_seq"] == before
    assert kept(store, session) == session


async def test_the_same_request_sent_ten_times_at_once_has_one_effect(
    manager: SpecSessionManager, local: LocalStore
) -> None:
    made = await asyncio.gather(
        *(manager.create_from_prompt(PROMPT, request=key("k1")) for _ in range(10))
    )
    assert all(session == made[0] for session in made)
    sid = made[0].session_id
    answers = await asyncio.gather(
        *(manager.resolve_hole(sid, "h", "x", request=key("k2")) for _ in range(10))
    )
    assert all(len(session.pending_resolutions) == 1 for session in answers)
    await asyncio.gather(*(manager.delete_session(sid, request=key("k3")) for _ in range(10)))
    assert local.stats()["last_seq"] == 3


async def test_a_request_that_its_own_repeat_overtakes_answers_what_that_one_made(
    manager: SpecSessionManager, store: BufferedSessionStore, local: LocalStore
) -> None:
    class Overtaken(SketchTranslator):
        def translate(self, prompt: str) -> dict[str, Any]:
            made.append(asyncio.run(manager.create_from_prompt(PROMPT, request=key("k1"))))
            return super().translate(prompt)

    made: list[PromptSession] = []
    slower = SpecSessionManager(store, Overtaken())
    assert [await slower.create_from_prompt(PROMPT, request=key("k1"))] == made
    assert local.stats()["last_seq"] == 1


async def test_a_repeat_is_recognised_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "buffer"
    for _ in range(2):
        with LocalStore.open(folder, tables=SESSION_TABLES) as local:
            manager = SpecSessionManager(BufferedSessionStore(local, USER))
            session = await manager.create_from_prompt(PROMPT, request=key("k1"))
            await manager.resolve_hole(session.session_id, "h", "x", request=key("k2"))
            assert local.stats()["last_seq"] == 2


async def test_a_repeated_creation_of_a_session_deleted_since_does_not_bring_it_back(
    manager: SpecSessionManager,
) -> None:
    session = await manager.create_from_prompt(PROMPT, request=key("k1"))
    await manager.delete_session(session.session_id)
    with pytest.raises(SessionNotFound):
        await manager.create_from_prompt(PROMPT, request=key("k1"))


async def test_a_change_that_never_meets_a_session_at_rest_ends_as_a_conflict() -> None:
    rows = MemoryRows()
    others = InMemorySessionStore(USER, rows)

    class Meddling:
        translate = SketchTranslator().translate
        fills = 0

        def fill(self, ir: dict[str, Any], hole_id: str, text: str, type: str) -> dict[str, Any]:
            self.fills += 1
            [session] = others.list_all()
            session.add_draft(draft_of({"by": "another"}, 0))
            others.update(session)
            return ir

    meddling = Meddling()
    manager = SpecSessionManager(InMemorySessionStore(USER, rows), meddling)
    session = await manager.create_from_prompt(PROMPT)
    with pytest.raises(ConcurrentModificationError) as raised:
        await manager.resolve_hole(session.session_id, "h", "x")
    assert raised.value.fields == ("*",)
    assert meddling.fills == CHANGE_ATTEMPTS_MAX
    assert others.list_all()[0].pending_resolutions == []


async def test_a_key_that_is_refused_and_then_not_known_is_a_mismatch_and_not_guessed_at() -> None:
    class Forgetful(SessionModel):
        """Refuses each write as repeated with other content, and knows of none when asked."""

        def apply_batch(self, batch: Batch) -> tuple[Verdict, ...]:
            asked = batch.transactions[0]
            if asked.after:
                return super().apply_batch(batch)
            return (Verdict(asked.txn_id, "rejected", sqlstate="SYT01"),)

    manager = SpecSessionManager(SupabaseSessionStore(Forgetful(), USER))
    with pytest.raises(IdempotencyMismatch):
        await manager.create_from_prompt(PROMPT, request=key("k1"))
