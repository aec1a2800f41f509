"""One producer a source: it launches what the plan asks for and owns the source's groups in flight.

Invariants:

* Bounds act at launch, never at put: a group that was launched may always finish.
* What is launched follows the plan of the coming batches and the measured share of groups that pass the filter.
* A slow or failing source never stops another: producers share nothing but the engines.
* After a restart the groups that were in flight go on under their own indices before anything new is launched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import anyio
from anyio.abc import TaskGroup
from structlog.typing import FilteringBoundLogger

from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.mixture.outlook import Demand
from orchestrator.core.mixture.plan import launches
from orchestrator.core.statistics import Acceptance

from .group_source import ProducerStatistics
from .launcher import LaunchControl, Launcher
from .runner import GroupOutcome, Runner

__all__ = ["Producer"]


FIRST_PAUSE_S: Final = 0.02
MAX_PAUSE_S: Final = 30.0
"""The place of a group that failed stays empty for a while, twice as long each time that groups fail which were
launched since the last one did: a reward that always raises must not use a source's prompts up at full speed."""


class Producer:
    """A :class:`~.group_source.GroupSource`; see the module's invariants.

    Args:
        launcher: launches the source's groups.
        runner: takes a group from launch to buffer.
        control: says how many groups may be launched.
        log: a logger bound to the source.
    """

    def __init__(
        self, *, launcher: Launcher, runner: Runner, control: LaunchControl, log: FilteringBoundLogger
    ) -> None:
        self._launcher = launcher
        self._state = launcher.state
        self._ledger = launcher.ledger
        self._runner = runner
        self._control = control
        self._log = log
        self._acceptance = Acceptance()
        self._over_bound = 0
        self._failed_in_a_row = 0
        self._failed_before = 0  # groups with an index below were in flight already when that was counted
        self._empty_places = 0  # of groups that failed a moment ago
        self._warned_at_step = -1

    async def run(self) -> None:
        """Produce until cancelled; what is in flight then is parked as partial rollouts."""
        async with anyio.create_task_group() as groups:
            self._start(groups, list(self._state.in_flight.values()))
            while True:
                replan = self._control.replan.next()
                self._start(groups, self._launch())
                await replan.wait()

    def _start(self, groups: TaskGroup, all_launched: Iterable[InFlight]) -> None:
        for launched in all_launched:
            groups.start_soon(self._group, groups, launched, name=f"{self._state.name}/{launched.group_index}")

    def _launch(self) -> list[InFlight]:
        """Launch what the plan asks for; returns the new groups in flight."""
        if not self._control.may_launch() or self._state.paused:
            return []
        demand = self._control.demand()
        order = launches(
            wanted=demand.wanted,
            next_count=demand.next_count,
            buffered=len(self._state.ready),
            in_flight=len(self._state.in_flight) + self._empty_places,
            acceptance=self._acceptance.value,
            bound=demand.bound,
        )
        if order.over_bound:
            self._warn_over_bound(demand, order.count)
        all_launched: list[InFlight] = []
        while len(all_launched) < order.count and (launched := self._launcher.launch()) is not None:
            all_launched.append(launched)
        return all_launched

    def _warn_over_bound(self, demand: Demand, count: int) -> None:
        self._over_bound += count
        if self._warned_at_step != self._ledger.step:
            self._warned_at_step = self._ledger.step
            self._log.warning(
                f"launching {count} groups beyond the bound of {demand.bound}, because the next batch lacks them;"
                " raise over_sampling_batch_size or this source's buffer"
            )

    async def _group(self, groups: TaskGroup, launched: InFlight) -> None:
        outcome = await self._runner.run(launched)
        if outcome is GroupOutcome.FAILED:
            await self._pause(launched)
        elif outcome is not GroupOutcome.STALE:  # the age of a group says nothing of its source
            self._failed_in_a_row = 0
            self._acceptance.add(outcome is GroupOutcome.BUFFERED)
        self._start(groups, self._launch())  # its end concerns no other producer: they are not woken

    async def _pause(self, launched: InFlight) -> None:
        """Keep the place of a group that failed empty for a while."""
        if launched.group_index >= self._failed_before:
            self._failed_in_a_row += 1
            self._failed_before = self._ledger.next_group
        self._empty_places += 1
        try:
            await anyio.sleep(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failed_in_a_row, 16)))
        finally:
            self._empty_places -= 1

    def statistics(self) -> ProducerStatistics:
        """Counts since the start."""
        counted = self._runner.statistics()
        return ProducerStatistics(
            acceptance=self._acceptance.value,
            over_bound=self._over_bound,
            failed_samples=counted.failed_samples,
            replaced_samples=counted.replaced_samples,
            last_failure=counted.last_failure,
            is_launching=self._control.may_launch() and not self._state.paused,
            oldest=self._runner.oldest(),
        )
