"""Launching: from what the ledger says comes next to a group in flight.

Invariants:

* A launch is recorded before anything is done for its group; its indices are the ledger's.
* It launches what it is asked for. How much may be launched, and when, is said by :class:`LaunchControl`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.mixture.outlook import Demand

__all__ = ["LaunchControl", "Launcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchControl:
    """What says how many groups of a source may be launched.

    ``demand``: what the plan asks of the source now; ``may_launch``: whether launching is allowed at all (not draining,
    the disk keeps up); ``replan`` is notified when either may have changed: a batch formed, a weight, a pause, a drop.
    """

    demand: Callable[[], Demand]
    may_launch: Callable[[], bool]
    replan: Broadcast


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Launches the groups of one source; see the module's invariants.

    ``state`` is the source's part of the ``ledger``; ``row_at`` is the order of its prompts (see
    :class:`~orchestrator.prompts.PromptSource`); a group has ``n_samples`` samples.
    """

    state: SourceState
    ledger: Ledger
    journal: Journal
    row_at: Callable[[int, int], int]
    n_samples: int

    def launch(self) -> InFlight | None:
        """Launch the source's next prompt; ``None``: it has none."""
        event = self.ledger.next_launch(self.state.name, self.n_samples, self.row_at)
        if event is None:
            return None
        self.journal.record(event)
        return self.state.in_flight[event.group_index]
