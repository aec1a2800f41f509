"""Handing out: who holds which share, and what a rank gets next.

Invariants:

* A share is held by at most one connection. When the connection goes, the share is free and will be handed out again,
  the very same groups, oldest first; after a restart all shares are free.
* A rank holds at most ``MAX_LEASES_PER_RANK`` shares; it belongs to at most one live connection.
* The next batch forms only when every rank has taken its share of the newest one.
* Another world size shares out anew whatever is not acknowledged; the leases of that ended.
* No await: decisions are recorded in the journal, and the caller waits for them to be written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.events import LeaseAcked, LeaseDiscarded, Resplit
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.leases import LeasedBatch, Share, split_batch
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.errors import BadWorldSize, RankInUse

from .waits import Waiting

__all__ = ["Handout", "Handouts", "Holder"]

MAX_LEASES_PER_RANK: Final = 2
"""A trainer works on one batch and prefetches the next; more would only make work stale."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A live connection: its number and the process at its other end."""

    connection: int
    pid: int


@dataclass(frozen=True, slots=True)
class Handout:
    """A share that a rank now holds."""

    lease: str
    batch: LeasedBatch
    share: Share
    holder: Holder


class Handouts:
    """See the module's invariants.

    Args:
        ledger: the run's facts.
        journal: where decisions are recorded.
        mixer: forms batches.
        changed: notified when a share becomes free.
        archives: whether what is acknowledged is to be kept until it is in an archive.
    """

    def __init__(
        self, *, ledger: Ledger, journal: Journal, mixer: Mixer, changed: Broadcast, archives: bool = False
    ) -> None:
        self._ledger = ledger
        self._journal = journal
        self._mixer = mixer
        self._changed = changed
        self._archives = archives
        self._held: dict[str, Holder] = {}  # lease → who holds it
        self._since: dict[str, float] = {}  # lease → when it was handed out last, on the monotonic clock
        self._ranks: dict[int, Holder] = {}

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def take_rank(self, holder: Holder, rank: int, *, takeover: bool = False) -> Holder | None:
        """The rank belongs to this connection from now on; returns the holder whose connection is to be closed.

        Raises:
            RankInUse: another live connection has it, and ``takeover`` was not asked for.
        """
        other = self._ranks.get(rank)
        if other is not None and other != holder:
            if not takeover:
                raise RankInUse(
                    f"rank {rank} is in use by process {other.pid}: stop it, or connect with takeover=True to close its"
                    " connection",
                    data={"rank": rank, "pid": other.pid},
                )
            self.leave(other)
        self._ranks[rank] = holder
        return other if other != holder else None

    def leave(self, holder: Holder) -> None:
        """The connection is gone: its ranks and shares are free."""
        self._ranks = {rank: other for rank, other in self._ranks.items() if other != holder}
        self._held = {lease: other for lease, other in self._held.items() if other != holder}
        self._changed.notify()

    @property
    def held(self) -> dict[str, Holder]:
        """Leases that live connections hold."""
        return dict(self._held)

    def held_since(self, lease: str) -> float:
        """When a lease that is held was handed out, on the monotonic clock."""
        return self._since[lease]

    def leases_of(self, holder: Holder) -> set[str]:
        """Leases that this connection holds."""
        return {lease for lease, other in self._held.items() if other == holder}

    def is_used_by(self, holder: Holder) -> bool:
        """Whether this connection holds a rank or a lease."""
        return holder in self._ranks.values() or holder in self._held.values()

    # -- handing out ---------------------------------------------------------------------------------------------------

    def claim(self, holder: Holder, rank: int, world_size: int) -> Handout | Waiting | Shortage | Finished:
        """What this rank gets now, or why nothing.

        Raises:
            RankInUse: the rank belongs to another live connection.
            BadWorldSize: the batch cannot be shared so, or others share it among another number of ranks.
        """
        if not 0 <= rank < world_size:
            raise BadWorldSize(f"rank {rank} must be from 0 to {world_size - 1}, because world_size is {world_size}")
        splits = self._new_splits(holder, world_size)
        had_it = self._ranks.get(rank) == holder
        self.take_rank(holder, rank)
        self._share_out_anew(splits)
        try:
            return self._next(holder, rank, world_size)
        except BadWorldSize:  # a request that could not be meant leaves no trace
            if not had_it:
                del self._ranks[rank]
            raise

    def _next(self, holder: Holder, rank: int, world_size: int) -> Handout | Waiting | Shortage | Finished:
        mine = [(batch, share) for batch, share in self._ledger.leases.open_shares() if share.rank == rank]
        free = [(batch, share) for batch, share in mine if self._lease(batch, share) not in self._held]
        if not free and isinstance(outlook := self._mixer.outlook(), Finished):
            return outlook
        if len(mine) - len(free) >= MAX_LEASES_PER_RANK:
            return self._too_many(rank, [(batch, share) for batch, share in mine if (batch, share) not in free])
        if free:
            return self._hand_out(holder, *free[0])
        late = self._ranks_that_lag()
        if late:
            return self._lagging(late, world_size)
        formed = self._mixer.form(world_size)
        if isinstance(formed, LeasedBatch):
            return self._hand_out(holder, formed, formed.shares[rank])
        return formed

    def _too_many(self, rank: int, held: Sequence[tuple[LeasedBatch, Share]]) -> Waiting:
        steps = " and ".join(str(batch.step) for batch, _ in held)
        pids = {self._held[self._lease(batch, share)].pid for batch, share in held}
        who = f"rank {rank} (process {', '.join(map(str, sorted(pids)))})"
        return Waiting(
            f"the cause is the trainer: {who} holds {len(held)} leases, of steps {steps}: acknowledge one to get"
            " the next",
            held_step=held[0][0].step,
            held_since=min(self._since[self._lease(batch, share)] for batch, share in held),
        )

    def _lagging(self, late: Sequence[int], world_size: int) -> Waiting:
        step = self._ledger.step - 1
        newest = self._ledger.leases.batches[step]
        taken = [self._since[lease] for share in newest.shares if (lease := self._lease(newest, share)) in self._held]
        ranks = ", ".join(map(str, late))
        sentence = f"the cause is the trainer: step {step} has not been taken by rank {ranks} of {world_size} yet"
        return Waiting(sentence, held_step=step, held_since=min(taken)) if taken else Waiting(sentence)

    def _lease(self, batch: LeasedBatch, share: Share) -> str:
        return self._ledger.leases.name(batch, share.rank)

    def _hand_out(self, holder: Holder, batch: LeasedBatch, share: Share) -> Handout:
        lease = self._lease(batch, share)
        self._since = {other: since for other, since in self._since.items() if other in self._held}
        self._held[lease], self._since[lease] = holder, time.monotonic()
        return Handout(lease, batch, share, holder)

    def _ranks_that_lag(self) -> list[int]:
        """Ranks that have not taken their share of the newest batch."""
        newest = self._ledger.leases.batches.get(self._ledger.step - 1)
        if newest is None:
            return []
        return [s.rank for s in newest.shares if not s.is_done and self._lease(newest, s) not in self._held]

    def _new_splits(self, holder: Holder, world_size: int) -> list[tuple[LeasedBatch, list[list[int]]]]:
        """How what is shared among another number of ranks would be shared among ``world_size``. Changes nothing."""
        others = [b for b in self._ledger.leases.batches.values() if b.world_size != world_size]
        for batch in others:
            for share in batch.shares:
                other = self._held.get(self._lease(batch, share))
                if other is not None and other != holder:
                    raise BadWorldSize(
                        f"process {other.pid} takes batches with world_size {batch.world_size}, this one with"
                        f" {world_size}: all ranks of a trainer must use the same world_size"
                    )
        return [(batch, split_batch(batch.unfinished_groups(), world_size)) for batch in others]

    def _share_out_anew(self, splits: list[tuple[LeasedBatch, list[list[int]]]]) -> None:
        for batch, shares in splits:
            for share in batch.shares:
                self._held.pop(self._lease(batch, share), None)
            self._journal.record(Resplit(step=batch.step, shares=shares, split=batch.split + 1))

    # -- giving back ---------------------------------------------------------------------------------------------------

    def ack(self, lease: str) -> None:
        """The share is trained on and never comes again; twice is fine.

        Raises:
            LeaseUnknown: no such lease.
        """
        if (found := self._ledger.leases.find(lease, self._ledger.step)) is not None:
            batch, share = found
            self._held.pop(lease, None)
            self._journal.record(LeaseAcked(step=batch.step, rank=share.rank, archive=self._archives))

    def nack(self, lease: str, *, discard: bool) -> None:
        """The share is given back: handed out again, or with ``discard`` dropped and counted.

        Raises:
            LeaseUnknown: no such lease.
        """
        if (found := self._ledger.leases.find(lease, self._ledger.step)) is None:
            return
        batch, share = found
        self._held.pop(lease, None)
        if discard:
            self._journal.record(LeaseDiscarded(step=batch.step, rank=share.rank))
        self._changed.notify()

    def ack_through(self, step: int) -> None:
        """Everything up to this step is trained on, on all ranks."""
        for batch, share in list(self._ledger.leases.open_shares()):
            if batch.step <= step:
                self._held.pop(self._lease(batch, share), None)
                self._journal.record(LeaseAcked(step=batch.step, rank=share.rank, archive=self._archives))

    def forget(self) -> None:
        """All leases have ended, whoever held them."""
        self._held.clear()
        self._changed.notify()

    def release(self, handout: Handout) -> None:
        """A share that was claimed but never reached its trainer is free again, unless another holds it by now."""
        if self._held.get(handout.lease) == handout.holder:
            del self._held[handout.lease]
            self._changed.notify()
