"""The lives of the engines: who belongs to the pool, whether each is well, and what it holds.

Invariants:

* A task an engine: it owns the adapter, probes it, and closes it. Engines come and go while the pool runs; the end of
  one touches no other.
* Engines of a run share a vocabulary, and give either tokens or text alone. One that does not fit stops the start, or
  the request to add it; one that comes up later, or comes back as another, is not used and says why.
* What is known of the parameters that an engine holds is reported whenever it changes, so that a restart knows it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.engines.port import EngineInfo
from orchestrator.errors import BadRequest, EngineError, EngineRejected, EngineStalled, EngineUnavailable

from .member import Member
from .requests_in_flight import RequestsInFlight
from .slots import Slots

__all__ = ["PROBE_TEXT", "Roster", "RosterHooks"]

PROBE_DEADLINE_S: Final = 5.0

LATE_CHECK_INTERVAL_S: Final = 0.25
"""How exactly a late first token is noticed; see ``lateness``."""

PROBE_TEXT: Final = "The quick brown fox, 1234567890 Größe 東京 🙂\n\t<|x|>"
"""Engines whose token ids differ on this text do not share a vocabulary."""


class _Misfit(EngineError):
    """An engine that cannot work beside the others."""


@dataclass(frozen=True, slots=True)
class RosterHooks:
    """What others want to know.

    ``held`` is called with a member whose parameters may be known otherwise than before; ``lags`` is awaited for one
    that is well and does not hold the version in force.
    """

    held: Callable[[Member], None]
    lags: Callable[[Member], Awaitable[None]]


class Roster:
    """See the module's invariants.

    Args:
        members: the engines; this list is the one that changes.
        slots: told of every change.
        requests: for what comes late.
        changed: notified when an engine came up.
        hooks: see :class:`RosterHooks`.
        probe_tokens: see :class:`~orchestrator.engines.EnginePool`.
        log: for engines that come and go.
    """

    def __init__(
        self,
        members: list[Member],
        *,
        slots: Slots,
        requests: RequestsInFlight,
        changed: Broadcast,
        hooks: RosterHooks,
        probe_tokens: Sequence[int] | None,
        log: FilteringBoundLogger,
    ) -> None:
        self._members = members
        self._slots = slots
        self._requests = requests
        self._changed = changed
        self._hooks = hooks
        self._log = log
        self._tasks: TaskGroup | None = None
        self.first_probed = anyio.Event()
        self._has_own_tokenizer = probe_tokens is not None
        self._reference: tuple[str, list[int] | None] | None = None
        if probe_tokens is not None:
            self._reference = ("the tokenizer of the config", list(probe_tokens))

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Own the engines until cancelled; ready after the first probes, whatever they say.

        Raises:
            EngineError: an engine of ours cannot be started, or engines do not fit together.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            async with anyio.create_task_group() as starting:
                for member in self._members:
                    starting.start_soon(tasks.start, self._live, member)
            self.first_probed.set()
            task_status.started()
            tasks.start_soon(self._move_late)

    async def add(self, member: Member) -> None:
        """One more engine; returns after its first probe.

        Raises:
            EngineError: it cannot be started, or does not fit.
        """
        assert self._tasks is not None, "the pool runs"
        self._members.append(member)
        try:
            await self._tasks.start(self._live, member)
        except BaseExceptionGroup as group:
            self._members.remove(member)
            raise _only(group) from None
        except BaseException:
            self._members.remove(member)
            raise

    def remove(self, member: Member) -> None:
        """An engine leaves; its requests go on elsewhere."""
        self._members.remove(member)
        member.is_draining = True
        self._requests.interrupt(member)
        member.watch.scope.cancel()
        self._slots.dispatch()

    def named(self, name: str) -> Member:
        """The engine of that name.

        Raises:
            BadRequest: there is none.
        """
        for member in self._members:
            if member.name == name:
                return member
        known = ", ".join(member.name for member in self._members) or "none"
        raise BadRequest(f"no engine {name!r}; the engines are {known}")

    # -- one engine's life ---------------------------------------------------------------------------------------------

    async def _live(self, member: Member, *, task_status: TaskStatus[None]) -> None:
        try:
            with member.watch.scope:
                async with anyio.create_task_group() as life:
                    await life.start(member.engine.run)
                    await self._probe(member, must_fit=True)
                    task_status.started()
                    await self._watch(member)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(PROBE_DEADLINE_S):
                await member.engine.aclose()

    async def _watch(self, member: Member) -> None:
        while True:
            if not member.watch.is_probe_due:
                with anyio.move_on_after(member.health.check_after_s) as rest:
                    await member.watch.woken.wait()
                    member.watch.woken = anyio.Event()
                if not rest.cancelled_caught and not member.watch.is_probe_due:
                    continue  # its health has changed: another rest
            member.watch.is_probe_due = False
            if member.is_updating:
                continue
            await self._probe(member)
            if member.health.is_up and not member.held.is_current(member.required):
                await self._hooks.lags(member)

    async def _probe(self, member: Member, *, must_fit: bool = False) -> None:
        was_away, sayings = not member.health.is_reachable, member.held.sayings
        try:
            with anyio.fail_after(PROBE_DEADLINE_S):
                info = await member.engine.probe()
                if not member.health.is_up:
                    await self._check_fit(member, info)
        except TimeoutError:
            self._probe_failed(member, f"a probe was not answered within {PROBE_DEADLINE_S:g} s")
        except (EngineUnavailable, EngineStalled, EngineRejected) as error:
            self._probe_failed(member, error.message)
        except _Misfit as error:
            if must_fit:
                raise
            self._probe_failed(member, error.message)
        else:
            if not member.is_updating:
                self._probe_succeeded(member, info, asked_after=sayings, was_away=was_away)

    def _probe_succeeded(self, member: Member, info: EngineInfo, *, asked_after: int, was_away: bool) -> None:
        member.info = info
        was_current = member.held.is_current(member.required)
        member.held.probed(info, asked_after=asked_after, required=member.required, was_away=was_away)
        self._hooks.held(member)
        if member.health.probe_succeeded():
            self._log.info(
                f"engine {member.name} is {member.health.state}: {info.model}", engine=member.name, action="engine_up"
            )
        if was_current and not member.held.is_current(member.required):
            self._log.warning(
                f"engine {member.name} may have been restarted since policy version {member.required} was set: it gets"
                " no work until it is known to hold it (set_policy_version or update_weights)"
            )
        self._slots.dispatch()
        self._changed.notify()

    def _probe_failed(self, member: Member, message: str) -> None:
        is_news = member.health.last_error != message
        if member.health.probe_failed(message) or is_news:
            self._log.warning(f"engine {member.name} is down: {message}", engine=member.name, action="engine_down")
        self._slots.dispatch()

    async def _check_fit(self, member: Member, info: EngineInfo) -> None:
        """All engines and the run's own tokenizer give a probe text the same token ids, or text alone.

        Raises:
            EngineError: this one does not.
        """
        try:
            tokens = None if info.text_only else await member.engine.tokenize(PROBE_TEXT)
        except EngineRejected:
            if not self._has_own_tokenizer:
                raise
            return  # nobody will ask it again
        if self._reference is None:
            self._reference = (member.name, tokens)
            return
        name, expected = self._reference
        if (tokens is None) != (expected is None):
            raise _Misfit(member.name, f"it cannot be used together with {name}: only one of them gives token ids")
        if tokens != expected:
            raise _Misfit(
                member.name,
                f"its token ids differ from those of {name}: all engines of a run must serve the same model",
            )

    # -- lateness ------------------------------------------------------------------------------------------------------

    async def _move_late(self) -> None:
        while True:
            await anyio.sleep(LATE_CHECK_INTERVAL_S)
            if len(self._members) > 1 and self._slots.is_open:
                self._requests.move_late(self._others_with_room)

    def _others_with_room(self, member: Member) -> Sequence[Member]:
        return [other for other in self._members if other is not member and other.is_at_work and other.room]


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a group wraps, if it is one alone."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
