"""One sample on its way: requests to engines until it is finished.

Invariants:

* This is the one layer that retries. A sample is tried again, elsewhere where possible, with its tokens kept; after
  ``max_retries`` failures in a row without a new token it has failed. A request that was refused (4xx) is not repeated.
* No token within ``stall_s``, or no end within ``request_timeout_s``, ends a request.
* Tokens count under the policy version in force when they arrive.
* An interruption ends a request, never a sample: it goes on by itself once dispatch is open.
* No slot is held while a sample waits for its next attempt.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.broadcast import Broadcast
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus

from .port import GenerationEnd, GenerationRequest, SamplingParams
from .slots import Member, Slots

__all__ = ["Flights", "Generation", "GenerationSettings", "backoff"]

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0


def backoff(jitter: random.Random, failures: int) -> float:
    """Seconds to wait after so many failures: exponential with full jitter, so that no storm of retries forms."""
    return jitter.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**failures))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What the config says of requests; see :class:`~orchestrator.engines.pool.EnginePool`."""

    request_timeout_s: float
    stall_s: float
    max_retries: int
    chunk_tokens: int | None
    keep_partials: bool
    seed: int
    policy_version: Callable[[], int]


@dataclass(slots=True, eq=False)
class _Flight:
    """One request under way; its scope ends it, ``was_interrupted`` says that we meant to."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    was_interrupted: bool = False


class Flights:
    """The requests under way.

    Args:
        changed: notified when one ends.
    """

    def __init__(self, changed: Broadcast) -> None:
        self._flights: set[_Flight] = set()
        self._changed = changed

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self) -> _Flight:
        """A request begins."""
        flight = _Flight()
        self._flights.add(flight)
        return flight

    def end(self, flight: _Flight) -> None:
        """A request has ended."""
        self._flights.discard(flight)
        self._changed.notify()

    def interrupt(self) -> int:
        """End all of them; returns how many."""
        for flight in self._flights:
            flight.was_interrupted = True
            flight.scope.cancel()
        return len(self._flights)

    async def quiet(self) -> None:
        """Return when there are none; the caller sets a deadline."""
        while self._flights:
            await self._changed.next().wait()


class Generation:
    """Drives one sample; made anew for each time it is worked on.

    Args:
        sample: fresh, or a partial rollout to go on with.
        prompt_tokens: [P] token ids.
        sampling: how tokens are drawn; ``max_new_tokens`` counts the whole response.
        settings: of the pool.
        slots: where requests get their engines.
        flights: where requests under way are listed.
        detokenize: for text that no stream gave whole.
        jitter: for waits.
        log: for engines that go down.
    """

    def __init__(
        self,
        *,
        sample: Sample,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        settings: GenerationSettings,
        slots: Slots,
        flights: Flights,
        detokenize: Callable[[Sequence[int]], Awaitable[str]],
        jitter: random.Random,
        log: FilteringBoundLogger,
    ) -> None:
        self._sample = sample
        self._prompt_tokens = prompt_tokens
        self._sampling = sampling
        self._settings = settings
        self._slots = slots
        self._flights = flights
        self._detokenize = detokenize
        self._jitter = jitter
        self._log = log
        self._failures = 0
        self._attempt = 0
        self._last: Member | None = None
        self._text: list[str] = []
        self._text_is_whole = True

    async def run(
        self, before_piece: Callable[[Sample], None] | None, after_piece: Callable[[Sample], Awaitable[None]] | None
    ) -> None:
        """Extend the sample until it is finished; see :meth:`~orchestrator.engines.pool.EnginePool.generate`."""
        sample = self._sample
        if sample.tokens:
            self._count_piece()
        while not sample.is_finished:
            if before_piece is not None:
                before_piece(sample)
            if not sample.tokens:
                self._text, self._text_is_whole = [], True
            if len(sample.tokens) >= self._sampling.max_new_tokens:
                sample.status, sample.finish_reason = SampleStatus.TRUNCATED, "length"
                break
            await self._request_once()
            if not sample.is_finished and after_piece is not None:
                await after_piece(sample)
        sample.text = await self._whole_text()

    async def _request_once(self) -> None:
        """One request; afterwards the sample is finished, or longer, or one failure nearer to its end."""
        before = len(self._sample.tokens)
        member = await self._slots.acquire(self._last, is_continued=before > 0)
        try:
            end = await self._exchange(member, self._request())
        except EngineRejected as error:
            member.health.request_succeeded()
            member.failed += 1
            raise GenerationFailed(f"sample {self._sample.index} was refused: {error.message}") from error
        except EngineError as error:
            failure = error
        else:
            if end is None:
                self._interrupted(member)
                return
            if end.reason != "abort" or len(self._sample.tokens) > before:
                self._ended(member, end, before)
                return
            failure = EngineUnavailable(member.engine.name, "it ended a request without a token, unasked")
        finally:
            self._slots.release(member)
        await self._failed(member, failure, had_progress=len(self._sample.tokens) > before)

    def _request(self) -> GenerationRequest:
        sample, chunk = self._sample, self._settings.chunk_tokens
        generated = len(sample.tokens)
        remaining = self._sampling.max_new_tokens - generated
        seed = self._settings.seed if self._sampling.seed is None else self._sampling.seed
        request = GenerationRequest(
            request_id=f"{sample.index}-{generated}-{self._attempt}",
            tokens=[*self._prompt_tokens, *sample.tokens],
            max_new_tokens=min(remaining, chunk or remaining),
            sampling=self._sampling,
            seed=zlib.crc32(f"{seed}/{sample.index}/{generated}/{self._attempt}".encode()),
            generated=generated,
            sample_index=sample.index,
            attempt=self._attempt,
        )
        self._attempt += 1
        return request

    async def _exchange(self, member: Member, request: GenerationRequest) -> GenerationEnd | None:
        """Send a request and collect its tokens; ``None`` if it was interrupted.

        Raises:
            EngineStalled: by its deadlines; or what the engine raises.
        """
        settings, name = self._settings, member.engine.name
        last_moment = anyio.current_time() + settings.request_timeout_s
        flight = self._flights.begin()

        def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            self._sample.extend(tokens, logprobs, settings.policy_version())
            self._text.append(text)
            member.tokens += len(tokens)
            flight.scope.deadline = min(last_moment, anyio.current_time() + settings.stall_s)

        flight.scope.deadline = min(last_moment, anyio.current_time() + settings.stall_s)
        try:
            with flight.scope:
                return await member.engine.generate(request, sink)
        finally:
            self._flights.end(flight)
        if flight.was_interrupted:
            return None
        member.stalled += 1
        if anyio.current_time() >= last_moment:
            raise EngineStalled(name, f"no end of a request within {settings.request_timeout_s:g} s")
        raise EngineStalled(name, f"no token for {settings.stall_s:g} s")

    # -- how a request ended -------------------------------------------------------------------------------------------

    def _interrupted(self, member: Member) -> None:
        member.interrupted += 1
        member.health.request_succeeded()
        if not self._settings.keep_partials:
            self._sample.clear()
        elif self._sample.tokens:
            self._count_piece()

    async def _failed(self, member: Member, error: EngineError, *, had_progress: bool) -> None:
        """Note a failure and wait a little; the next request goes elsewhere if it can.

        Raises:
            GenerationFailed: it was one too many.
        """
        member.failed += 1
        if member.health.request_failed(error.message):
            self._log.warning(f"engine {member.engine.name} is down after failures in a row: {error.message}")
        self._failures = 1 if had_progress else self._failures + 1
        self._last = None
        if self._failures > self._settings.max_retries:
            raise GenerationFailed(
                f"sample {self._sample.index} failed {self._failures} times without a new token, last: {error.message}"
            ) from error
        if self._sample.tokens:
            self._count_piece()
        await anyio.sleep(backoff(self._jitter, self._failures))

    def _ended(self, member: Member, end: GenerationEnd, before: int) -> None:
        sample = self._sample
        member.completed += 1
        member.health.request_succeeded()
        self._last = member
        gained = len(sample.tokens) - before
        self._failures = 0 if gained else self._failures
        self._text_is_whole = self._text_is_whole and end.text_complete and before == 0
        remaining = self._sampling.max_new_tokens - before
        asked = min(remaining, self._settings.chunk_tokens or remaining)
        if end.reason == "abort":
            self._count_piece()
        elif end.reason == "stop":
            sample.status, sample.finish_reason = SampleStatus.COMPLETED, "stop"
        elif gained < asked or gained >= remaining:
            sample.status, sample.finish_reason = SampleStatus.TRUNCATED, "length"

    def _count_piece(self) -> None:
        """The sample goes on after an interruption or a failure."""
        self._text_is_whole = False
        self._sample.metadata["pieces"] = self._sample.metadata.get("pieces", 1) + 1

    async def _whole_text(self) -> str:
        if self._text_is_whole:
            return "".join(self._text)
        try:
            text = await self._detokenize(self._sample.tokens)
        except EngineError as error:
            raise GenerationFailed(f"sample {self._sample.index} could not be detokenised: {error.message}") from error
        cuts = [at for stop in self._sampling.stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text
