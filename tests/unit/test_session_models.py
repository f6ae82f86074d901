"""What sessions are and do, without a store."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
from pydantic import ValidationError

from syncer.sessions import HoleResolution, IRDraft, PromptRevision, PromptSession
from syncer.sessions.models import hole_ids, moment_of
from syncer.sessions.translate import SketchTranslator, fill_hole

ODD_STAMPS = ("2025-10-19T10:00:00.5+00:00Z", "2025-10-19T10:00:00Z", "2025-10-19T12:00:00+02:00")


def whole_session() -> PromptSession:
    session = PromptSession.create_new(metadata={"tags": ["a"], "nested": {"n": None, "x": 1.5}})
    session.user_id = "github:42"
    session.created_at = ODD_STAMPS[0]
    session.add_revision(PromptRevision(content="Straße 東京 🧾", revision_type="initial"))
    session.add_draft(IRDraft(version=1, ir={"intent": {"holes": [{"identifier": "h"}]}}))
    session.add_resolution(HoleResolution(hole_id="h", resolution_text="int"))
    session.updated_at = ODD_STAMPS[1]
    return session


def test_a_new_session_has_the_defaults_of_the_contract() -> None:
    session = PromptSession.create_new()
    assert session.status == "active"
    assert session.source == "prompt"
    assert session.user_id is None
    assert session.current_draft is None
    assert (session.revisions, session.ir_drafts, session.pending_resolutions) == ([], [], [])
    assert session.metadata == {}
    assert session.created_at == session.updated_at


def test_a_document_holds_exactly_the_fields_of_the_contract() -> None:
    document = whole_session().to_dict()
    assert set(document) == {
        "session_id",
        "user_id",
        "created_at",
        "updated_at",
        "status",
        "source",
        "revisions",
        "ir_drafts",
        "current_draft",
        "pending_resolutions",
        "metadata",
    }
    assert set(document["revisions"][0]) == {
        "timestamp",
        "content",
        "revision_type",
        "target_hole",
        "metadata",
    }
    assert set(document["ir_drafts"][0]) == {
        "version",
        "ir",
        "validation_status",
        "smt_results",
        "ambiguities",
        "created_at",
        "metadata",
    }


def test_a_session_survives_the_way_through_a_document() -> None:
    session = whole_session()
    again = PromptSession.from_dict(session.to_dict())
    assert again.to_dict() == session.to_dict()
    assert again == session
    assert again.created_at == ODD_STAMPS[0]


def test_a_document_shares_nothing_with_its_session() -> None:
    session = whole_session()
    session.to_dict()["metadata"]["tags"].append("b")
    assert session.metadata["tags"] == ["a"]


def test_the_current_draft_is_one_of_the_drafts_again_after_a_document() -> None:
    again = PromptSession.from_dict(whole_session().to_dict())
    assert again.current_draft is again.ir_drafts[0]


def test_adding_a_draft_makes_it_the_current_one() -> None:
    session = whole_session()
    draft = IRDraft(version=1, ir={})  # a repeated version is ordinary
    session.add_draft(draft)
    assert session.current_draft is draft
    assert [d.version for d in session.ir_drafts] == [1, 1]


@pytest.mark.parametrize("change", ["finalize", "abandon"])
def test_each_change_moves_updated_at(change: str) -> None:
    session = whole_session()
    getattr(session, change)()
    assert session.updated_at != ODD_STAMPS[1]
    assert session.status == {"finalize": "finalized", "abandon": "abandoned"}[change]


def test_marking_applied_takes_the_oldest_open_answer_of_the_hole() -> None:
    session = whole_session()
    session.add_resolution(HoleResolution(hole_id="h", resolution_text="str"))
    session.mark_resolution_applied("h")
    assert [r.applied for r in session.pending_resolutions] == [True, False]
    session.mark_resolution_applied("h")
    assert [r.applied for r in session.pending_resolutions] == [True, True]
    session.mark_resolution_applied("nothing of that name")


def test_holes_come_from_ambiguities_and_from_anywhere_in_the_ir() -> None:
    ir = {
        "signature": {"holes": [{"identifier": "b"}, {"identifier": "a"}]},
        "effects": [{"holes": [{"identifier": "c"}]}, {"holes": "no list"}, 7],
    }
    session = PromptSession.create_new(initial_draft=IRDraft(version=1, ir=ir, ambiguities=["z"]))
    assert session.get_unresolved_holes() == ["z", "b", "a", "c"]


def test_an_applied_answer_closes_a_hole_and_an_open_one_does_not() -> None:
    draft = IRDraft(version=1, ir={}, ambiguities=["a", "b"])
    session = PromptSession.create_new(initial_draft=draft)
    session.add_resolution(HoleResolution(hole_id="a", resolution_text="x"))
    session.add_resolution(HoleResolution(hole_id="b", resolution_text="y"))
    session.mark_resolution_applied("a")
    assert session.get_unresolved_holes() == ["b"]


def test_a_later_draft_with_the_hole_opens_it_again() -> None:
    session = PromptSession.create_new()
    session.add_resolution(HoleResolution(hole_id="a", resolution_text="x", applied=True))
    session.add_draft(IRDraft(version=2, ir={}, ambiguities=["a"]))
    assert session.get_unresolved_holes() == ["a"]


def test_a_very_deep_ir_has_its_holes_found() -> None:
    ir: dict[str, object] = {"holes": [{"identifier": "deep"}]}
    for _ in range(5_000):
        ir = {"x": ir}
    assert hole_ids(ir) == ["deep"]


def test_a_validation_error_does_not_print_what_the_user_wrote() -> None:
    with pytest.raises(ValidationError) as raised:
        PromptRevision.from_dict({"content": "the user's secret", "revision_type": "poem"})
    assert "poem" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("stamp", ODD_STAMPS)
def test_every_form_of_timestamp_names_the_same_moment(stamp: str) -> None:
    moment = moment_of(stamp)
    assert moment is not None
    assert (moment.hour, moment.utcoffset()) == (10, timedelta(0))
    assert moment.date().isoformat() == "2025-10-19"


@pytest.mark.parametrize("stamp", ["", "yesterday", None, 7, "0001-01-01T00:00:00+14:00"])
def test_what_names_no_moment_is_none(stamp: object) -> None:
    assert moment_of(stamp) is None


def test_a_copy_is_equal_and_independent() -> None:
    session = whole_session()
    twin = copy.deepcopy(session)
    assert twin == session
    twin.metadata["tags"].append("b")
    assert twin != session


def test_a_sketch_is_the_same_for_the_same_prompt_and_has_holes() -> None:
    sketch = SketchTranslator()
    prompt = "Parse an ISO-8601 duration string into seconds"
    assert sketch.translate(prompt) == sketch.translate(prompt)
    assert len(hole_ids(sketch.translate(prompt))) >= 2
    assert sketch.translate("")["signature"]["name"] == "routine"


def test_filling_each_hole_of_a_sketch_leaves_none_and_keeps_the_answers() -> None:
    ir = SketchTranslator().translate("Count words")
    ir["effects"].append({"description": "?", "holes": [{"identifier": "fx", "kind": "effect"}]})
    before = copy.deepcopy(ir)
    filled = ir
    for number, hole in enumerate(hole_ids(ir)):
        filled = fill_hole(filled, hole, f"answer {number}")
    assert hole_ids(filled) == []
    for number in range(len(hole_ids(ir))):
        assert f"answer {number}" in str(filled)
    assert ir == before


def test_filling_an_unknown_hole_changes_nothing() -> None:
    ir = SketchTranslator().translate("Count words")
    assert fill_hole(ir, "no such hole", "text") == ir
    assert fill_hole({"of": "another shape"}, "h", "text") == {"of": "another shape"}


@pytest.mark.parametrize("kind", ["intent", "signature", "effect", "assertion", "another", None])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"intent": [], "signature": [], "effects": {}, "assertions": "none"},
        {"intent": None, "signature": {"parameters": {"name": "h"}}, "effects": None},
        {"intent": {}, "signature": {"parameters": ["h", {"name": "h"}]}, "effects": []},
    ],
)
def test_filling_a_hole_of_an_ir_of_any_shape_takes_the_hole_and_breaks_nothing(
    kind: str | None, shape: dict
) -> None:
    ir = {**shape, "clause": {"holes": [{"identifier": "h_type", "kind": kind}, "odd"]}}
    filled = fill_hole(ir, "h_type", "the answer")
    assert filled["clause"]["holes"] == ["odd"]
    places = {
        "intent": isinstance(shape.get("intent"), dict),
        "signature": isinstance(dict(shape.get("signature") or {}).get("parameters"), list),
        "effect": isinstance(shape.get("effects", []), list),
        "assertion": isinstance(shape.get("assertions", []), list),
    }
    assert ("the answer" in str(filled)) == places.get(kind or "", False)


def test_holes_without_an_identifier_are_no_holes() -> None:
    assert hole_ids({"holes": [{"kind": "intent"}, {"identifier": 7}, None, "h", 5]}) == ["h"]


def test_a_session_without_a_draft_has_no_holes() -> None:
    assert PromptSession.create_new().get_unresolved_holes() == []


def test_a_document_with_another_current_draft_keeps_it() -> None:
    session = whole_session()
    session.current_draft = IRDraft(version=9, ir={})
    again = PromptSession.from_dict(session.to_dict())
    assert again == session
    assert again.current_draft not in again.ir_drafts
