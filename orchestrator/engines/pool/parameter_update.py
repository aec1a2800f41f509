"""New parameters for the engines: each is made quiet, updated, and let go on, all at once or one after the other.

Invariants:

* An engine works, with the old parameters or with the new ones, but for the time of its own update. Its tokens count
  under the version that it holds.
* The report is honest: an engine that refused keeps what it held; one that failed half way holds nobody knows what, and
  gets no work until that is known.
* An engine that comes (back) without the version in force is given it, where its path is known.
* One :meth:`ParameterUpdates.update` at a time, the caller sees to that; and one load at a time at each engine: an
  update waits for an engine that is just given the version before, within its own deadline, and the engine gets no work
  between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.engines.port import ParameterUpdate
from orchestrator.errors import EngineError, EngineRejected

from .member import Member
from .requests_in_flight import RequestsInFlight
from .slots import Slots

__all__ = ["EngineUpdate", "ParameterUpdates", "UpdateMode"]

UpdateMode = Literal["abort", "finish", "keep"]
"""What becomes of requests in flight: cut into partial rollouts, waited for, or kept while their engine changes."""

CATCH_UP_DEADLINE_S = 600.0
"""Reading hundreds of gigabytes from a shared file system takes minutes."""


@dataclass(frozen=True, slots=True)
class EngineUpdate:
    """How it went at one engine: ``aborted`` requests were cut, ``seconds`` passed, ``error`` in words or ``None``."""

    engine: str
    updated: bool
    aborted: int
    seconds: float
    error: str | None


class ParameterUpdates:
    """See the module's invariants.

    Args:
        members: the engines; the list of the pool.
        slots: told when an engine may work again.
        requests: what is under way.
        policy_version: the version in force.
        held: called with a member whose parameters may be known otherwise than before.
        log: for engines that catch up.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        slots: Slots,
        requests: RequestsInFlight,
        policy_version: Callable[[], int],
        held: Callable[[Member], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._members = members
        self._slots = slots
        self._requests = requests
        self._policy_version = policy_version
        self._held = held
        self._log = log
        self._in_force: ParameterUpdate | None = None
        self.required: int | None = None
        self._refused: set[Member] = set()

    def in_force(self, version: int | None, path: str | None) -> None:
        """This version is required from now on; with a path, engines that lack it are given it."""
        self._in_force = None if version is None or path is None else ParameterUpdate(path, version)
        self.required = version
        for member in self._members:
            member.required = version
        self._slots.dispatch()

    def hold(self, version: int, path: str | None) -> None:
        """Engines that can be reached hold this version: somebody who knows says so."""
        self.in_force(version, path)
        for member in self._members:
            if member.health.is_reachable:
                member.held.told(version)
                member.probe_soon()
        self._slots.dispatch()

    def forget(self, version: int) -> None:
        """Nobody knows what the engines hold; this version is required."""
        self.in_force(version, None)
        for member in self._members:
            member.held.lost()
            member.probe_soon()
        self._slots.dispatch()

    async def update(
        self,
        update: ParameterUpdate,
        mode: UpdateMode,
        *,
        rolling: bool,
        timeout_s: float,
        on_first: Callable[[], None],
    ) -> list[EngineUpdate]:
        """Update every engine.

        Args:
            update: what to load.
            mode: see :data:`UpdateMode`.
            rolling: one engine after the other, so that the rest goes on meanwhile.
            timeout_s: for each engine.
            on_first: called when the first engine holds the new parameters, before it goes on.
        """
        self._refused.clear()
        reports: dict[Member, EngineUpdate] = {}
        members = list(self._members)
        if self.required is None:  # no version was ever set: all hold what they were started with
            for member in members:
                member.held.told(self._policy_version())
        is_first = True

        async def one(member: Member) -> None:
            def updated() -> None:
                nonlocal is_first
                if is_first:
                    is_first = False
                    on_first()

            reports[member] = await self._one(member, update, mode, timeout_s, updated)

        try:
            if rolling:
                for member in members:
                    await one(member)
            else:
                async with anyio.create_task_group() as tasks:
                    for member in members:
                        tasks.start_soon(one, member)
        finally:
            if not is_first:
                self.in_force(update.version, update.path)
        return [reports[member] for member in members]

    async def catch_up(self, member: Member) -> None:
        """Give an engine the version in force, if its path is known and the engine did not refuse it."""
        if self._in_force is None or member in self._refused or member.is_draining or member.is_updating:
            return
        report = await self._one(member, self._in_force, "finish", CATCH_UP_DEADLINE_S, lambda: None)
        if report.updated:
            self._log.info(f"engine {member.name} loaded policy version {self._in_force.version} again")
        else:
            self._log.warning(
                f"engine {member.name} does not have policy version {self._in_force.version}: {report.error}"
            )

    # -- one engine ----------------------------------------------------------------------------------------------------

    async def _one(
        self, member: Member, update: ParameterUpdate, mode: UpdateMode, timeout_s: float, updated: Callable[[], None]
    ) -> EngineUpdate:
        began = anyio.current_time()
        if not member.health.is_reachable:
            why = f"it is down ({member.health.last_error or 'it has not answered yet'})"
            return EngineUpdate(member.name, updated=False, aborted=0, seconds=0.0, error=why)
        member.updates += 1
        aborted = self._requests.interrupt(member) if mode == "abort" else 0
        error = None
        try:
            with anyio.move_on_after(timeout_s) as deadline:
                async with member.loading:
                    await self._make_quiet(member, mode)
                    error = await self._load(member, update, keeps_requests=mode == "keep")
                    if error is None:
                        member.held.told(update.version)
            if deadline.cancelled_caught:
                error = f"it did not finish within {timeout_s:g} s"
            if error is None:
                updated()
        finally:
            member.updates -= 1
            self._requests.restart_clocks(member)
            self._held(member)
            member.probe_soon()
            self._slots.dispatch()
        return EngineUpdate(member.name, error is None, aborted, anyio.current_time() - began, error)

    async def _make_quiet(self, member: Member, mode: UpdateMode) -> None:
        if mode == "keep":
            self._requests.hold_clocks(member)
        else:
            await self._requests.quiet(member)

    async def _load(self, member: Member, update: ParameterUpdate, *, keeps_requests: bool) -> str | None:
        """Why the engine did not load them; ``None``: it did."""
        is_known = False
        try:
            await member.engine.update_parameters(ParameterUpdate(update.path, update.version, keeps_requests))
            is_known = True
        except EngineRejected as error:
            is_known = True
            self._refused.add(member)
            member.health.last_error = error.message
            return error.message
        except EngineError as error:
            member.health.last_error = error.message
            return error.message
        finally:
            if not is_known:  # cancelled ones included
                member.held.lost()
                member.required = update.version
        return None
