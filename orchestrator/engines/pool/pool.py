"""The engines as one: generating, text and tokens, and what is done to all of them.

Invariants:

* Waiting for an engine to come up consumes no retries: a request is sent only to an engine whose last probe succeeded.
* Turning text into tokens and back does not fail by an engine's fault: it goes to the next engine, or waits for one,
  which ``status`` names. An engine that fails at it goes down and comes up only when it can do it again.
* :meth:`EnginePool.interrupt` ends requests, never samples (``generation``).
* Engines come and go (``roster``), and their parameters change (``parameter_update``), while the pool works.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.engines.port import Engine, ParameterUpdate, SamplingParams
from orchestrator.errors import BadRequest
from orchestrator.records import Message, Sample

from .any_engine import AnyEngine
from .exchange import ExchangeSettings
from .generation import Generation
from .generation_context import GenerationContext, GenerationSettings, TurnEnd, TurnRequest
from .held_parameters import HeldParameters
from .member import EngineStatistics, Member
from .parameter_update import EngineUpdate, ParameterUpdates, UpdateMode
from .requests_in_flight import RequestsInFlight
from .roster import Roster, RosterHooks
from .slots import Slots

__all__ = ["EnginePool", "EngineStatistics", "KnownParameters", "PoolSettings"]

FIRST_PROBES_S: Final = 30.0
"""Until what is said of all engines is said without those that are still starting; a probe has 5 s, an engine of ours
starts in less than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What the config says of requests and samples.

    ``request_timeout_s`` bounds one request, ``stall_s`` the time without a token; both in seconds. ``max_retries``:
    failures in a row, without progress, that a sample survives. ``chunk_tokens`` are asked for at a time; ``None``:
    all. ``keep_partials``: keep the tokens of interrupted generations; otherwise they begin anew. ``seed``: of the
    samples' seeds and of the jitter.
    """

    request_timeout_s: float
    stall_s: float
    max_retries: int
    chunk_tokens: int | None
    keep_partials: bool
    seed: int


@dataclass(frozen=True, slots=True)
class KnownParameters:
    """What was known of the engines' parameters before a restart.

    ``version`` is the policy version in force, ``None`` if none was ever set, and ``path`` where its parameters are, if
    known; ``held`` are version and identity by engine (:class:`~.held_parameters.HeldParameters`).
    """

    version: int | None = None
    path: str | None = None
    held: Mapping[str, tuple[int | None, str | None]] = field(default_factory=dict)


class EnginePool:
    """See the module's invariants.

    Args:
        engines: with unique names.
        settings: see :class:`PoolSettings`.
        policy_version: the version in force.
        log: for engines that come and go.
        known: see :class:`KnownParameters`.
        draining: names of engines that get no new requests.
        on_held: called with an engine's name, version and identity when they are known otherwise than before.
        probe_tokens: what the run's own tokenizer makes of ``PROBE_TEXT``: engines have to agree, and need not be able
            to tokenise; ``None``: there is none.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        settings: PoolSettings,
        policy_version: Callable[[], int],
        log: FilteringBoundLogger,
        known: KnownParameters | None = None,
        draining: Collection[str] = (),
        on_held: Callable[[str, int | None, str | None], None] = lambda *_: None,
        probe_tokens: Sequence[int] | None = None,
    ) -> None:
        known = known or KnownParameters()
        self._held_before = dict(known.held)
        self._members = [self._member(engine) for engine in engines]
        for member in self._members:
            member.is_draining = member.name in draining
        self._slots = Slots(self._members)
        jitter = random.Random(settings.seed)  # noqa: S311 - no secrets here
        changed = Broadcast()
        self._requests = RequestsInFlight(changed)
        self._text = AnyEngine(self._members, slots=self._slots, changed=changed, jitter=jitter, log=log)

        self._reported = dict(self._held_before)
        self._on_held = on_held
        self._updates = ParameterUpdates(
            self._members,
            slots=self._slots,
            requests=self._requests,
            policy_version=policy_version,
            held=self._report_held,
            log=log,
        )
        self._updates.in_force(known.version, known.path)
        self._roster = Roster(
            self._members,
            slots=self._slots,
            requests=self._requests,
            changed=changed,
            hooks=RosterHooks(held=self._report_held, lags=self._updates.catch_up),
            probe_tokens=probe_tokens,
            log=log,
        )
        self._context = GenerationContext(
            settings=_generation_settings(settings, policy_version),
            slots=self._slots,
            requests=self._requests,
            detokenize=self.detokenize,
            end_ids=self._end_ids,
            named=self._named,
            jitter=jitter,
            log=log,
        )

    def _member(self, engine: Engine) -> Member:
        return Member(engine, held=HeldParameters(*self._held_before.get(engine.name, (None, None))))

    def _report_held(self, member: Member) -> None:
        now = (member.held.version, member.held.identity)
        if member.held.is_settled and self._reported.get(member.name, (None, None)) != now:
            self._reported[member.name] = now
            self._on_held(member.name, *now)

    def _end_ids(self) -> tuple[int, ...]:
        return next((member.info.end_ids for member in self._members if member.info is not None), ())

    def _named(self, name: str) -> Member | None:
        return next((member for member in self._members if member.name == name), None)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Own the engines and watch their health until cancelled; ready after the first probes, whatever they say.

        Raises:
            EngineError: an engine of ours cannot be started, or engines do not fit together.
        """
        await self._roster.run(task_status=task_status)

    async def first_probed(self) -> None:
        """Until it is known of every engine of the start whether it can be reached, or ``FIRST_PROBES_S`` are over."""
        with anyio.move_on_after(FIRST_PROBES_S):
            await self._roster.first_probed.wait()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        sample: Sample,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        messages: Sequence[Message] | None = None,
        before_piece: Callable[[Sample], None] | None = None,
        after_piece: Callable[[Sample], Awaitable[None]] | None = None,
        trial: int = 0,
    ) -> None:
        """A sample of one turn, fresh or partial, until it is finished; cancellation keeps what arrived.

        Args:
            sample: see :class:`~.generation_context.TurnRequest`, as all others.
            prompt_tokens: see there.
            sampling: see there.
            messages: see there.
            before_piece: see :meth:`turn`, as the next one.
            after_piece: see there.
            trial: see :class:`~.generation_context.TurnRequest`.

        Raises:
            GenerationFailed: see :meth:`turn`.
        """
        turn = TurnRequest(
            sample=sample, prompt_tokens=prompt_tokens, sampling=sampling, messages=messages, trial=trial
        )
        end = await self.turn(turn, before_piece=before_piece, after_piece=after_piece)
        sample.end(end.reason, end.text)

    async def turn(
        self,
        turn: TurnRequest,
        *,
        before_piece: Callable[[Sample], None] | None = None,
        after_piece: Callable[[Sample], Awaitable[None]] | None = None,
    ) -> TurnEnd:
        """Extend a sample until its turn has ended; cancellation keeps what arrived.

        The sample's ``finish_reason`` is set then, and its status is still ``pending``: the caller ends it, or appends
        context and asks for the next turn. A sample with a ``finish_reason`` lacks the text of its turn alone.

        Args:
            turn: what is wanted.
            before_piece: called before each request; may clear the sample.
            after_piece: awaited after each request with which the turn did not end.

        Raises:
            GenerationFailed: retries are used up, or the engine refused the request (then caused by
                ``EngineRejected``); the sample has failed.
        """
        return await Generation(turn, self._context).run(before_piece, after_piece)

    # -- text and tokens -----------------------------------------------------------------------------------------------

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text prompt, by any engine that is up.

        Raises:
            EngineRejected: the text was refused.
        """
        return await self._text.ask(lambda engine: engine.tokenize(text))

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Token ids of chat messages after the model's template; raises like :meth:`tokenize`."""
        return await self._text.ask(lambda engine: engine.tokenize_chat(messages, template_kwargs))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids; raises like :meth:`tokenize`."""
        return await self._text.ask(lambda engine: engine.detokenize(tokens))

    # -- control -------------------------------------------------------------------------------------------------------

    def interrupt(self) -> int:
        """End every request under way; the samples go on by themselves. Returns how many there were."""
        return self._requests.interrupt()

    def pause(self) -> None:
        """Send no requests until :meth:`resume`."""
        self._slots.is_open = False

    def resume(self) -> None:
        """Send requests again."""
        self._slots.is_open = True
        self._slots.dispatch()

    async def quiet(self) -> None:
        """Return when no request is under way; the caller sets a deadline."""
        await self._requests.quiet()

    def hold(self, version: int, path: str | None = None) -> None:
        """All engines that can be reached hold this policy version now: the trainer says so.

        The others get no work until they are known to hold it; they are given it if its ``path`` is known.
        """
        self._updates.hold(version, path)

    def forget(self, version: int) -> None:
        """Nobody knows which parameters the engines hold: none gets work until it is known to hold this version."""
        self._updates.forget(version)

    async def update_parameters(
        self,
        update: ParameterUpdate,
        mode: UpdateMode,
        *,
        rolling: bool,
        timeout_s: float,
        on_first: Callable[[], None],
    ) -> list[EngineUpdate]:
        """New parameters for every engine; see :meth:`~.parameter_update.ParameterUpdates.update`."""
        return await self._updates.update(update, mode, rolling=rolling, timeout_s=timeout_s, on_first=on_first)

    # -- who belongs to it ---------------------------------------------------------------------------------------------

    async def add(self, engine: Engine) -> None:
        """One more engine, from now on.

        Raises:
            BadRequest: its name is taken.
            EngineError: it cannot be started, or does not fit to the others.
        """
        if any(member.name == engine.name for member in self._members):
            raise BadRequest(f"there is already an engine {engine.name!r}; remove it first, or use another name")
        member = self._member(engine)
        member.required = self._updates.required
        await self._roster.add(member)

    def drain(self, name: str, *, is_draining: bool = True) -> int:
        """Send an engine no new requests, or again; returns how many it still has.

        Raises:
            BadRequest: no engine of that name.
        """
        member = self._roster.named(name)
        member.is_draining = is_draining
        self._slots.dispatch()
        return member.in_flight

    def remove(self, name: str) -> int:
        """Let an engine go; what it was doing goes on elsewhere. Returns how many requests that were.

        Raises:
            BadRequest: no engine of that name.
        """
        member = self._roster.named(name)
        in_flight = member.in_flight
        self._held_before.pop(name, None)  # another one may come under that name
        self._roster.remove(member)
        return in_flight

    # -- what is said --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._slots.waiting

    async def is_text_only(self) -> bool:
        """Whether the engines give text alone; waits for one that says so."""
        return (await self._text.any_up()).is_text_only

    def statistics(self) -> tuple[EngineStatistics, ...]:
        """Every engine as it is now."""
        return tuple(member.statistics() for member in self._members)


def _generation_settings(settings: PoolSettings, policy_version: Callable[[], int]) -> GenerationSettings:
    return GenerationSettings(
        exchange=ExchangeSettings(
            request_timeout_s=settings.request_timeout_s, stall_s=settings.stall_s, policy_version=policy_version
        ),
        max_retries=settings.max_retries,
        chunk_tokens=settings.chunk_tokens,
        keep_partials=settings.keep_partials,
        seed=settings.seed,
    )
