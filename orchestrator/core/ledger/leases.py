"""Batches handed out and not yet acknowledged, and how a batch is shared among ranks.

Invariants:

* The shares of a batch are disjoint, complete and of equal group counts; within that, tokens are balanced.
* A share that was handed out once is the same groups in the same order for as long as its lease lives.
* A lease's name tells "acknowledged before" from "never existed": acknowledging twice is fine.
* A batch is gone when all of its shares are acknowledged or discarded; batches go in any order, redelivery is oldest
  first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orchestrator.errors import BadWorldSize, LeaseUnknown

from .groups import Place, StoredGroup

__all__ = ["LeasedBatch", "Leases", "Share", "check_split", "split_batch"]

_NUMBER: Final = "(0|[1-9][0-9]{0,18})"
_NUMBERS: Final = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}")
"""Step, split and rank in the one way in which they are written: a share has one name."""


@dataclass(slots=True)
class Share:
    """What one rank gets of a batch: its groups in the order of hand-out."""

    rank: int
    groups: list[StoredGroup]
    is_done: bool = False


@dataclass(slots=True)
class LeasedBatch:
    """A formed batch.

    ``split`` counts how often it was shared out anew; ``done`` are the (split, rank) that are acknowledged, so that a
    second acknowledgement is known as one after a new split.
    """

    step: int
    policy_version: int
    weights: dict[str, float]
    counts: dict[str, int]
    shares: list[Share] = field(default_factory=list)
    split: int = 0
    done: list[tuple[int, int]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """Among how many ranks it is shared."""
        return len(self.shares)

    def unfinished_groups(self) -> list[StoredGroup]:
        """Groups of the shares that are not done."""
        return [group for share in self.shares if not share.is_done for group in share.groups]


def check_split(count: int, world_size: int) -> None:
    """Raise ``BadWorldSize`` where that many groups cannot be shared equally."""
    if world_size < 1 or count % world_size:
        raise BadWorldSize(
            f"{count} groups cannot be divided equally among {world_size} ranks: use a world_size that divides"
            " rollout_batch_size"
        )


def split_batch(groups: Sequence[StoredGroup], world_size: int) -> list[list[int]]:
    """Share groups among ranks: equal counts, tokens balanced.

    Longest processing time first (Graham, 1969), with a cap on each rank's count: the heaviest group goes to the rank
    with the fewest tokens that still has room. Each rank's groups keep the order of ``groups``.

    Returns:
        Group indices, one list a rank.

    Raises:
        BadWorldSize: the groups cannot be shared equally.
    """
    check_split(len(groups), world_size)
    if world_size == 1:
        return [[group.group_index for group in groups]]
    room = len(groups) // world_size
    loads, members = [0] * world_size, [set[int]() for _ in range(world_size)]
    for group in sorted(groups, key=lambda g: (-g.tokens, g.group_index)):
        rank = min((r for r in range(world_size) if len(members[r]) < room), key=lambda r: (loads[r], r))
        loads[rank] += group.tokens
        members[rank].add(group.group_index)
    return [[g.group_index for g in groups if g.group_index in members[rank]] for rank in range(world_size)]


class Leases:
    """The leased batches of a run.

    Args:
        nonce: a word that is unique to the state directory's history; a lease of another history is unknown here.
    """

    def __init__(self, nonce: str) -> None:
        self.nonce = nonce
        self.batches: dict[int, LeasedBatch] = {}  # by step, ascending

    def name(self, batch: LeasedBatch, rank: int) -> str:
        """The lease of a share: opaque to clients, the same on every redelivery."""
        return f"{self.nonce}.{batch.step}.{batch.split}.{rank}"

    def add(self, batch: LeasedBatch) -> None:
        """A batch was formed."""
        self.batches[batch.step] = batch

    def find(self, lease: str, next_step: int) -> tuple[LeasedBatch, Share] | None:
        """The share of a lease; ``None`` if it was acknowledged before.

        Raises:
            LeaseUnknown: no such lease was ever handed out, or it was ended by a new split.
        """
        nonce, _, rest = lease.partition(".")
        if nonce != self.nonce or (numbers := _NUMBERS.fullmatch(rest)) is None:
            raise LeaseUnknown(f"lease {lease[:80]!r} is not from this run; get a new batch")
        step, split, rank = map(int, numbers.groups())
        if step >= next_step:
            raise LeaseUnknown(f"lease {lease!r} is for step {step}, which has no batch yet")
        batch = self.batches.get(step)
        if batch is None:
            return None
        if (split, rank) in batch.done:
            return None
        if batch.split != split or rank >= batch.world_size:
            raise LeaseUnknown(f"lease {lease!r} ended when its batch was divided among other ranks; get a new batch")
        share = batch.shares[rank]
        return None if share.is_done else (batch, share)

    def open_shares(self) -> Iterator[tuple[LeasedBatch, Share]]:
        """Shares that are not acknowledged, oldest batch first."""
        for batch in self.batches.values():
            for share in batch.shares:
                if not share.is_done:
                    yield batch, share

    def group(self, group_index: int) -> StoredGroup | None:
        """The leased group of that index."""
        groups = (group for _, share in self.open_shares() for group in share.groups)
        return next((group for group in groups if group.group_index == group_index), None)

    def finish(self, step: int, rank: int) -> list[StoredGroup]:
        """The share is acknowledged or discarded: its groups, which are let go of."""
        batch = self.batches[step]
        share = batch.shares[rank]
        share.is_done = True
        batch.done.append((batch.split, rank))
        groups, share.groups = share.groups, []
        if all(share.is_done for share in batch.shares):
            del self.batches[step]
        return groups

    def withdraw(self, group_index: int) -> StoredGroup | None:
        """Take a leased group out of its share, which is done if it was the last one; ``None`` if none is leased."""
        for batch, share in self.open_shares():
            for group in share.groups:
                if group.group_index == group_index:
                    share.groups.remove(group)
                    if not share.groups:
                        self.finish(batch.step, share.rank)
                    return group
        return None

    def resplit(self, step: int, shares: Sequence[Sequence[int]], split: int) -> None:
        """Share out anew what is not acknowledged of a batch; its earlier leases end."""
        batch = self.batches[step]
        groups = {group.group_index: group for group in batch.unfinished_groups()}
        batch.shares = [Share(rank, [groups[index] for index in share]) for rank, share in enumerate(shares)]
        batch.split = split

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> list[dict[str, Any]]:
        """JSON-compatible index."""
        return [
            {
                "step": batch.step,
                "policy_version": batch.policy_version,
                "weights": batch.weights,
                "counts": batch.counts,
                "split": batch.split,
                "done": list(batch.done),
                "shares": [[s.is_done, [(*g.entry, g.source) for g in s.groups]] for s in batch.shares],
            }
            for batch in self.batches.values()
        ]

    def load(self, data: list[dict[str, Any]], frame_at: Callable[[Place], memoryview]) -> None:
        """Become what ``snapshot`` described."""
        self.batches.clear()
        for entry in data:
            batch = LeasedBatch(
                step=entry["step"],
                policy_version=entry["policy_version"],
                weights=entry["weights"],
                counts=entry["counts"],
                split=entry["split"],
                done=[(split, rank) for split, rank in entry.get("done", [])],
            )
            for rank, (is_done, entries) in enumerate(entry["shares"]):
                # an entry of format 1 is a place alone: its frame says the source
                named = [(e[3], e[:3]) if isinstance(e[0], list) else ("", e) for e in entries]
                groups = [StoredGroup.from_entry(source, e, frame_at) for source, e in named]
                batch.shares.append(Share(rank, groups, is_done))
            self.add(batch)
