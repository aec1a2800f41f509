"""The port of what fills one source's buffer: a producer, or somebody outside.

Invariants:

* Groups of a source are launched, stored and dropped by the journal's events and frames alone, whoever fills it; the
  ledger, the mixer and the trainer cannot tell one kind from the other.
* :meth:`GroupSource.run` is cancelled to stop the source and called again to let it go on. Between the two nothing is
  recorded for it; what was in flight is in the ledger, as groups in flight with their partial frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .group_progress import GroupStanding

__all__ = ["GroupSource", "ProducerStatistics"]


@dataclass(frozen=True, slots=True)
class ProducerStatistics:
    """What is known of a source beyond the ledger.

    ``acceptance``: measured share of finished groups that pass the filter; ``over_bound``: launches beyond the bound
    because the next batch lacked them; ``failed_samples``, ``replaced_samples``: generations that used up their
    retries, and new attempts made for them; ``last_failure``: the newest of them in words; ``oldest``: the group that
    was launched first of those in flight.
    """

    acceptance: float
    over_bound: int
    failed_samples: int
    replaced_samples: int
    last_failure: str | None
    is_launching: bool
    oldest: GroupStanding | None = None


class GroupSource(Protocol):
    """Fills one source's buffer; see the module's invariants."""

    async def run(self) -> None:
        """Work until cancelled, beginning with what is in flight."""
        ...

    def statistics(self) -> ProducerStatistics:
        """Counts since the start."""
        ...
