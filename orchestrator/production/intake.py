"""A source that is filled from outside: groups come to it, and nothing is produced for it.

Whoever has groups (an HTTP endpoint, an agent's runner) uses the intake in one of two ways: :meth:`Intake.push` takes
a group that is there already; :meth:`Intake.launch` opens one that :meth:`Intake.put` or :meth:`Intake.give_up` ends
later.

Invariants:

* The journal sees what it sees of a producer: ``Launched``, then the group's frame or ``Dropped`` with its reason.
* Bounds act at launch: while as many groups are in flight and buffered as may be, there is no launch, unless the next
  batch lacks them. What was launched may always be put.
* A group that is refused leaves no trace. A group that is filtered, or cannot be stored, is dropped and counted.
* An open group lives as long as the intake runs. When that is stopped, or the daemon ends, nobody has the group any
  more: the next run begins by dropping it, and it is counted as ``abandoned``.

The ledger needs the size of a source: that of one filled from outside is :data:`OUTSIDE`, and the ``prompt_index`` of a
group is its number among those that came. A number whose group was dropped as stale is given to the next one.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.core.statistics import Acceptance
from orchestrator.errors import BadRequest, OrchestratorError
from orchestrator.records import Group, Prompt, Sample

from .finisher import Finisher, drop
from .group_source import ProducerStatistics
from .launcher import LaunchControl, Launcher
from .runner import GroupOutcome

__all__ = ["ABANDONED", "OUTSIDE", "Accepted", "Intake", "OutsideGroup", "SourceFull"]

OUTSIDE: Final = SourceSize(rows=1 << 53)
"""As many as JSON can count: a source filled from outside never comes to its end by itself."""

ABANDONED: Final = "abandoned"
"""The reason under which groups count that were open when their source was stopped."""


class SourceFull(OrchestratorError, RuntimeError):
    """The source takes no group now: its bound is reached, or it is paused; offer the group again later."""

    code = "source_full"


@dataclass(slots=True, kw_only=True)
class OutsideGroup:
    """A group from outside.

    ``prompt`` says what was asked; its source, index and epoch are given here, as the indices of ``samples`` are. All
    samples are finished and have rewards. ``sampling`` and ``logprobs_kind``: see :class:`~orchestrator.records.Group`.
    """

    prompt: Prompt
    prompt_tokens: array[int]
    samples: list[Sample]
    sampling: dict[str, Any] = field(default_factory=dict)
    logprobs_kind: str = "temperature"


class Accepted(NamedTuple):
    """What became of a group: its index, and whether it was buffered, filtered out, or could not be stored."""

    group_index: int
    outcome: GroupOutcome
    failure: str | None


class Intake:
    """A :class:`~.group_source.GroupSource` that produces nothing; see the module's invariants.

    Args:
        launcher: of the source.
        control: the bounds.
        finisher: filters and stores.
        log: a logger bound to the source.
    """

    def __init__(
        self, *, launcher: Launcher, control: LaunchControl, finisher: Finisher, log: FilteringBoundLogger
    ) -> None:
        self._launcher = launcher
        self._control = control
        self._finisher = finisher
        self._log = log
        self._acceptance = Acceptance()
        self._open: dict[int, InFlight] = {}
        self._is_running = False
        self._last_failure: str | None = None

    async def run(self) -> None:
        """Take groups until cancelled."""
        self._abandon()
        self._is_running = True
        try:
            await anyio.sleep_forever()
        finally:
            self._is_running = False
            self._open.clear()

    def _abandon(self) -> None:
        left = list(self._launcher.state.in_flight.values())
        for launched in left:
            self._drop(launched, ABANDONED)
        if left:
            self._log.warning(f"{len(left)} groups were still open when the source was stopped, and are dropped")

    # -- what comes from outside ---------------------------------------------------------------------------------------

    def push(self, group: OutsideGroup) -> Accepted:
        """Take a group that is there already.

        Raises:
            SourceFull: not now; nothing is kept of it.
            BadRequest: it is not a group of this source; nothing is kept of it.
        """
        self._check(group)
        return self._finish(self.launch(), group)

    def launch(self) -> InFlight:
        """Open a group, which has its indices from now on.

        Raises:
            SourceFull: not now.
        """
        state, demand = self._launcher.state, self._control.demand()
        if not self._is_running or not self._control.may_launch() or state.paused:
            raise SourceFull(f"source {state.name} does not accept groups: it is paused or stopped")
        if state.outstanding >= max(demand.bound, demand.next_count):
            raise SourceFull(
                f"source {state.name} has {state.outstanding} groups in flight and buffered; at most {demand.bound}"
                f" are allowed ({demand.bound_by}). Send more after the next batch"
            )
        launched = self._launcher.launch()
        if launched is None:
            raise SourceFull(f"source {state.name} accepts no more groups: all its prompts are used")
        self._open[launched.group_index] = launched
        return launched

    def put(self, group_index: int, group: OutsideGroup) -> Accepted:
        """The group that was opened under this index is finished.

        Raises:
            BadRequest: no such group is open, or it is not a group of this source; nothing has changed.
        """
        launched = self._opened(group_index)
        self._check(group)
        return self._finish(launched, group)

    def give_up(self, group_index: int, reason: str) -> None:
        """The group that was opened under this index will not come; it is counted under the reason.

        Raises:
            BadRequest: no such group is open.
        """
        self._drop(self._opened(group_index), reason)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _opened(self, group_index: int) -> InFlight:
        launched = self._open.get(group_index)
        if launched is None:
            raise BadRequest(f"source {self._launcher.state.name} has no open group {group_index}; launch one first")
        return launched

    def _check(self, group: OutsideGroup) -> None:
        if len(group.samples) != self._launcher.n_samples:
            raise BadRequest(
                f"a group must have {self._launcher.n_samples} samples, but this one has {len(group.samples)}"
            )
        for slot, sample in enumerate(group.samples):
            if not sample.is_finished or sample.reward is None:
                raise BadRequest(
                    f"sample {slot} is {sample.status.value}; every sample must be finished and have a reward"
                )

    def _finish(self, launched: InFlight, given: OutsideGroup) -> Accepted:
        for slot, sample in enumerate(given.samples):
            sample.index = launched.first_sample + slot
        group = Group(
            source=launched.source,
            group_index=launched.group_index,
            prompt=replace(
                given.prompt,
                source=launched.source,
                prompt_index=launched.prompt.prompt_index,
                epoch=launched.prompt.epoch,
            ),
            prompt_tokens=given.prompt_tokens,
            samples=given.samples,
            sampling=given.sampling,
            logprobs_kind=given.logprobs_kind,
        )
        outcome, failure = self._finisher.finish(group)
        del self._open[launched.group_index]
        if failure is not None:
            self._last_failure = failure
            self._log.warning(f"external group {launched.group_index} could not be stored: {failure}")
        else:
            self._acceptance.add(outcome is GroupOutcome.BUFFERED)
        return Accepted(launched.group_index, outcome, failure)

    def _drop(self, launched: InFlight, reason: str) -> None:
        self._launcher.journal.record(drop(launched.source, launched.group_index, [], reason))
        self._open.pop(launched.group_index, None)

    def statistics(self) -> ProducerStatistics:
        """Counts since the start."""
        return ProducerStatistics(
            acceptance=self._acceptance.value,
            over_bound=0,
            failed_samples=0,
            replaced_samples=0,
            last_failure=self._last_failure,
            is_launching=self._is_running and self._control.may_launch() and not self._launcher.state.paused,
        )
