"""The counts of the coming batches, and what to launch for them.

Invariants:

* A plan is a forecast: it changes nothing, and the same facts give the same plan. The counts of a batch are final when
  it forms, and are those of the first batch of a plan made then.
* What an earlier plan says of a batch is kept where nothing that the batch depends on has changed since; it is what
  would be planned anew.
* A plan ends before a batch that could not form: where no source with groups to give has a weight above 0, or limits
  leave it incomplete (an incomplete batch is the plan's last).
* Launching never exceeds its bound, but for what the next batch lacks: a batch can always become complete.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from orchestrator.core.weights.table import WeightRow, WeightTable

from .apportionment import apportion
from .borrowing import repay

__all__ = [
    "MIN_ACCEPTANCE",
    "LaunchOrder",
    "PlannedBatch",
    "forecast",
    "launches",
    "production_horizon",
]

MIN_ACCEPTANCE: Final = 0.05
"""At most 20 launches for one wanted group. A filter that keeps fewer is still served, as groups finish and are
launched again; without this floor an unlucky start would launch thousands at once."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A coming batch, each mapping with every source of the table.

    ``raw`` are the weights, ``shares`` the same normalised, ``counts`` the groups of each source, ``carry`` what each
    is owed after the batch, ``debt`` what others gave in its place by then (``borrowing.py``). ``warnings`` are of the
    weights at this step.
    """

    step: int
    shares: dict[str, float]
    counts: dict[str, int]
    carry: dict[str, float]
    warnings: tuple[str, ...] = ()
    debt: dict[str, float] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)


def forecast(
    table: WeightTable,
    *,
    step: int,
    carry: Mapping[str, float],
    size: int,
    horizon: int,
    active: Collection[str],
    limits: Mapping[str, int] | None = None,
    debt: Mapping[str, float] | None = None,
    earlier: Sequence[PlannedBatch] = (),
) -> tuple[PlannedBatch, ...]:
    """The batches ``step`` … ``step + horizon - 1`` as they look now.

    Args:
        table: the weights.
        step: the step of the next batch.
        carry: groups owed to each source; 0 where a source is missing.
        size: groups a batch.
        horizon: batches to plan.
        active: sources that take part.
        limits: for exhausted sources the groups that they have left; used up batch by batch. A source with nothing left
            takes no part: its weight counts as 0.
        debt: what others gave in place of each source; paid back batch by batch.
        earlier: a plan made before from the same table, without limits.

    Returns:
        The plan; empty when all shares of the next batch are 0.
    """
    names, left, debt = table.names, dict(limits or {}), debt or {}
    owed = [carry.get(name, 0.0) for name in names]
    owing = dict(zip(names, [debt.get(name, 0.0) for name in names], strict=True))
    taking_part = frozenset(active)
    plan: list[PlannedBatch] = []
    known = {batch.step: batch for batch in earlier} if not left else {}
    for planned_step in range(step, step + horizon):
        if left:
            taking_part = frozenset(name for name in active if left.get(name) != 0)
        row = table.at(planned_step, active=taking_part)
        if not any(row.shares.values()):
            break
        kept = _still_true(known, planned_step, owed, owing, row, size)
        if kept is not None:
            plan.append(kept)
            owed, owing = list(kept.carry.values()), kept.debt
            continue
        if any(owing.values()):
            before = dict(zip(names, owed, strict=True))
            after, owing = repay(before, owing, row.shares, size, gone=[name for name in left if not left[name]])
            owed = list(after.values())
        result = apportion(
            list(row.shares.values()),
            owed,
            size,
            active=None if taking_part.issuperset(names) else [name in taking_part for name in names],
            limits=[left.get(name) for name in names] if left else None,
        )
        owed = list(result.carry)
        counts = dict(zip(names, result.counts, strict=True))
        owed_after = dict(zip(names, owed, strict=True))
        plan.append(PlannedBatch(planned_step, row.shares, counts, owed_after, row.warnings, owing, row.raw))
        if sum(result.counts) < size:
            break
        for name in left:
            left[name] -= counts.get(name, 0)
    return tuple(plan)


def _still_true(
    known: Mapping[int, PlannedBatch],
    step: int,
    owed: list[float],
    owing: Mapping[str, float],
    row: WeightRow,
    size: int,
) -> PlannedBatch | None:
    """The batch of an earlier plan, if it would be the same now: same row, same size, same carries and debts before."""
    before, batch = known.get(step - 1), known.get(step)
    if before is None or batch is None or batch.shares is not row.shares:  # the table gives the same row again
        return None
    same = list(before.carry.values()) == owed and before.debt == owing and sum(batch.counts.values()) == size
    return batch if same else None


def production_horizon(lookahead: int, max_staleness: int | None) -> int:
    """Batches that are worth producing ahead: what is produced further ahead would be too old when its batch forms.

    ``lookahead`` batches, at most ``max_staleness + 1`` where there is a bound, and at least 1.
    """
    return max(1, lookahead if max_staleness is None else min(lookahead, max_staleness + 1))


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """Launch ``count`` groups; ``over_bound`` says that this exceeds the bound, because the next batch lacks them."""

    count: int
    over_bound: bool = False


def launches(
    *, wanted: int, next_count: int, buffered: int, in_flight: int, acceptance: float, bound: int | None
) -> LaunchOrder:
    """How many groups of one source to launch now.

    Enough that buffered + acceptance x in flight reaches ``wanted``, as far as the bound allows; and in any case enough
    that buffered + in flight reaches ``next_count``.

    Args:
        wanted: groups that the planned batches need in all.
        next_count: groups that the next batch needs.
        buffered: finished groups.
        in_flight: groups launched and not finished.
        acceptance: measured share of finished groups that pass the filter; counts as :data:`MIN_ACCEPTANCE` at least.
        bound: the most groups in flight and buffered together; ``None``: no bound.
    """
    there = buffered + in_flight
    acceptance = min(1.0, max(MIN_ACCEPTANCE, acceptance))
    # The subtraction keeps 21 / 0.7 from becoming one more than 30 by rounding.
    needed_in_flight = math.ceil((wanted - buffered) / acceptance - 1e-9)
    count = max(0, needed_in_flight - in_flight)
    if bound is not None:
        count = min(count, max(0, bound - there))
    lacking = next_count - there
    if lacking <= count:
        return LaunchOrder(count)
    return LaunchOrder(lacking, over_bound=bound is not None and there + lacking > bound)
