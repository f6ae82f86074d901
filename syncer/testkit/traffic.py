"""Realistic traffic over HTTP, and what each client knows of it afterwards.

A plan is made from a seed: sessions of several users, each a list of steps that go in order while
sessions interleave. Every write carries an Idempotency-Key, so a client whose connection broke
repeats the call until it knows the outcome, as a real one would.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from local_store.clock import Clock, SystemClock, new_id

StepKind = Literal["create", "resolve", "read", "list", "finalize", "delete"]
UNKNOWN_RETRIES_MAX = 400  # × 50 ms: longer than a restart takes
REQUEST_TIMEOUT_S = 30.0
SESSIONS_AT_ONCE = 24  # interleaved by the dice, so that batches mix users and sessions

PROMPTS = (
    "Parse an ISO-8601 duration string into seconds",
    "Merge two sorted ledgers and keep the newer entry",
    "Normalise postal addresses — café, Straße, 東京",
    "Count words per paragraph; treat tabs as spaces",
    "Validate an IBAN and report the failing rule 🧾",
    "Redact e-mail addresses in a log line",
)
ANSWERS = ("int", "list[str]", "Return None when the input is empty.", "No side effects", "مرحبا")


@dataclass(frozen=True, slots=True)
class Step:
    """One call of one session's script."""

    kind: StepKind
    text: str = ""
    key: str = ""


@dataclass(slots=True)
class Script:
    """One session: its user, its steps, and what its client has been told."""

    user: str
    steps: list[Step]
    session_id: str = ""
    holes: list[str] = field(default_factory=list)
    resolved: int = 0
    status: Literal["unborn", "active", "finalized", "deleted"] = "unborn"


@dataclass(slots=True)
class Tally:
    """What the clients saw; shared by the client threads."""

    acknowledged: int = 0
    acknowledged_during_outage: int = 0
    reads: int = 0
    repeated: int = 0
    errors: list[str] = field(default_factory=list)
    ack_ms: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def plan(seed: int, sessions: int, users: Sequence[str]) -> list[Script]:
    """Return the scripts of a drill; the same seed gives the same scripts."""
    dice = random.Random(seed)
    scripts = []
    for number in range(sessions):
        steps = [Step("create", dice.choice(PROMPTS), _key(dice))]
        for _ in range(dice.choice((1, 2, 2, 3, 4))):
            steps.append(Step("resolve", dice.choice(ANSWERS), _key(dice)))
            if dice.random() < 0.3:
                steps.append(Step(dice.choice(("read", "list"))))
        ending = dice.random()
        if ending < 0.5:
            steps.append(Step("finalize", key=_key(dice)))
        elif ending < 0.65:
            steps.append(Step("delete", key=_key(dice)))
        scripts.append(Script(users[number % len(users)], steps))
    return scripts


def _key(dice: random.Random) -> str:
    return f"{dice.getrandbits(96):024x}"


class Client:
    """One client: performs steps, repeats what it doesn't know the outcome of, keeps the tally."""

    def __init__(
        self,
        url: str,
        tokens: Mapping[str, str],
        tally: Tally,
        in_outage: Callable[[], bool],
        clock: Clock | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)
        self._tokens = tokens
        self._tally = tally
        self._in_outage = in_outage
        self._clock = clock or SystemClock()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def perform(self, script: Script, step: Step) -> None:
        """Do one step; whatever isn't the expected answer is written into the tally's errors."""
        calls = {
            "create": self._create,
            "resolve": self._resolve,
            "finalize": self._finalize,
            "delete": self._delete,
            "read": self._read_own,
            "list": self._list,
        }
        calls[step.kind](script, step)

    def _create(self, script: Script, step: Step) -> None:
        body = self._write(script, step, "POST", "", {"prompt": step.text}, 201)
        if body is not None:
            script.session_id, script.status = body["session_id"], "active"
            script.holes = list(body["current_draft"]["ambiguities"])

    def _resolve(self, script: Script, step: Step) -> None:
        hole = script.holes.pop(0) if script.holes else f"extra_{script.resolved}"
        path = f"/{script.session_id}/holes/{hole}/resolve"
        if self._write(script, step, "POST", path, {"resolution_text": step.text}, 200):
            script.resolved += 1

    def _finalize(self, script: Script, step: Step) -> None:
        path = f"/{script.session_id}/finalize"
        if self._write(script, step, "POST", path, None, 200) is not None:
            script.status = "finalized"

    def _delete(self, script: Script, step: Step) -> None:
        path = f"/{script.session_id}"
        if self._write(script, step, "DELETE", path, None, 204) is not None:
            script.status = "deleted"

    def _write(
        self,
        script: Script,
        step: Step,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        expected: int,
    ) -> dict[str, Any] | None:
        began = self._clock.monotonic()
        outage = self._in_outage()
        headers = {"Idempotency-Key": step.key}
        reply = self._until_known(script.user, method, path, body, headers)
        if reply.status_code != expected:
            self._note(f"{method} {step.kind}: {reply.status_code} {reply.text[:200]}")
            return None
        with self._tally.lock:
            self._tally.acknowledged += 1
            self._tally.acknowledged_during_outage += outage and self._in_outage()
            self._tally.ack_ms.append((self._clock.monotonic() - began) * 1_000)
        return reply.json() if reply.content else {}

    def _until_known(
        self,
        user: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
    ) -> httpx.Response:
        for _ in range(UNKNOWN_RETRIES_MAX):
            try:
                return self._request(user, method, path, body, headers)
            except httpx.TransportError:
                with self._tally.lock:
                    self._tally.repeated += 1
                self._clock.sleep(0.05)
        raise RuntimeError(f"{method} {path}: the API did not come back")

    def _request(
        self,
        user: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        sent = {"Authorization": f"Bearer {self._tokens[user]}", **(headers or {})}
        return self._http.request(method, f"/api/sessions{path}", json=body, headers=sent)

    def _read_own(self, script: Script, _step: Step) -> None:
        reply = self._until_known(script.user, "GET", f"/{script.session_id}", None, {})
        with self._tally.lock:
            self._tally.reads += 1
        if reply.status_code != 200:
            self._note(f"GET own session: {reply.status_code} {reply.text[:200]}")
        elif len(reply.json()["revisions"]) != 1 + script.resolved:
            self._note("GET own session: an acknowledged resolution can't be read back")

    def _list(self, script: Script, _step: Step) -> None:
        reply = self._until_known(script.user, "GET", "?limit=100", None, {})
        with self._tally.lock:
            self._tally.reads += 1
        if reply.status_code != 200:
            self._note(f"GET list: {reply.status_code} {reply.text[:200]}")
            return
        owners = {session["session_id"] for session in reply.json()["sessions"]}
        if script.session_id not in owners and len(owners) < 100:
            self._note("GET list: an acknowledged session is missing")

    def _note(self, error: str) -> None:
        with self._tally.lock:
            self._tally.errors.append(error)


def fresh_users(count: int) -> list[str]:
    """Return new user ids, so that drills on one stack don't meet."""
    return [new_id() for _ in range(count)]


class Turns:
    """Hands out steps: in order within a session, interleaved across sessions, up to a limit."""

    def __init__(self, scripts: Sequence[Script], seed: int) -> None:
        self._dice = random.Random(seed)
        self._idle = [[script, 0] for script in scripts]
        self._left = sum(len(script.steps) for script in scripts)
        self._allowed = 0
        self._begun = 0
        self._changed = threading.Condition()
        self.done = 0

    def allow(self, steps: int) -> None:
        """Raise the number of steps that may begin."""
        with self._changed:
            self._allowed = max(self._allowed, steps)
            self._changed.notify_all()

    def allow_ahead(self, steps: int) -> None:
        """Let `steps` more begin than have begun."""
        self.allow(self._begun + steps)

    def work(self, perform: Callable[[Script, Any], None]) -> None:
        """Perform steps until none are left."""
        while (turn := self._take()) is not None:
            script, position = turn
            try:
                perform(script, script.steps[position])
            finally:
                self._give_back(script, position + 1)

    def check_done(self) -> None:
        """Raise when steps were left out: a client died."""
        if self._left:
            raise RuntimeError(f"{self._left} steps of the drill were not performed")

    def _take(self) -> tuple[Script, int] | None:
        with self._changed:
            while self._left > self._begun - self.done:
                if self._idle and self._begun < self._allowed:
                    self._begun += 1
                    # Some sessions are worked on together; the others haven't begun or rest.
                    script, position = self._idle.pop(
                        self._dice.randrange(min(len(self._idle), SESSIONS_AT_ONCE))
                    )
                    return script, position  # type: ignore[return-value]
                self._changed.wait(1.0)
            return None

    def _give_back(self, script: Script, position: int) -> None:
        with self._changed:
            self.done += 1
            self._left -= 1
            if position < len(script.steps):
                self._idle.insert(0, [script, position])
            self._changed.notify_all()
