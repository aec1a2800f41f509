"""One turn of a sample: requests to engines until the turn has ended.

Invariants:

* This is the one layer that retries. A sample is tried again, elsewhere where possible, with its tokens kept; after
  ``max_retries`` failures in a row without a new token it has failed. A request that was refused (4xx) is not repeated.
* A request whose first token is late goes elsewhere, at most ``MAX_MOVES`` times between two tokens: it may be slow by
  its own doing. That is no failure.
* What the sample had before the turn (earlier turns, the answers of tools) is never touched.
* That a turn has ended is known to its sample (``finish_reason``) before its text is asked for: a turn that is cut
  there has only its text missing.
* An interruption ends a request, never a sample: it goes on by itself once dispatch is open.
* No slot is held while a sample waits for its next attempt.
* The seams between requests do not show: a stop text or the end of the sequence before one ends the response, and so
  does the end of the context.
* What a text-only engine gave of a response that did not end is let go of: without token ids it cannot be continued.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import anyio

from orchestrator.engines.port import GenerationEnd, GenerationRequest
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus

from .backoff import backoff
from .exchange import Answer, exchange
from .generation_context import GenerationContext, TurnEnd, TurnRequest
from .member import Member
from .stop_texts import StopWatch, cut_at_stop, tail_tokens

__all__ = ["Generation"]

ATTEMPTS_A_TRIAL: Final = 1 << 20
"""Keeps the numbers of attempts, and with them the seeds, of different trials apart."""

MAX_MOVES: Final = 3

LATE: Final = "its first tokens come much later than those of the other engines; requests move to these"


class Generation:
    """Drives one turn; made anew for each time it is worked on."""

    def __init__(self, asked: TurnRequest, context: GenerationContext) -> None:
        self._asked = asked
        self._context = context
        self._sample = asked.sample
        self._begin = asked.begin
        self._sampling = asked.sampling
        self._settings = context.settings
        self._failures = 0
        self._attempt = asked.trial * ATTEMPTS_A_TRIAL
        self._cuts = context.requests.cuts
        self._last = None if asked.engine is None else context.named(asked.engine)
        self._avoided: Member | None = None
        self._moves = 0
        self._text: list[str] = []
        self._text_is_whole = True

    async def run(
        self, before_piece: Callable[[Sample], None] | None, after_piece: Callable[[Sample], Awaitable[None]] | None
    ) -> TurnEnd:
        """Extend the sample until the turn has ended; see :meth:`~orchestrator.engines.pool.pool.EnginePool.turn`."""
        sample = self._sample
        if sample.finish_reason is not None:
            self._text_is_whole = False  # only its text is missing
        elif len(sample.tokens) > self._begin:
            self._count_piece()
        try:
            while sample.finish_reason is None:
                if before_piece is not None:
                    before_piece(sample)
                await self._piece()
                if sample.finish_reason is None and after_piece is not None:
                    await after_piece(sample)
            reason: Literal["stop", "length"] = "length" if sample.finish_reason == "length" else "stop"
            return TurnEnd(reason, await self._whole_text(), None if self._last is None else self._last.name)
        except GenerationFailed:
            sample.status = SampleStatus.FAILED
            raise

    async def _piece(self) -> None:
        """One request, if one is needed; afterwards the turn has ended, is longer, or one failure nearer its end."""
        sample = self._sample
        if self._is_full():
            self._finish("length")
            return
        watch = await self._stop_watch()
        if watch is None:
            self._finish("stop")
            return
        slots, is_continued = self._context.slots, len(sample.tokens) > 0
        member = await slots.acquire(preferred=self._last, avoided=self._avoided, is_continued=is_continued)
        before = len(sample.tokens)
        try:
            if self._forget_if_cut():
                watch.forget()
                before = len(sample.tokens)
            failure = await self._request_once(member, watch)
            if failure is not None:
                self._note_failure(member, failure)
        finally:
            slots.release(member)
        if failure is not None:
            await self._failed(failure, had_progress=len(sample.tokens) > before)

    async def _stop_watch(self) -> StopWatch | None:
        """A watch that knows the newest text; ``None``: the turn ended with it, cut before its engine said so."""
        tokens, sampling = self._sample.tokens, self._sampling
        watch = StopWatch(sampling.stop)
        has_begun = len(tokens) > self._begin
        if has_begun and (tokens[-1] in sampling.stop_token_ids or tokens[-1] in self._context.end_ids()):
            return None
        if not has_begun or not sampling.stop:
            return watch
        newest = tokens[max(self._begin, len(tokens) - tail_tokens(sampling.stop)) :]
        return None if watch.add(await self._text_of(newest)) else watch

    def _forget_if_cut(self) -> bool:
        """Begin anew if an interruption fell between two requests and partial rollouts are not kept."""
        was_cut, self._cuts = self._cuts != self._context.requests.cuts, self._context.requests.cuts
        if not (was_cut and len(self._sample.tokens) > self._begin) or self._settings.keep_partials:
            return False
        self._sample.cut(self._begin)
        return True

    async def _request_once(self, member: Member, watch: StopWatch) -> EngineError | None:
        """One request; returns its failure.

        Raises:
            GenerationFailed: the engine refused it.
        """
        sample = self._sample
        before = len(sample.tokens)
        if before == self._begin:
            self._text, self._text_is_whole = [], True
        if before == 0:
            sample.versions = []
        context = member.info.context_tokens if member.info is not None else None
        if before and context is not None and len(self._asked.prompt_tokens) + before >= context:
            self._finish("length")
            return None
        try:
            end = await exchange(
                member,
                self._request(member),
                Answer(sample, watch, self._text),
                requests=self._context.requests,
                settings=self._settings.exchange,
                may_move=self._moves < MAX_MOVES,
            )
        except EngineRejected as error:
            member.health.request_succeeded()
            member.counts.failed += 1
            raise GenerationFailed(f"sample {sample.index} was rejected: {error.message}") from error
        except EngineError as error:
            return error
        finally:
            self._moves = self._moves if len(sample.tokens) == before else 0
        if end == "interrupted" or end == "unanswered":
            self._interrupted(member, was_heard=end == "interrupted")
        elif end == "late":
            self._late(member)
        elif end.reason == "abort" and len(sample.tokens) == before:
            return EngineUnavailable(member.name, "it aborted a request without a token, although nobody asked it to")
        else:
            self._ended(member, end, before)
        return None

    def _request(self, member: Member) -> GenerationRequest:
        sample, sampling, settings = self._sample, self._sampling, self._settings
        length = len(sample.tokens)
        generated = length - self._begin
        seed = settings.seed if sampling.seed is None else sampling.seed
        request = GenerationRequest(
            request_id=f"{sample.index}-{length}-{self._attempt}",
            tokens=self._tokens_so_far() if not member.is_text_only else [],
            max_new_tokens=sampling.max_new_tokens if member.is_text_only else self._piece_tokens(generated),
            sampling=sampling,
            seed=zlib.crc32(f"{seed}/{sample.index}/{length}/{self._attempt}".encode()),
            generated=generated,
            sample_index=sample.index,
            attempt=self._attempt,
            messages=self._asked.messages if member.is_text_only else None,
        )
        self._attempt += 1
        return request

    def _tokens_so_far(self) -> Sequence[int]:
        """Prompt and response so far; the prompt's own where that is all, which its group shares."""
        prompt, response = self._asked.prompt_tokens, self._sample.tokens
        return array("i", prompt) + response if response else prompt

    def _piece_tokens(self, generated: int) -> int:
        """How many tokens to ask for at a time."""
        remaining = self._sampling.max_new_tokens - generated
        return min(remaining, self._settings.chunk_tokens or remaining)

    # -- how a request ended -------------------------------------------------------------------------------------------

    def _interrupted(self, member: Member, *, was_heard: bool) -> None:
        """A request was cut. One of which nothing came says nothing good of its engine, and after a while that."""
        self._cuts = self._context.requests.cuts
        member.counts.interrupted += 1
        if was_heard:
            member.health.request_succeeded()
        elif member.silent_s >= self._settings.exchange.stall_s:
            silence = f"no token for {member.silent_s:.0f} s, over several interrupted requests"
            self._note_failure(member, EngineStalled(member.name, silence))
        if not self._settings.keep_partials:
            self._sample.cut(self._begin)
        elif len(self._sample.tokens) > self._begin:
            self._count_piece()

    def _late(self, member: Member) -> None:
        """The first token is late; the next request goes elsewhere, and has all the time it needs."""
        member.counts.late += 1
        self._moves += 1
        self._last, self._avoided = None, member
        if member.went_wrong(member.health.request_late(LATE)):
            self._context.log.warning(f"engine {member.name} gets no requests for a while: {LATE}")
        if len(self._sample.tokens) > self._begin:
            self._count_piece()

    def _note_failure(self, member: Member, error: EngineError) -> None:
        member.counts.failed += 1
        member.counts.stalled += isinstance(error, EngineStalled)
        if member.went_wrong(member.health.request_failed(error.message)):
            self._context.log.warning(
                f"engine {member.name} is down after repeated failures: {error.message}",
                engine=member.name,
                action="engine_down",
            )
        self._last, self._avoided = None, member

    async def _failed(self, error: EngineError, *, had_progress: bool) -> None:
        """Wait a little; the next request goes elsewhere if it can.

        Raises:
            GenerationFailed: it was one too many.
        """
        self._failures = 1 if had_progress else self._failures + 1
        if self._failures > self._settings.max_retries:
            raise GenerationFailed(
                f"sample {self._sample.index} failed {self._failures} times without a new token; last error:"
                f" {error.message}"
            ) from error
        if len(self._sample.tokens) > self._begin:
            self._count_piece()
        await anyio.sleep(backoff(self._context.jitter, self._failures))

    def _ended(self, member: Member, end: GenerationEnd, before: int) -> None:
        sample = self._sample
        member.counts.completed += 1
        member.health.request_succeeded()
        self._last, self._avoided = member, None
        if member.is_text_only:
            sample.metadata["text_only"], sample.logprobs = True, None
        gained = len(sample.tokens) - before
        self._failures = 0 if gained else self._failures
        self._text_is_whole = self._text_is_whole and end.text_complete and before == self._begin
        if end.reason == "abort":
            self._count_piece()
        elif end.reason == "stop":
            self._finish("stop")
        elif gained < self._piece_tokens(before - self._begin) or self._is_full():
            self._finish("length")

    def _is_full(self) -> bool:
        return len(self._sample.tokens) - self._begin >= self._sampling.max_new_tokens

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        """The turn has ended; what becomes of its sample is decided by whoever asked for the turn."""
        self._sample.finish_reason = reason

    def _count_piece(self) -> None:
        """The sample goes on after an interruption or a failure."""
        self._text_is_whole = False
        self._sample.metadata["pieces"] = self._sample.metadata.get("pieces", 1) + 1

    async def _whole_text(self) -> str:
        tokens = self._sample.tokens
        if self._text_is_whole or len(tokens) <= self._begin:
            return cut_at_stop("".join(self._text), self._sampling.stop)
        turn = tokens[self._begin :] if self._begin else tokens
        return cut_at_stop(await self._text_of(turn), self._sampling.stop)

    async def _text_of(self, tokens: Sequence[int]) -> str:
        try:
            return await self._context.detokenize(tokens)
        except EngineError as error:
            raise GenerationFailed(f"sample {self._sample.index} could not be detokenised: {error.message}") from error
