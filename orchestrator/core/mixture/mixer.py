"""The mixer: from buffers and weights to batches.

Invariants:

* Counts are final when the batch forms and not before; it forms only when every source has what its count asks for, so
  that the mixture of what is trained is exact whatever the speed of the sources (G1).
* Within a source groups leave in launch order, with bounded overtaking (``source_state.py``).
* Staleness is checked once, when a batch forms; what is too old is dropped, counted, and its prompt runs again.
* Where it is allowed at a step (:meth:`Mixer.allow_borrowing`), others stand in for what a source lacks, and are paid
  back (``borrowing.py``): the one exception to the first.
* A paused source counts as weight 0 and keeps its carried remainder. An exhausted one gives what it has, and the rest
  is apportioned over the others.
* No await and no clock: :meth:`Mixer.form` decides, and records what it decided in the journal.
* One call goes up from here: :class:`BatchObserver`, told of each batch that has formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from orchestrator.core.ledger.events import BatchFormed, Dropped
from orchestrator.core.ledger.groups import StoredGroup
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.leases import LeasedBatch, check_split, split_batch
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.staleness import STALE, is_stale
from orchestrator.core.weights.table import WeightTable

from .borrowing import Loan, stand_in
from .outlook import Demand, Finished, Lack, Shortage
from .plan import PlannedBatch, forecast, production_horizon

__all__ = ["BatchObserver", "Mixer", "MixerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerSettings:
    """What the config says of batches.

    ``batch_size``: groups a batch; ``lookahead``: batches planned ahead, and how often a group may be overtaken;
    ``max_staleness``: policy versions, ``None``: no bound; ``num_rollout``: batches until the run ends, ``None``:
    never; ``outstanding_bound``: groups in flight and buffered over all sources (``over_sampling_batch_size``);
    ``buffer_bounds``: by source ``(groups, bytes)``, either ``None`` for no bound of its own.
    """

    batch_size: int
    lookahead: int
    max_staleness: int | None = None
    num_rollout: int | None = None
    outstanding_bound: int
    buffer_bounds: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)


class BatchObserver(Protocol):
    """Who is told of batches: the mixer's one call to a layer above it. In the daemon that is ``daemon.step_log``.

    It may read, count and queue lines for writing. It records nothing, asks the mixer for nothing that changes it,
    waits for nothing and never raises: it is called in the middle of a request of the trainer.
    """

    def batch_formed(self, batch: LeasedBatch) -> None:
        """A batch has formed just now: it is recorded and leased, the step has advanced, nobody has it yet.

        Called by :meth:`Mixer.form`, once for each batch that forms, in the order of steps; not for batches that a
        restart reads back, nor for those that are handed out again.
        """
        ...


class Mixer:
    """See the module's invariants.

    Args:
        ledger: the run's facts.
        journal: where decisions are recorded.
        table: the weights.
        settings: see :class:`MixerSettings`.
        observer: see :class:`BatchObserver`; ``None``: nobody is told.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        journal: Journal,
        table: WeightTable,
        settings: MixerSettings,
        observer: BatchObserver | None = None,
    ) -> None:
        self._ledger = ledger
        self._journal = journal
        self.table = table
        self._observer = observer
        self.reconfigure(settings)

    def reconfigure(self, settings: MixerSettings) -> None:
        """Go on with these from the next batch on."""
        self.batch_size = settings.batch_size
        self.lookahead = settings.lookahead
        self.max_staleness = settings.max_staleness
        self.num_rollout = settings.num_rollout
        self.outstanding_bound = settings.outstanding_bound
        self._buffer_bounds = dict(settings.buffer_bounds)
        self._plan: tuple[tuple[int, int], tuple[PlannedBatch, ...]] | None = None
        self._earlier: tuple[PlannedBatch, ...] = ()
        self._borrows_at: int | None = None

    # -- the plan ------------------------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        """Batches that are produced ahead."""
        horizon = production_horizon(self.lookahead, self.max_staleness)
        return horizon if self.num_rollout is None else max(0, min(horizon, self.num_rollout - self._ledger.step))

    def plan(self) -> tuple[PlannedBatch, ...]:
        """The coming batches as they look now; empty when no source can give a group."""
        key = (self._ledger.plan_revision, self.table.revision)
        if self._plan is None or self._plan[0] != key:
            states = self._ledger.sources
            limits = self._limits()
            plan = forecast(
                self.table,
                step=self._ledger.step,
                carry={name: state.carry for name, state in states.items()},
                size=self.batch_size,
                horizon=self.horizon,
                active=[name for name, state in states.items() if not state.paused],
                limits=limits,
                debt={name: state.debt for name, state in states.items()},
                earlier=self._earlier,
            )
            self._plan = (key, plan)
            self._earlier = () if limits else plan
        return self._plan[1]

    def _limits(self) -> dict[str, int]:
        """Groups that sources without further prompts have left."""
        return {name: len(state.ready) for name, state in self._ledger.sources.items() if state.is_exhausted}

    def demand(self, source: str) -> Demand:
        """What a source has to produce for the plan, and how much of it may be there at once."""
        state = self._ledger.source(source)
        plan = self.plan()
        groups, size = self._buffer_bounds.get(source, (None, None))
        bounds = [(self.outstanding_bound - (self._ledger.outstanding - state.outstanding), "over_sampling_batch_size")]
        if groups is not None:
            bounds.append((groups, "buffer.groups"))
        if size is not None and state.ready_bytes >= size:
            bounds.append((state.outstanding, "buffer.bytes"))
        bound, bound_by = min(bounds)
        next_count = plan[0].counts[source] if plan else 0
        loan = self._loan(plan[0]) if plan else None
        lent = max(0, loan.counts[source] - next_count) if isinstance(loan, Loan) else 0
        return Demand(
            wanted=sum([batch.counts[source] for batch in plan]) + lent,
            next_count=next_count + lent,
            bound=max(0, bound),
            bound_by=bound_by,
        )

    # -- standing in ---------------------------------------------------------------------------------------------------

    @property
    def is_borrowing(self) -> bool:
        """Whether others may stand in for what the next batch lacks."""
        return self._borrows_at == self._ledger.step

    def allow_borrowing(self, step: int) -> None:
        """Let others stand in for what the batch of that step lacks. The caller notifies the producers."""
        self._borrows_at = step

    def _loan(self, planned: PlannedBatch) -> Loan | str | None:
        """Who stands in for what the next batch lacks; a sentence's end if nobody can, ``None`` if nobody may."""
        if not self.is_borrowing:
            return None
        return stand_in(
            planned.counts,
            planned.shares,
            takeable={name: state.takeable(self.lookahead) for name, state in self._ledger.sources.items()},
            limits=self._limits(),
            debt=planned.debt,
            size=self.batch_size,
        )

    # -- batches -------------------------------------------------------------------------------------------------------

    def outlook(self) -> PlannedBatch | Shortage | Finished:
        """Whether the next batch can be formed, and if not, what it lacks. Changes nothing."""
        step = self._ledger.step
        if self.num_rollout is not None and step >= self.num_rollout:
            return Finished(step, self._leftover())
        if all(state.is_exhausted for state in self._ledger.sources.values()) and self._leftover() < self.batch_size:
            return Finished(step, self._leftover())
        plan = self.plan()
        if not plan or sum(plan[0].counts.values()) < self.batch_size:
            return Finished(step, self._leftover()) if self._is_over() else Shortage(step, ())
        lacks = tuple(
            lack for name, needed in plan[0].counts.items() if (lack := self._lack(self._ledger.source(name), needed))
        )
        return self._with_others(plan[0], lacks) if lacks else plan[0]

    def _with_others(self, planned: PlannedBatch, lacks: tuple[Lack, ...]) -> PlannedBatch | Shortage:
        loan = self._loan(planned)
        if isinstance(loan, Loan):
            if loan.is_there:
                return replace(planned, counts=loan.counts, debt=loan.debt)
            return Shortage(planned.step, lacks, "other sources fill in and are generating")
        return Shortage(planned.step, lacks, loan or "")

    def _is_over(self) -> bool:
        """Nothing more will come, and what there is belongs to sources without a weight: nothing moves the step on."""
        return all(state.is_exhausted and not (state.paused and state.ready) for state in self._ledger.sources.values())

    def _leftover(self) -> int:
        return sum(len(state.ready) for state in self._ledger.sources.values())

    def _lack(self, state: SourceState, needed: int) -> Lack | None:
        takeable = state.takeable(self.lookahead)
        if takeable >= needed:
            return None
        return Lack(state.name, needed, takeable, len(state.in_flight), state.blocked_by(self.lookahead))

    def form(self, world_size: int) -> LeasedBatch | Shortage | Finished:
        """Form the next batch, shared among ``world_size`` ranks, if it can be formed now.

        Raises:
            BadWorldSize: the batch cannot be shared equally.
        """
        check_split(self.batch_size, world_size)  # before anything is dropped
        while isinstance(outlook := self.outlook(), PlannedBatch):
            chosen = self._choose(outlook)
            stale = [group for group in chosen if self._is_stale(group)]
            if not stale:
                return self._lease(outlook, chosen, world_size)
            for group in stale:
                self._journal.record(
                    Dropped(
                        source=group.source,
                        group_index=group.group_index,
                        reason=STALE,
                        lengths=list(group.lengths),
                        rerun=True,
                    )
                )
        return outlook

    def _choose(self, planned: PlannedBatch) -> list[StoredGroup]:
        """The groups of the batch, in the order of their launch over all sources."""
        chosen = [g for name, n in planned.counts.items() for g in self._ledger.source(name).oldest_ready(n)]
        return sorted(chosen, key=lambda group: group.group_index)

    def _is_stale(self, group: StoredGroup) -> bool:
        return is_stale(self._ledger.policy_version, group.oldest_version, self.max_staleness)

    def _lease(self, planned: PlannedBatch, chosen: list[StoredGroup], world_size: int) -> LeasedBatch:
        event = BatchFormed(
            step=planned.step,
            policy_version=self._ledger.policy_version,
            weights=dict(planned.shares),
            counts=dict(planned.counts),
            carry=dict(planned.carry),
            shares=split_batch(chosen, world_size),
            debt=self._debt_changes(planned),
            adaptive={name: planned.raw[name] for name in self.table.adaptive},
        )
        self._journal.record(event)
        batch = self._ledger.leases.batches[planned.step]
        if self._observer is not None:
            self._observer.batch_formed(batch)
        return batch

    def _debt_changes(self, planned: PlannedBatch) -> dict[str, float]:
        """The debts after this batch, where they are others than before."""
        return {name: debt for name, debt in planned.debt.items() if debt != self._ledger.source(name).debt}
