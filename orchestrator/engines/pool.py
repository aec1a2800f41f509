"""The engines as one: their lives, their health, and who may use which.

Invariants:

* Waiting for an engine to come up consumes no retries: a request is sent only to an engine whose last probe succeeded.
* Turning text into tokens and back does not fail by an engine's fault: it goes to the next engine, or waits for one,
  which ``status`` names. An engine that fails at it goes down and comes up only when it can do it again.
* All engines of a run share a vocabulary; one that does not stops the daemon.
* :meth:`EnginePool.interrupt` ends requests, never samples (``generation.py``).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.broadcast import Broadcast
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable
from orchestrator.records import Message, Sample

from .backoff import backoff
from .flights import Flights
from .generation import Generation, GenerationSettings
from .port import Engine, SamplingParams
from .slots import EngineStatistics, Member, Slots

__all__ = ["EnginePool", "EngineStatistics"]

T = TypeVar("T")

HEALTH_CHECK_INTERVAL_S: Final = 5.0
"""While an engine is up its requests say how it is; the probe finds an idle one that died."""

DOWN_CHECK_INTERVAL_S: Final = 1.0
"""An engine that comes back is used within a second."""

PROBE_DEADLINE_S: Final = 5.0
AUXILIARY_DEADLINE_S: Final = 60.0
"""For tokenising: short, but it shares the server with long generations."""

PROBE_TEXT: Final = "The quick brown fox, 1234567890 Größe 東京 🙂\n\t<|x|>"
"""Engines whose token ids differ on this text do not share a vocabulary."""


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
        self._settings = GenerationSettings(
            request_timeout_s=request_timeout_s,
            stall_s=stall_s,
            max_retries=max_retries,
            chunk_tokens=chunk_tokens,
            keep_partials=keep_partials,
            seed=seed,
            policy_version=policy_version,
        )
        self._jitter = random.Random(seed)  # noqa: S311 - no secrets here
        self._log = log
        self._changed = Broadcast()
        self._flights = Flights(self._changed)
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
        except (EngineUnavailable, EngineStalled, EngineRejected) as error:
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
        self._slots.dispatch()

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
        trial: int = 0,
    ) -> None:
        """Extend a sample until it is finished; cancellation keeps what arrived.

        Args:
            sample: fresh, or a partial rollout to go on with.
            prompt_tokens: [P] token ids.
            sampling: how tokens are drawn; ``max_new_tokens`` counts the whole response.
            before_piece: called before each request; may clear the sample.
            after_piece: awaited after each request that did not finish the sample.
            trial: of the same sample, from the start; another one is drawn with other seeds.

        Raises:
            GenerationFailed: retries are used up, or the engine refused the request (then caused by
                ``EngineRejected``).
        """
        generation = Generation(
            sample=sample,
            prompt_tokens=prompt_tokens,
            sampling=sampling,
            settings=self._settings,
            slots=self._slots,
            flights=self._flights,
            detokenize=self.detokenize,
            trial=trial,
            jitter=self._jitter,
            log=self._log,
        )
        await generation.run(before_piece, after_piece)

    # -- text and tokens -----------------------------------------------------------------------------------------------

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text prompt, by any engine that is up.

        Raises:
            EngineRejected: the text was refused.
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
        failed: Member | None = None
        while True:
            member = await self._any_up(avoided=failed)
            try:
                with anyio.fail_after(AUXILIARY_DEADLINE_S):
                    return await call(member.engine)
            except (EngineUnavailable, EngineStalled) as error:
                problem = error.message
            except TimeoutError:
                problem = f"no answer within {AUXILIARY_DEADLINE_S:g} s"
            if member.health.request_failed(problem):
                self._log.warning(f"engine {member.engine.name} is down after failures in a row: {problem}")
                self._slots.dispatch()
            failed = member
            failures += 1
            await anyio.sleep(backoff(self._jitter, failures))

    async def _any_up(self, *, avoided: Member | None) -> Member:
        while True:
            changed = self._changed.next()
            up = [member for member in self._members if member.health.is_up]
            if up:
                return min(up, key=lambda member: (member is avoided, member.load))
            await changed.wait()

    # -- control -------------------------------------------------------------------------------------------------------

    def interrupt(self) -> int:
        """End every request under way; the samples go on by themselves. Returns how many there were."""
        return self._flights.interrupt()

    def pause(self) -> None:
        """Send no requests until :meth:`resume`."""
        self._slots.is_open = False

    def resume(self) -> None:
        """Send requests again."""
        self._slots.is_open = True
        self._slots.dispatch()

    async def quiet(self) -> None:
        """Return when no request is under way; the caller sets a deadline."""
        await self._flights.quiet()

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
        return tuple(member.statistics() for member in self._members)
