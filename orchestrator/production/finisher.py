"""The end of a group whose samples are all finished and scored: filtered out, or stored in its source's buffer.

Invariants:

* A group ends here in exactly one way, and its end is in the journal: its frame, or ``Dropped`` with the reason.
* No await: between the filter's verdict and the journal nothing can happen to the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from orchestrator.core.filters import Verdict
from orchestrator.core.ledger.events import Dropped
from orchestrator.core.ledger.groups import GroupFacts
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.staleness import STALE, newest_version, offpolicy_mask
from orchestrator.errors import FilterError, FrameError
from orchestrator.frames import encode_group
from orchestrator.records import Group, Sample

from .runner import GroupOutcome

__all__ = ["Finished", "Finisher", "drop"]


class Finished(NamedTuple):
    """How it went; ``failure`` says in words what failed, if anything did."""

    outcome: GroupOutcome
    failure: str | None = None


class Finisher:
    """Ends the groups of one source; see the module's invariants.

    Args:
        verdict: the filter; keeps or drops a finished group.
        journal: where the end of each group is recorded.
        mask_offpolicy: mask the tokens that are older than the version of a sample's newest token.
    """

    def __init__(
        self, *, verdict: Callable[[Sequence[Sample]], Verdict], journal: Journal, mask_offpolicy: bool = False
    ) -> None:
        self._verdict = verdict
        self._journal = journal
        self._mask_offpolicy = mask_offpolicy

    def finish(self, group: Group) -> Finished:
        """End a group that is in flight; all its samples are finished and have rewards."""
        try:
            verdict = self._verdict(group.samples)
        except FilterError as error:
            return self._failed(group, "filter_failed", str(error))
        if not verdict.keep:
            self._drop(group, verdict.reason or "filtered")
            return Finished(GroupOutcome.FILTERED)
        if self._mask_offpolicy:
            for sample in group.samples:
                newest = newest_version(sample.versions)
                if newest is not None:
                    sample.loss_mask = offpolicy_mask(sample.versions, newest)
        try:
            frame = encode_group(group)
        except FrameError as error:
            hint = f"its group cannot be stored: {error}; use less metadata in rewards and prompts"
            return self._failed(group, "too_large", hint)
        self._journal.store_group(frame, GroupFacts.of(group))
        return Finished(GroupOutcome.BUFFERED)

    def _failed(self, group: Group, reason: str, failure: str) -> Finished:
        self._drop(group, reason)
        return Finished(GroupOutcome.FAILED, failure)

    def _drop(self, group: Group, reason: str) -> None:
        self._journal.record(drop(group.source, group.group_index, group.samples, reason))


def drop(source: str, group_index: int, samples: Sequence[Sample], reason: str) -> Dropped:
    """The event that ends a group without handing it out; one that is stale has its prompt run again."""
    is_scored = all(sample.is_finished and sample.reward is not None for sample in samples)
    return Dropped(
        source=source,
        group_index=group_index,
        reason=reason,
        lengths=[len(sample.tokens) for sample in samples],
        rerun=reason == STALE,
        rewards=[sample.reward for sample in samples if sample.reward is not None] if is_scored else [],
    )
