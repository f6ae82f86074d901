"""Outages as values: what may go wrong with one request, and the seeded mix that picks.

Each fault is a frozen description. `fault.treatment` says what the proxy does with a request that
meets it, so the proxy itself branches on no fault. Nothing here waits, sends or rolls dice:
`decide(mix, n)` is a function of the seed and n alone.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as checked

Mode = Literal["http", "postgres"]
How = Literal["reset", "close"]
Ending = Literal["keep", "reset", "close", "hang"]
# An hour: longer than any client timeout, short enough that a typing error is noticed.
Seconds = Annotated[float, Field(ge=0, le=3600)]
Bytes = Annotated[int, Field(ge=0, le=2**31)]
_HTTP: frozenset[Mode] = frozenset(("http",))
_POSTGRES: frozenset[Mode] = frozenset(("postgres",))
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class InvalidFault(ValueError):
    """The description is no fault this proxy can inject here; the message says what to mend."""


@dataclass(frozen=True)
class Pace:
    """How a reply trickles out: `chunk_bytes` at a time, `interval_s` apart."""

    chunk_bytes: int
    interval_s: float


@dataclass(frozen=True)
class Treatment:
    """What becomes of one request, step by step, in the order of the fields."""

    delay_before_s: float = 0.0
    late: DeliverLate | None = None  # held back now, forwarded on its own account later
    forward_times: int = 1
    at_once: bool = False  # the copies race each other instead of following one another
    request_bytes_max: int | None = None  # upstream sees this many bytes, then end of file
    delay_after_s: float = 0.0
    answer: Literal["first", "second"] | Answer = "first"
    reply_bytes_max: int | None = None
    pace: Pace | None = None
    ending: Ending = "keep"

    @property
    def is_plain(self) -> bool:
        """Whether the request simply passes."""
        return self == Treatment()


class _Fault(ABC):
    """What all faults share: the wires they exist on and the treatment they mean."""

    wires: ClassVar[frozenset[Mode]] = frozenset(("http", "postgres"))

    @property
    def treatment(self) -> Treatment:
        """What the proxy does with a request that meets this fault."""
        return self._treat()

    @abstractmethod
    def _treat(self) -> Treatment: ...


@checked(frozen=True, config=_STRICT)
class Refuse(_Fault):
    """Connections are refused: the port is closed and open connections are reset.

    A state of the port, not of one request, so only `set` takes it.
    """

    kind: Literal["refuse"] = field(default="refuse", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        return Treatment(forward_times=0, reply_bytes_max=0, ending="reset")


@checked(frozen=True, config=_STRICT)
class BlackHole(_Fault):
    """The request is taken and never answered nor forwarded; the client must give up by itself."""

    kind: Literal["black_hole"] = field(default="black_hole", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        return Treatment(forward_times=0, reply_bytes_max=0, ending="hang")


@checked(frozen=True, config=_STRICT)
class Delay(_Fault):
    """`seconds` pass before the request is forwarded, or after the server has done it.

    The request goes on its way even if the client has left: its bytes were in the network.
    """

    seconds: Seconds
    stage: Literal["before", "after"] = "before"
    kind: Literal["delay"] = field(default="delay", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        if self.stage == "before":
            return Treatment(delay_before_s=self.seconds)
        return Treatment(delay_after_s=self.seconds)


@checked(frozen=True, config=_STRICT)
class Throttle(_Fault):
    """The reply comes at `bytes_per_s`; the request is not slowed."""

    bytes_per_s: Annotated[int, Field(ge=1, le=10**9)]
    kind: Literal["throttle"] = field(default="throttle", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        chunk_bytes = max(1, self.bytes_per_s // 20)
        return Treatment(pace=Pace(chunk_bytes, chunk_bytes / self.bytes_per_s))


@checked(frozen=True, config=_STRICT)
class Drip(_Fault):
    """The reply comes byte by byte, so that a timeout per socket read never fires."""

    interval_s: Seconds = 0.05
    kind: Literal["drip"] = field(default="drip", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        return Treatment(pace=Pace(1, self.interval_s))


@checked(frozen=True, config=_STRICT)
class Cut(_Fault):
    """The client gets RST or FIN instead of a reply, at one of three stages.

    before: nothing was forwarded. in: upstream got `request_bytes` of the request, then end of
    file. after: upstream answered in full (it committed) and the reply is thrown away.
    """

    stage: Literal["before", "in", "after"]
    how: How = "reset"
    request_bytes: Annotated[int, Field(ge=1, le=2**31)] = 1
    kind: Literal["cut"] = field(default="cut", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        whole = Treatment(reply_bytes_max=0, ending=self.how)
        if self.stage == "before":
            return replace(whole, forward_times=0)
        if self.stage == "in":
            return replace(whole, request_bytes_max=self.request_bytes)
        return whole


@checked(frozen=True, config=_STRICT)
class Truncate(_Fault):
    """Upstream answers in full; the client gets the first `reply_bytes`, head included."""

    reply_bytes: Bytes
    how: How = "close"
    kind: Literal["truncate"] = field(default="truncate", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        return Treatment(reply_bytes_max=self.reply_bytes, ending=self.how)


@checked(frozen=True, config=_STRICT)
class Duplicate(_Fault):
    """Upstream gets the request twice, on two connections; the client one of the replies.

    The second copy follows the first reply; with `at_once` both are under way together.
    """

    answer: Literal["first", "second"] = "first"
    at_once: bool = False
    wires: ClassVar[frozenset[Mode]] = _HTTP
    kind: Literal["duplicate"] = field(default="duplicate", kw_only=True, repr=False)

    def _treat(self) -> Treatment:
        return Treatment(forward_times=2, at_once=self.at_once, answer=self.answer)


@checked(frozen=True, config=_STRICT)
class DeliverLate(_Fault):
    """The client gets no reply now; upstream gets the request after newer ones.

    It goes once `after_newer` younger requests were answered by upstream, or `after_s` have
    passed, whichever comes first.
    """

    after_newer: Annotated[int, Field(ge=1, le=10_000)] | None = 1
    after_s: Seconds | None = None
    how: Literal["reset", "close", "hang"] = "reset"
    wires: ClassVar[frozenset[Mode]] = _HTTP
    kind: Literal["deliver_late"] = field(default="deliver_late", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.after_newer is None and self.after_s is None:
            raise ValueError("deliver_late needs after_newer or after_s, or it never delivers")

    def _treat(self) -> Treatment:
        return Treatment(late=self, forward_times=0, reply_bytes_max=0, ending=self.how)


@checked(frozen=True, config=_STRICT)
class Answer(_Fault):
    """A reply of the proxy's own making, without forwarding or in place of upstream's reply."""

    status: Annotated[int, Field(ge=200, le=599)]
    body: str = ""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    after_forwarding: bool = False
    wires: ClassVar[frozenset[Mode]] = _HTTP
    kind: Literal["answer"] = field(default="answer", kw_only=True, repr=False)

    @field_validator("content_type", "headers")
    @classmethod
    def _one_line(cls, value: object) -> object:
        if re.search(r"[\r\n]|\\[rn]", repr(value)):
            raise ValueError("a header must stay on its line")
        return value

    def _treat(self) -> Treatment:
        return Treatment(forward_times=1 if self.after_forwarding else 0, answer=self)


@checked(frozen=True, config=_STRICT)
class LoseCommitReply(_Fault):
    """Postgres commits, and the confirmation never arrives. Meets COMMIT statements only."""

    how: How = "reset"
    wires: ClassVar[frozenset[Mode]] = _POSTGRES
    kind: Literal["lose_commit_reply"] = field(
        default="lose_commit_reply", kw_only=True, repr=False
    )

    def _treat(self) -> Treatment:
        return Treatment(reply_bytes_max=0, ending=self.how)


Fault = (
    Refuse
    | BlackHole
    | Delay
    | Throttle
    | Drip
    | Cut
    | Truncate
    | Duplicate
    | DeliverLate
    | Answer
    | LoseCommitReply
)
AnyFault = Annotated[Fault, Field(discriminator="kind")]

_HTML = "text/html; charset=utf-8"


def _page(status: int, title: str) -> Answer:
    body = f"<html><head><title>{status} {title}</title></head><body>{title}</body></html>"
    return Answer(status, body, _HTML)


def _canned() -> dict[str, Answer]:
    replies = {
        "429": Answer(429, '{"message":"Too many requests"}'),
        "429_retry_after": Answer(
            429, '{"message":"Too many requests"}', headers=(("Retry-After", "1"),)
        ),
        "503_retry_after": Answer(503, "", headers=(("Retry-After", "1"),)),
        "200_html": _page(200, "Please sign in"),
        "200_empty": Answer(200),
        "200_broken_json": Answer(200, '{"verdicts": [{"txn_id": "'),
        "200_wrong_shape": Answer(200, '{"unexpected": true}'),
        "200_no_verdicts": Answer(200, '{"verdicts": []}'),
        "200_foreign_id": Answer(
            200,
            '{"verdicts": [{"txn_id": "00000000-0000-0000-0000-000000000000",'
            ' "verdict": "applied", "versions": {}, "rows": {}}]}',
        ),
        # What PostgREST says when Postgres went away between COMMIT and its reply.
        "400_no_code": Answer(400, '{"code":"","details":null,"hint":null,"message":""}'),
        "302": Answer(302, headers=(("Location", "/moved"),)),
        "308": Answer(308, headers=(("Location", "/moved"),)),
    }
    for status in (500, 502, 503, 504, *range(520, 531), 540, 544, 546, 556):
        replies[f"{status}_html"] = _page(status, "The server met a problem")
        replies[f"{status}_json"] = Answer(status, '{"message":"The server met a problem"}')
        replies[f"{status}_nothing"] = Answer(status)
    return replies


CANNED: Mapping[str, Answer] = MappingProxyType(_canned())


def canned(name: str, *, after_forwarding: bool = False) -> Answer:
    """Return a ready-made reply of `CANNED`, for before or after forwarding."""
    if name not in CANNED:
        raise InvalidFault(f"no canned reply {name!r}; there are {', '.join(sorted(CANNED))}")
    return replace(CANNED[name], after_forwarding=after_forwarding)


# Only faults the client notices at once: a black hole would make the mix last as long as timeouts.
HTTP_MIX: tuple[tuple[Fault, float], ...] = (
    (Cut("before", "reset"), 2),
    (Cut("before", "close"), 1),
    (Cut("in", "reset", request_bytes=40), 1),
    (Cut("in", "close", request_bytes=200), 1),
    (Cut("after", "reset"), 3),
    (Cut("after", "close"), 2),
    (Truncate(20), 1),
    (Truncate(200), 1),
    (Duplicate("first"), 1),
    (Duplicate("second", at_once=True), 2),
    (DeliverLate(after_newer=1, after_s=1.0), 2),
    (DeliverLate(after_newer=3, after_s=1.0), 2),
    (canned("429_retry_after"), 1),
    (canned("503_html"), 1),
    (canned("520_html"), 1),
    (canned("544_json"), 1),
    (canned("302"), 1),
    (canned("200_html"), 1),
    (canned("200_empty", after_forwarding=True), 1),
    (canned("200_broken_json", after_forwarding=True), 1),
    (canned("400_no_code", after_forwarding=True), 2),
    (canned("502_html", after_forwarding=True), 2),
)
POSTGRES_MIX: tuple[tuple[Fault, float], ...] = (
    (Cut("before", "reset"), 2),
    (Cut("before", "close"), 1),
    (Cut("in", "reset", request_bytes=3), 1),
    (Cut("after", "reset"), 2),
    (Truncate(5), 1),
    (LoseCommitReply(), 4),
)


@checked(frozen=True, config=_STRICT)
class FaultMix:
    """A share `rate` of the requests meets a fault, drawn by weight; a function of the seed.

    `matching` is searched for in "METHOD path"; only requests that contain it are counted.
    """

    seed: int
    rate: Annotated[float, Field(ge=0, le=1)]
    faults: Annotated[
        tuple[tuple[AnyFault, Annotated[float, Field(gt=0, le=1e6)]], ...], Field(min_length=1)
    ] = field(default=HTTP_MIX, repr=False)
    matching: str = ""

    @field_validator("faults")
    @classmethod
    def _one_request_each(cls, faults: Sequence[tuple[Fault, float]]) -> object:
        if any(isinstance(fault, Refuse) for fault, _ in faults):
            raise ValueError("refuse closes the port, it can't meet single requests; use set")
        return faults


def decide(mix: FaultMix, n: int) -> Fault | None:
    """Return what the `n`-th matching request meets (from 1); the same for ever for a seed."""
    digest = hashlib.sha256(f"{mix.seed}:{n}".encode()).digest()
    if int.from_bytes(digest[:8]) >= mix.rate * 2**64:
        return None
    point = int.from_bytes(digest[8:16]) / 2**64 * sum(weight for _, weight in mix.faults)
    for fault, weight in mix.faults:
        point -= weight
        if point < 0:
            return fault
    return mix.faults[-1][0]  # rounding took the last hair's breadth


# END matters as much: Postgres accepts it for COMMIT. A multi-statement query may end in one.
_COMMIT = re.compile(r"^\s*(?:commit|end)\b|;\s*commit\b", re.IGNORECASE)


def matches(matching: str, method: str, path: str) -> bool:
    """Return whether "METHOD path" contains `matching`; case is ignored, as SQL ignores it."""
    return matching.lower() in f"{method} {path}".lower()


def applies(fault: Fault, method: str, path: str) -> bool:
    """Return whether the request is one the fault can meet at all."""
    if isinstance(fault, LoseCommitReply):
        return method != "CONNECT" and _COMMIT.search(path) is not None
    return True
