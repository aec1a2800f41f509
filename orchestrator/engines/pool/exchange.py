"""One request to one engine: its deadlines, its tokens as they arrive, and how it ended.

Invariants:

* No token within ``stall_s`` (and ``STALL_SLACK`` of it), or no end within ``request_timeout_s``, ends a request.
* Tokens count under the policy version that the engine is known to hold when they arrive; where that is not known,
  under the version in force.
* A stop text that began before this request is seen in it, and ends it: what came together with it is not part of the
  response any more, whatever the engine, which did not see it, says of how its request ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio

from orchestrator.engines.port import GenerationEnd, GenerationRequest
from orchestrator.errors import EngineStalled
from orchestrator.records import Sample

from .member import Member
from .requests_in_flight import RequestsInFlight
from .stop_texts import StopWatch

__all__ = ["Answer", "Cut", "ExchangeSettings", "exchange"]

Cut = Literal["interrupted", "unanswered", "late"]
"""We ended the request: the sample goes on later, or elsewhere at once; ``unanswered``: before anything came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSettings:
    """Deadlines in seconds, see the module's invariants; ``policy_version`` is the one in force."""

    request_timeout_s: float
    stall_s: float
    policy_version: Callable[[], int]


@dataclass(slots=True)
class Answer:
    """Where what arrives goes: tokens to ``sample``, text to ``text``."""

    sample: Sample
    watch: StopWatch
    text: list[str] = field(default_factory=list)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None, text: str, version: int) -> bool:
        """Something arrived; whether a stop text is complete now."""
        if tokens:
            self.sample.extend(tokens, logprobs, version)
        elif text and not self.sample.tokens:
            self._note_version(version)
        self.text.append(text)
        return self.watch.looks and self.watch.add(text)

    def _note_version(self, version: int) -> None:
        """Text without tokens, of an engine that gives text alone: of this version are 0 tokens."""
        if not self.sample.versions or self.sample.versions[-1][0] != version:
            self.sample.versions.append([version, 0])


async def exchange(
    member: Member,
    request: GenerationRequest,
    answer: Answer,
    *,
    requests: RequestsInFlight,
    settings: ExchangeSettings,
    may_move: bool,
) -> GenerationEnd | Cut:
    """Send a request and collect what comes.

    Raises:
        EngineStalled: by the deadlines; or what the engine raises.
    """
    sent = requests.begin(member, timeout_s=settings.request_timeout_s, stall_s=settings.stall_s, may_move=may_move)

    held, counts = member.held, member.counts

    def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
        if sent.is_stopped:  # an adapter may hand over several events before it notices
            return
        version = held.version
        is_over = answer.add(tokens, logprobs, text, settings.policy_version() if version is None else version)
        counts.tokens += len(tokens)
        requests.heard(sent, of_tokens=bool(tokens or text))
        sent.touch()
        if is_over:
            sent.stop()

    try:
        with sent.scope:
            end = await member.engine.generate(request, sink)
            if not sent.is_stopped:
                return end
    finally:
        requests.end(sent)
    if sent.is_stopped:
        return GenerationEnd("stop", text_complete=False)
    if sent.was_interrupted:
        return "interrupted" if sent.is_heard else "unanswered"
    if sent.is_late:
        return "late"
    if anyio.current_time() >= sent.last_moment:
        raise EngineStalled(member.name, f"a request did not finish within {settings.request_timeout_s:g} s")
    raise EngineStalled(member.name, f"no token for {settings.stall_s:g} s")
