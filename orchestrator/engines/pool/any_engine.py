"""What any engine can do as well as any other, such as tokenising: asked of one that is up, then of the next.

Invariants:

* It does not fail by an engine's fault: it goes to the next engine, or waits for one. Only a refusal is final.
* While another engine is at work, one that does not answer costs ``PATIENCE_S``.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.engines.port import Engine
from orchestrator.errors import EngineStalled, EngineUnavailable

from .backoff import backoff
from .member import Member
from .slots import Slots

__all__ = ["AnyEngine"]

T = TypeVar("T")

DEADLINE_S: Final = 60.0
"""For something short that shares the server with long generations."""

PATIENCE_S: Final = 5.0
"""The same, while another engine could do it."""


class AnyEngine:
    """See the module's invariants.

    Args:
        members: the engines; the list of the pool.
        slots: told of an engine that goes down.
        changed: notified when an engine came up.
        jitter: of the waits between tries.
        log: for an engine that goes down.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        slots: Slots,
        changed: Broadcast,
        jitter: random.Random,
        log: FilteringBoundLogger,
    ) -> None:
        self._members = members
        self._slots = slots
        self._changed = changed
        self._jitter = jitter
        self._log = log

    async def ask(self, call: Callable[[Engine], Awaitable[T]]) -> T:
        """The answer of the first engine that gives one.

        Raises:
            EngineRejected: what was asked was refused.
        """
        failures = 0
        failed: Member | None = None
        while True:
            member = await self.any_up(avoided=failed)
            has_others = any(other.is_at_work for other in self._members if other is not member)
            deadline_s = PATIENCE_S if has_others else DEADLINE_S
            try:
                with anyio.fail_after(deadline_s):
                    return await call(member.engine)
            except (EngineUnavailable, EngineStalled) as error:
                problem = error.message
            except TimeoutError:
                problem = f"no answer within {deadline_s:g} s"
            if member.went_wrong(member.health.request_failed(problem)):
                self._log.warning(
                    f"engine {member.name} is down after repeated failures: {problem}",
                    engine=member.name,
                    action="engine_down",
                )
                self._slots.dispatch()
            failed = member
            failures += 1
            await anyio.sleep(backoff(self._jitter, failures))

    async def any_up(self, *, avoided: Member | None = None) -> Member:
        """An engine that is up, the least loaded of those at work first; waits for one."""
        while True:
            changed = self._changed.next()
            up = [member for member in self._members if member.health.is_up]
            if up:
                return min(up, key=lambda member: (member is avoided, not member.is_at_work, member.load))
            await changed.wait()
