"""One sample on its way: requests to engines until it is finished.

Invariants:

* This is the one layer that retries. A sample is tried again, elsewhere where possible, with its tokens kept; after
  ``max_retries`` failures in a row without a new token it has failed. A request that was refused (4xx) is not repeated.
* No token within ``stall_s``, or no end within ``request_timeout_s``, ends a request.
* Tokens count under the policy version in force when they arrive.
* An interruption ends a request, never a sample: it goes on by itself once dispatch is open.
* No slot is held while a sample waits for its next attempt.
* The seams between requests do not show: a stop text across one ends the response, and so does the end of the context.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus

from .backoff import backoff
from .flights import Flights
from .port import GenerationEnd, GenerationRequest, SamplingParams
from .slots import Member, Slots
from .stop_texts import StopWatch, cut_at_stop, tail_tokens

__all__ = ["Generation", "GenerationSettings"]

ATTEMPTS_A_TRIAL: Final = 1 << 20
"""Keeps the numbers of attempts, and with them the seeds, of different trials apart."""


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


class Generation:
    """Drives one sample; made anew for each time it is worked on.

    Args:
        sample, prompt_tokens, sampling, trial: see :meth:`~orchestrator.engines.pool.EnginePool.generate`.
        slots, flights, jitter, log: of the pool.
        detokenize: for text that no stream gave whole.
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
        trial: int,
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
        self._attempt = trial * ATTEMPTS_A_TRIAL
        self._cuts = flights.cuts
        self._last: Member | None = None
        self._avoided: Member | None = None
        self._text: list[str] = []
        self._text_is_whole = True

    async def run(
        self, before_piece: Callable[[Sample], None] | None, after_piece: Callable[[Sample], Awaitable[None]] | None
    ) -> None:
        """Extend the sample until it is finished; see :meth:`~orchestrator.engines.pool.EnginePool.generate`."""
        sample = self._sample
        if sample.tokens:
            self._count_piece()
        try:
            while not sample.is_finished:
                if before_piece is not None:
                    before_piece(sample)
                await self._piece()
                if not sample.is_finished and after_piece is not None:
                    await after_piece(sample)
            sample.text = await self._whole_text()
        except GenerationFailed:
            sample.status = SampleStatus.FAILED
            raise

    async def _piece(self) -> None:
        """One request, if one is needed; afterwards the sample is finished, longer, or one failure nearer its end."""
        sample, sampling = self._sample, self._sampling
        if len(sample.tokens) >= sampling.max_new_tokens:
            self._finish("length")
            return
        watch = await self._stop_watch()
        if watch is None:
            self._finish("stop")
            return
        is_continued = len(sample.tokens) > 0
        member = await self._slots.acquire(preferred=self._last, avoided=self._avoided, is_continued=is_continued)
        try:
            if self._forget_if_cut():
                watch.forget()
            before = len(sample.tokens)
            failure = await self._request_once(member, watch)
        finally:
            self._slots.release(member)
        if failure is not None:
            await self._failed(member, failure, had_progress=len(sample.tokens) > before)

    async def _stop_watch(self) -> StopWatch | None:
        """A watch that knows the newest text; ``None``: the response ended with it, cut before its engine said so."""
        tokens, sampling = self._sample.tokens, self._sampling
        watch = StopWatch(sampling.stop)
        if tokens and tokens[-1] in sampling.stop_token_ids:
            return None
        if not tokens or not sampling.stop:
            return watch
        newest = tokens[-tail_tokens(sampling.stop) :]
        return None if watch.add(await self._text_of(newest)) else watch

    def _forget_if_cut(self) -> bool:
        """Begin anew if an interruption fell between two requests and partial rollouts are not kept."""
        was_cut, self._cuts = self._cuts != self._flights.cuts, self._flights.cuts
        if not (was_cut and self._sample.tokens) or self._settings.keep_partials:
            return False
        self._sample.clear()
        return True

    async def _request_once(self, member: Member, watch: StopWatch) -> EngineError | None:
        """One request; returns its failure.

        Raises:
            GenerationFailed: the engine refused it.
        """
        sample = self._sample
        before = len(sample.tokens)
        if before == 0:
            self._text, self._text_is_whole = [], True
        context = member.info.context_tokens if member.info is not None else None
        if before and context is not None and len(self._prompt_tokens) + before >= context:
            self._finish("length")
            return None
        try:
            end = await self._exchange(member, self._request(), watch)
        except EngineRejected as error:
            member.health.request_succeeded()
            member.failed += 1
            raise GenerationFailed(f"sample {sample.index} was refused: {error.message}") from error
        except EngineError as error:
            return error
        if end is None:
            self._interrupted(member)
        elif end.reason == "abort" and len(sample.tokens) == before:
            return EngineUnavailable(member.engine.name, "it ended a request without a token, unasked")
        else:
            self._ended(member, end, before)
        return None

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

    async def _exchange(self, member: Member, request: GenerationRequest, watch: StopWatch) -> GenerationEnd | None:
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
            if watch.add(text):
                flight.stop()

        flight.scope.deadline = min(last_moment, anyio.current_time() + settings.stall_s)
        try:
            with flight.scope:
                return await member.engine.generate(request, sink)
        finally:
            self._flights.end(flight)
        if flight.is_stopped:
            return GenerationEnd("stop", text_complete=False)
        if flight.was_interrupted:
            return None
        if anyio.current_time() >= last_moment:
            raise EngineStalled(name, f"no end of a request within {settings.request_timeout_s:g} s")
        raise EngineStalled(name, f"no token for {settings.stall_s:g} s")

    # -- how a request ended -------------------------------------------------------------------------------------------

    def _interrupted(self, member: Member) -> None:
        self._cuts = self._flights.cuts
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
        member.stalled += isinstance(error, EngineStalled)
        if member.health.request_failed(error.message):
            self._log.warning(f"engine {member.engine.name} is down after failures in a row: {error.message}")
            self._slots.dispatch()
        self._failures = 1 if had_progress else self._failures + 1
        self._last, self._avoided = None, member
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
        self._last, self._avoided = member, None
        gained = len(sample.tokens) - before
        self._failures = 0 if gained else self._failures
        self._text_is_whole = self._text_is_whole and end.text_complete and before == 0
        remaining = self._sampling.max_new_tokens - before
        asked = min(remaining, self._settings.chunk_tokens or remaining)
        if end.reason == "abort":
            self._count_piece()
        elif end.reason == "stop":
            self._finish("stop")
        elif gained < asked or gained >= remaining:
            self._finish("length")

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._sample.status = SampleStatus.COMPLETED if reason == "stop" else SampleStatus.TRUNCATED
        self._sample.finish_reason = reason

    def _count_piece(self) -> None:
        """The sample goes on after an interruption or a failure."""
        self._text_is_whole = False
        self._sample.metadata["pieces"] = self._sample.metadata.get("pieces", 1) + 1

    async def _whole_text(self) -> str:
        if self._text_is_whole:
            return "".join(self._text)
        return cut_at_stop(await self._text_of(self._sample.tokens), self._sampling.stop)

    async def _text_of(self, tokens: Sequence[int]) -> str:
        try:
            return await self._detokenize(tokens)
        except EngineError as error:
            raise GenerationFailed(f"sample {self._sample.index} could not be detokenised: {error.message}") from error
