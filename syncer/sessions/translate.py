"""From a prompt to an IR, and from an answer to the IR without its hole.

The translator is injected: the product's may ask a model. `SketchTranslator` is the default, pure
and deterministic: the same prompt gives the same IR, so demos, drills and tests have holes to fill.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from syncer.sessions.models import ResolutionType

IR = dict[str, Any]
Translate = Callable[[str], IR | Awaitable[IR]]
Fill = Callable[[IR, str, str, ResolutionType], IR | Awaitable[IR]]

SUMMARY_CHARS_MAX = 200
_DESCRIPTION = "Say what is meant here, so that the specification has one meaning."
_TYPE_HINTS = {"signature": "type", "intent": "string", "effect": "effect"}


class Translator(Protocol):
    """Both directions; either may be a coroutine function, neither may change its arguments."""

    def translate(self, prompt: str) -> IR | Awaitable[IR]:
        """Return the IR of a prompt, with holes where it says too little."""

    def fill(self, ir: IR, hole_id: str, text: str, type: ResolutionType) -> IR | Awaitable[IR]:
        """Return the IR with `text` in the place of a hole; an unknown hole is accepted."""


@dataclass(frozen=True, slots=True)
class TranslatorOf:
    """A translator made of two callables."""

    translate: Translate
    fill: Fill


class SketchTranslator:
    """Sketches an IR from the words of a prompt; no model, no network, no state."""

    def translate(self, prompt: str) -> IR:
        """Return an IR with two to four holes."""
        words = re.findall(r"\w+", prompt.lower())
        subject = "_".join(words[:2]) or "routine"
        ir: IR = {
            "intent": {
                "summary": prompt[:SUMMARY_CHARS_MAX].strip(),
                "rationale": None,
                "holes": [],
            },
            "signature": {
                "name": subject,
                "parameters": [
                    {"name": "arg0", "type_hint": "unknown", "description": "The input"}
                ],
                "returns": None,
                "holes": [_hole("arg0_type", "signature"), _hole("return_type", "signature")],
            },
            "effects": [],
            "assertions": [],
            "metadata": {
                "source_path": None,
                "language": "python",
                "origin": "prompt",
                "evidence": [],
            },
        }
        if len(words) < 6:
            ir["intent"]["holes"].append(_hole("detailed_intent", "intent"))
        if len(words) % 2:
            hole = _hole("side_effects", "effect")
            ir["effects"].append({"description": hole["description"], "holes": [hole]})
        return ir

    def fill(self, ir: IR, hole_id: str, text: str, type: ResolutionType) -> IR:
        """Return `ir` with the answer worked in and the hole gone; see `fill_hole`."""
        return fill_hole(ir, hole_id, text)


def fill_hole(ir: IR, hole_id: str, text: str) -> IR:
    """Return a copy of `ir` without the hole, the answer written where its kind belongs.

    An IR of another shape, or without such a hole, comes back as it is.
    """
    filled = copy.deepcopy(ir)
    removed = [hole for clause in _clauses(filled) for hole in _remove(clause, hole_id)]
    if removed:
        _work_in(filled, removed[0], text)
    return filled


def _hole(identifier: str, kind: str) -> dict[str, Any]:
    return {
        "identifier": identifier,
        "type_hint": _TYPE_HINTS[kind],
        "description": _DESCRIPTION,
        "constraints": {"priority": "medium"},
        "kind": kind,
    }


def _clauses(ir: IR) -> Iterator[dict[str, Any]]:
    for value in ir.values():
        for clause in value if isinstance(value, list) else [value]:
            if isinstance(clause, dict) and isinstance(clause.get("holes"), list):
                yield clause


def _remove(clause: dict[str, Any], hole_id: str) -> list[dict[str, Any]]:
    holes = clause["holes"]
    removed = [h for h in holes if isinstance(h, dict) and h.get("identifier") == hole_id]
    clause["holes"] = [h for h in holes if h not in removed]
    return removed


def _work_in(ir: IR, hole: dict[str, Any], text: str) -> None:
    """Write the answer where its kind belongs, as far as the IR has that place."""
    kind = hole.get("kind")
    if kind == "effect":
        _append(ir, "effects", {"description": text, "holes": []})
    elif kind == "assertion":
        _append(ir, "assertions", {"predicate": text, "rationale": None, "holes": []})
    elif kind == "intent" and isinstance(ir.get("intent"), dict):
        said = ir["intent"].get("rationale")
        ir["intent"]["rationale"] = f"{said}\n{text}" if said else text
    elif kind == "signature" and isinstance(ir.get("signature"), dict):
        _type_in(ir["signature"], hole["identifier"], text)


def _append(ir: IR, name: str, clause: dict[str, Any]) -> None:
    clauses = ir.setdefault(name, [])
    if isinstance(clauses, list):
        clauses.append(clause)


def _type_in(signature: dict[str, Any], identifier: str, text: str) -> None:
    if identifier == "return_type":
        signature["returns"] = text
    parameters = signature.get("parameters")
    for parameter in parameters if isinstance(parameters, list) else []:
        if isinstance(parameter, dict) and f"{parameter.get('name')}_type" == identifier:
            parameter["type_hint"] = text
