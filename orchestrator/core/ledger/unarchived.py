"""Batches that were trained on and are not in the archive yet: their groups stay in the state until they are.

Invariants:

* A group enters when its share is acknowledged, and leaves when an ``Archived`` event says so, written or given up:
  whatever happens to the process in between, it is here after the restart.
* A batch is ready once none of its shares is open; shares that were discarded were not trained on and are not in it.
* A batch is known by its history (the nonce of its leases) and its step: after a checkpoint was loaded the same step
  comes again, in another history.
* Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .groups import Place, StoredGroup
from .leases import LeasedBatch

__all__ = ["BatchKey", "TrainedBatch", "Unarchived"]


class BatchKey(NamedTuple):
    """What tells one trained batch of a state directory from all others."""

    history: str
    step: int


@dataclass(slots=True)
class TrainedBatch:
    """The acknowledged groups of a batch, and what was in force when it was formed. ``weights`` are normalised."""

    key: BatchKey
    policy_version: int
    weights: dict[str, float]
    groups: dict[int, StoredGroup] = field(default_factory=dict)

    @property
    def frame_bytes(self) -> int:
        """What its groups hold in memory and on disk."""
        return sum(len(group.frame) for group in self.groups.values())


class Unarchived:
    """See the module's invariants; batches are in the order in which their first share was acknowledged."""

    def __init__(self) -> None:
        self.batches: dict[BatchKey, TrainedBatch] = {}

    def add(self, history: str, batch: LeasedBatch, groups: list[StoredGroup]) -> None:
        """A share of this batch was acknowledged."""
        key = BatchKey(history, batch.step)
        trained = self.batches.get(key)
        if trained is None:
            trained = self.batches[key] = TrainedBatch(key, batch.policy_version, dict(batch.weights))
        trained.groups.update((group.group_index, group) for group in groups)

    def ready(self, history: str, open_steps: Iterator[int]) -> list[TrainedBatch]:
        """The batches of which no share is open any more; ``history`` is the one that ``open_steps`` are of."""
        waiting = {BatchKey(history, step) for step in open_steps}
        return [batch for key, batch in self.batches.items() if key not in waiting]

    def finish(self, key: BatchKey) -> None:
        """It is in the archive, or was given up; ``KeyError`` where it is not here."""
        del self.batches[key]

    def groups(self) -> Iterator[StoredGroup]:
        """All groups that are kept."""
        for batch in self.batches.values():
            yield from batch.groups.values()

    def group(self, group_index: int) -> StoredGroup | None:
        """The group of that index."""
        return next((b.groups[group_index] for b in self.batches.values() if group_index in b.groups), None)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> list[dict[str, Any]]:
        """JSON-compatible index."""
        return [
            {
                "key": batch.key,
                "policy_version": batch.policy_version,
                "weights": batch.weights,
                "groups": [(*group.entry, group.source) for group in batch.groups.values()],
            }
            for batch in self.batches.values()
        ]

    def load(self, data: list[dict[str, Any]], frame_at: Callable[[Place], memoryview]) -> None:
        """Become what ``snapshot`` described."""
        self.batches.clear()
        for entry in data:
            key = BatchKey(*entry["key"])
            groups = [StoredGroup.from_entry(e[3], e[:3], frame_at) for e in entry["groups"]]
            self.batches[key] = TrainedBatch(
                key, entry["policy_version"], entry["weights"], {group.group_index: group for group in groups}
            )
