"""The port between a producer and whatever takes its groups to their end: this process now, others later.

Invariants:

* :meth:`Runner.run` returns when the end of the group is in the journal: buffered, or dropped under a reason. Nothing
  else tells the ledger of a group that was launched.
* When it is cancelled the group stays in flight. What its samples gained is in the journal as partial frames, and
  :meth:`Runner.run` goes on from these when it is given the group again, in this process or after a restart.
* Groups run side by side. The failure of one is an outcome and never an exception: what a runner raises stops the
  daemon.
* A runner decides nothing about launching, and knows nothing of the plan, the mixture or other sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from orchestrator.core.ledger.groups import InFlight

from .group_progress import GroupStanding

__all__ = ["GroupOutcome", "Runner", "RunnerStatistics"]


class GroupOutcome(Enum):
    """How a group ended."""

    BUFFERED = "buffered"
    FILTERED = "filtered"
    FAILED = "failed"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class RunnerStatistics:
    """What a runner counted since its start.

    ``failed_samples``: generations and rewards that used up their retries; ``replaced_samples``: new attempts made for
    them; ``last_failure``: the newest failure in words.
    """

    failed_samples: int = 0
    replaced_samples: int = 0
    last_failure: str | None = None


class Runner(Protocol):
    """Runs the groups of one source; see the module's invariants."""

    async def run(self, launched: InFlight) -> GroupOutcome:
        """Take a launched group to its end, going on from the partial frames that it has."""
        ...

    def oldest(self) -> GroupStanding | None:
        """How the group stands that was launched first of those being run; ``None``: there is none."""
        ...

    def statistics(self) -> RunnerStatistics:
        """Counts since the start."""
        ...
