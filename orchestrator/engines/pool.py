"""The engines as one: choice, deadlines, retries, interruption.

Invariants:

* This is the one layer that retries. A sample is tried again, elsewhere where possible, with its tokens kept; after
  ``max_retries`` failures in a row without a new token it has failed. A request that was refused (4xx) is not repeated.
* Waiting for an engine to come up consumes no retries.
* No token within ``stall_s``, or no end within ``request_timeout_s``, ends a request.
* Tokens count under the policy version in force when they arrive.
* :meth:`EnginePool.interrupt` ends requests, never samples: each goes on by itself once dispatch is open.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.broadcast import Broadcast
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Message, Sample, SampleStatus

from .port import Engine, GenerationEnd, GenerationRequest, SamplingParams
from .slots import Member, Slots

__all__ = ["EnginePool", "EngineStatistics"]

T = TypeVar("T")

HEALTH_CHECK_INTERVAL_S: Final = 5.0
"""While an engine is up its requests say how it is; the probe finds an idle one that died."""

DOWN_CHECK_INTERVAL_S: Final = 1.0
"""An engine that comes back is used within a second."""

PROBE_DEADLINE_S: Final = 5.0
AUXILIARY_DEADLINE_S: Final = 60.0
"""For tokenising: short, but it shares the server with long generations."""

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0

PROBE_TEXT: Final = "The quick brown fox, 1234567890 Größe 東京 🙂\n\t<|x|>"
"""Engines whose token ids differ on this text do not share a vocabulary."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine as ``status`` shows it; counts are of requests since the start, ``tokens`` of tokens received."""

    name: str
    state: str
    in_flight: int
    max_in_flight: int
    completed: int
    failed: int
    stalled: int
    interrupted: int
    tokens: int
    last_error: str | None
    model: str | None


@dataclass(slots=True, eq=False)
class _Flight:
    """One request under way; its scope ends it, ``was_interrupted`` says that we meant to."""

    scope: anyio.CancelScope
    was_interrupted: bool = False

    def interrupt(self) -> None:
        """End the request; the sample goes on later."""
        self.was_interrupted = True
        self.scope.cancel()


@dataclass(slots=True)
class _Progress:
    """What is known of a sample beyond the sample: for retries, seeds and its text."""

    failures: int = 0
    attempt: int = 0
    text: list[str] = field(default_factory=list)
    text_is_whole: bool = True
    last: Member | None = None


class EnginePool:
    """See the module's invariants.

    Args:
        engines: with unique names.
        request_timeout_s: of one request.
        stall_s: without a token.
        max_retries: failures in a row, without progress, that a sample survives.
        chunk_tokens: asked for at a time; ``None``: all.
        keep_partials: keep the tokens of interrupted generations; otherwise they begin anew.
        policy_version: the version in force.
        seed: of the samples' seeds and of the jitter.
        log: for engines that come and go.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        request_timeout_s: float,
        stall_s: float,
        max_retries: int,
        chunk_tokens: int | None,
        keep_partials: bool,
        policy_version: Callable[[], int],
        seed: int,
        log: FilteringBoundLogger,
    ) -> None:
        self._members = [Member(engine) for engine in engines]
        self._slots = Slots(self._members)
        self._request_timeout_s = request_timeout_s
        self._stall_s = stall_s
        self._max_retries = max_retries
        self._chunk_tokens = chunk_tokens
        self._keep_partials = keep_partials
        self._policy_version = policy_version
        self._seed = seed
        self._jitter = random.Random(seed)  # noqa: S311 - no secrets here
        self._log = log
        self._flights: set[_Flight] = set()
        self._changed = Broadcast()
        self._probe_tokens: tuple[str, list[int]] | None = None

    # -- supervision ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Own the engines and watch their health until cancelled; ready after the first probes, whatever they say.

        Raises:
            EngineError: an engine of ours cannot be started, or engines disagree about the vocabulary.
        """
        try:
            async with anyio.create_task_group() as tasks:
                for member in self._members:
                    await tasks.start(member.engine.run)
                async with anyio.create_task_group() as probes:
                    for member in self._members:
                        probes.start_soon(self._probe, member)
                task_status.started()
                for member in self._members:
                    tasks.start_soon(self._watch, member)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(PROBE_DEADLINE_S):
                for member in self._members:
                    await member.engine.aclose()

    async def _watch(self, member: Member) -> None:
        while True:
            await anyio.sleep(HEALTH_CHECK_INTERVAL_S if member.health.is_up else DOWN_CHECK_INTERVAL_S)
            await self._probe(member)

    async def _probe(self, member: Member) -> None:
        name = member.engine.name
        try:
            with anyio.fail_after(PROBE_DEADLINE_S):
                member.info = await member.engine.probe()
                if not member.health.is_up:
                    await self._compare_vocabulary(member)
        except TimeoutError:
            self._probe_failed(member, f"no answer to a probe within {PROBE_DEADLINE_S:g} s")
        except (EngineUnavailable, EngineStalled) as error:
            self._probe_failed(member, error.message)
        else:
            if member.health.probe_succeeded():
                self._log.info(f"engine {name} is up: {member.info.model}")
                self._slots.dispatch()
                self._changed.notify()

    def _probe_failed(self, member: Member, message: str) -> None:
        is_news = member.health.last_error != message
        if member.health.probe_failed(message) or is_news:
            self._log.warning(f"engine {member.engine.name} is down: {message}")

    async def _compare_vocabulary(self, member: Member) -> None:
        """All engines give a probe text the same token ids.

        Raises:
            EngineError: this one does not.
        """
        tokens = await member.engine.tokenize(PROBE_TEXT)
        if self._probe_tokens is None:
            self._probe_tokens = (member.engine.name, tokens)
        elif tokens != self._probe_tokens[1]:
            raise EngineError(
                member.engine.name,
                f"its token ids differ from those of {self._probe_tokens[0]}: all engines of a run serve one model",
            )

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        sample: Sample,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        before_piece: Callable[[Sample], None] | None = None,
        after_piece: Callable[[Sample], Awaitable[None]] | None = None,
        source: str = "",
    ) -> None:
        """Extend a sample until it is finished; cancellation keeps what arrived.

        Args:
            sample: fresh, or a partial rollout to go on with.
            prompt_tokens: [P] token ids.
            sampling: how tokens are drawn; ``max_new_tokens`` counts the whole response.
            before_piece: called before each request; may clear the sample.
            after_piece: awaited after each request that did not finish the sample.
            source: for messages.

        Raises:
            GenerationFailed: retries are used up, or the engine refused the request (then caused by
                ``EngineRejected``).
        """
        progress = _Progress()
        if sample.tokens:
            self._count_piece(sample)
            progress.text_is_whole = False
        while not sample.is_finished:
            if before_piece is not None:
                before_piece(sample)
            if not sample.tokens:
                progress.text, progress.text_is_whole = [], True
            if len(sample.tokens) >= sampling.max_new_tokens:
                sample.status, sample.finish_reason = SampleStatus.TRUNCATED, "length"
                break
            await self._step(sample, prompt_tokens, sampling, progress)
            if not sample.is_finished and after_piece is not None:
                await after_piece(sample)
        sample.text = await self._text(sample, sampling, progress)

    async def _step(
        self, sample: Sample, prompt_tokens: Sequence[int], sampling: SamplingParams, progress: _Progress
    ) -> None:
        """One request; afterwards the sample is finished, or longer, or one failure nearer to its end."""
        before = len(sample.tokens)
        member = await self._slots.acquire(progress.last, is_continued=before > 0)
        request = self._request(sample, prompt_tokens, sampling, progress)
        progress.attempt += 1
        flight = _Flight(anyio.CancelScope())
        try:
            end = await self._exchange(member, flight, request, sample, progress)
        except EngineRejected as error:
            member.health.request_succeeded()
            member.failed += 1
            raise GenerationFailed(f"sample {sample.index} was refused: {error.message}") from error
        except (EngineUnavailable, EngineStalled) as error:
            await self._failed(member, error, sample, progress, had_progress=len(sample.tokens) > before)
            return
        finally:
            self._slots.release(member)
        if flight.was_interrupted or end is None:
            self._interrupted(member, sample)
        elif end.reason == "abort" and len(sample.tokens) == before:
            error = EngineUnavailable(member.engine.name, "it ended a request without a token and without being asked")
            await self._failed(member, error, sample, progress, had_progress=False)
        else:
            self._ended(member, end, request, sample, sampling, progress)

    def _request(
        self, sample: Sample, prompt_tokens: Sequence[int], sampling: SamplingParams, progress: _Progress
    ) -> GenerationRequest:
        remaining = sampling.max_new_tokens - len(sample.tokens)
        seed = self._seed if sampling.seed is None else sampling.seed
        key = f"{seed}/{sample.index}/{len(sample.tokens)}/{progress.attempt}".encode()
        return GenerationRequest(
            request_id=f"{sample.index}-{len(sample.tokens)}-{progress.attempt}",
            tokens=[*prompt_tokens, *sample.tokens],
            max_new_tokens=min(remaining, self._chunk_tokens or remaining),
            sampling=sampling,
            seed=zlib.crc32(key),
            generated=len(sample.tokens),
            sample_index=sample.index,
            attempt=progress.attempt,
        )

    async def _exchange(
        self, member: Member, flight: _Flight, request: GenerationRequest, sample: Sample, progress: _Progress
    ) -> GenerationEnd | None:
        """Send a request and collect its tokens; ``None`` if it was interrupted.

        Raises:
            EngineStalled: by its deadlines; or what the engine raises.
        """
        last_moment = anyio.current_time() + self._request_timeout_s

        def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            sample.extend(tokens, logprobs, self._policy_version())
            progress.text.append(text)
            member.tokens += len(tokens)
            flight.scope.deadline = min(last_moment, anyio.current_time() + self._stall_s)

        flight.scope.deadline = min(last_moment, anyio.current_time() + self._stall_s)
        self._flights.add(flight)
        try:
            with flight.scope:
                return await member.engine.generate(request, sink)
        finally:
            self._flights.discard(flight)
            self._changed.notify()
        if flight.was_interrupted:
            return None
        member.stalled += 1
        if anyio.current_time() >= last_moment:
            raise EngineStalled(member.engine.name, f"no end of a request within {self._request_timeout_s:g} s")
        raise EngineStalled(member.engine.name, f"no token for {self._stall_s:g} s")

    def _interrupted(self, member: Member, sample: Sample) -> None:
        member.interrupted += 1
        member.health.request_succeeded()
        if self._keep_partials:
            if sample.tokens:
                self._count_piece(sample)
        else:
            sample.clear()

    async def _failed(
        self, member: Member, error: EngineError, sample: Sample, progress: _Progress, *, had_progress: bool
    ) -> None:
        """Note a failure and wait a little; the next request goes elsewhere if it can.

        Raises:
            GenerationFailed: it was one too many.
        """
        member.failed += 1
        if member.health.request_failed(error.message):
            self._log.warning(f"engine {member.engine.name} is down after failures in a row: {error.message}")
        progress.failures = 1 if had_progress else progress.failures + 1
        progress.last = None
        if progress.failures > self._max_retries:
            raise GenerationFailed(
                f"sample {sample.index} failed {progress.failures} times without a new token, last: {error.message}"
            ) from error
        if sample.tokens:
            self._count_piece(sample)
            progress.text_is_whole = False
        ceiling = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**progress.failures)
        await anyio.sleep(self._jitter.uniform(0, ceiling))

    def _ended(
        self,
        member: Member,
        end: GenerationEnd,
        request: GenerationRequest,
        sample: Sample,
        sampling: SamplingParams,
        progress: _Progress,
    ) -> None:
        member.completed += 1
        member.health.request_succeeded()
        progress.last = member
        gained = len(sample.tokens) - request.generated
        progress.failures = 0 if gained else progress.failures
        progress.text_is_whole = progress.text_is_whole and end.text_complete and request.generated == 0
        if end.reason == "abort":
            self._count_piece(sample)
        elif end.reason == "stop":
            sample.status, sample.finish_reason = SampleStatus.COMPLETED, "stop"
        elif gained < request.max_new_tokens or len(sample.tokens) >= sampling.max_new_tokens:
            sample.status, sample.finish_reason = SampleStatus.TRUNCATED, "length"

    @staticmethod
    def _count_piece(sample: Sample) -> None:
        """The sample goes on after an interruption or a failure."""
        sample.metadata["pieces"] = sample.metadata.get("pieces", 1) + 1

    async def _text(self, sample: Sample, sampling: SamplingParams, progress: _Progress) -> str:
        if progress.text_is_whole:
            return "".join(progress.text)
        try:
            text = await self.detokenize(sample.tokens)
        except EngineError as error:
            raise GenerationFailed(f"sample {sample.index} could not be detokenised: {error.message}") from error
        cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    # -- text and tokens -----------------------------------------------------------------------------------------------

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text prompt, by any engine that is up.

        Raises:
            EngineError: refused, or failing repeatedly.
        """
        return await self._ask(lambda engine: engine.tokenize(text))

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Token ids of chat messages after the model's template; raises like :meth:`tokenize`."""
        return await self._ask(lambda engine: engine.tokenize_chat(messages, template_kwargs))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids; raises like :meth:`tokenize`."""
        return await self._ask(lambda engine: engine.detokenize(tokens))

    async def _ask(self, call: Callable[[Engine], Awaitable[T]]) -> T:
        failures = 0
        while True:
            member = await self._any_up()
            try:
                with anyio.fail_after(AUXILIARY_DEADLINE_S):
                    return await call(member.engine)
            except TimeoutError as error:
                problem = f"no answer within {AUXILIARY_DEADLINE_S:g} s"
                if failures >= self._max_retries:
                    raise EngineStalled(member.engine.name, problem) from error
            except EngineUnavailable as error:
                problem = error.message
                if failures >= self._max_retries:
                    raise
            member.health.request_failed(problem)
            failures += 1
            await anyio.sleep(self._jitter.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**failures)))

    async def _any_up(self) -> Member:
        while True:
            changed = self._changed.next()
            up = [member for member in self._members if member.health.is_up]
            if up:
                return min(up, key=lambda member: member.load)
            await changed.wait()

    # -- control -------------------------------------------------------------------------------------------------------

    def interrupt(self) -> int:
        """End every request under way; the samples go on by themselves. Returns how many there were."""
        flights = list(self._flights)
        for flight in flights:
            flight.interrupt()
        return len(flights)

    def pause(self) -> None:
        """Send no requests until :meth:`resume`."""
        self._slots.is_open = False

    def resume(self) -> None:
        """Send requests again."""
        self._slots.is_open = True
        self._slots.dispatch()

    async def quiet(self) -> None:
        """Return when no request is under way; the caller sets a deadline."""
        while self._flights:
            await self._changed.next().wait()

    # -- what is said --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._flights)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._slots.waiting

    def statistics(self) -> tuple[EngineStatistics, ...]:
        """Every engine as it is now."""
        return tuple(
            EngineStatistics(
                name=member.engine.name,
                state=member.health.state,
                in_flight=member.in_flight,
                max_in_flight=member.engine.max_in_flight,
                completed=member.completed,
                failed=member.failed,
                stalled=member.stalled,
                interrupted=member.interrupted,
                tokens=member.tokens,
                last_error=member.health.last_error,
                model=member.info.model if member.info is not None else None,
            )
            for member in self._members
        )
