"""Adaptive weights: functions of a source's statistics, which let the mixture follow what the model can learn from.

A weight function with a required parameter ``stats`` is given its source's
:class:`~orchestrator.core.observations.SourceStats`. This module has three. Each has a minimum (``floor``), a maximum
(``ceiling``) and a rate limit; ``docs/adaptive_weights.md`` says where they come from. A config names one by its dotted
path::

    data_source_weights:
      - orchestrator.adaptive_weights.learnability
      - orchestrator.adaptive_weights.learnability

For other limits, write a function of your own that calls it::

    def eager(rollout_step, stats):
        return learnability(rollout_step, stats, floor=0.0, rate=0.2)

Invariants:

* ``floor`` <= weight <= ``ceiling`` for all statistics, and the weight differs from the last one in force by at most
  ``rate``. A floor above 0 keeps a source observed: without groups it could never show that it has become useful.
* A source without statistics gets the ceiling, so that it is observed.
* Pure: the same statistics give the same weight.
"""

from __future__ import annotations

import math
from typing import Final

from orchestrator.core.observations import SourceStats

__all__ = ["CEILING", "FLOOR", "RATE", "SourceStats", "learnability", "pass_rate_target", "upper_confidence_bound"]

FLOOR: Final = 0.05
CEILING: Final = 1.0
RATE: Final = 0.05
"""Most change of a weight in a batch: from floor to ceiling takes at least 19 batches."""

MOST_LEARNABLE: Final = 0.25
"""p·(1 − p) at p = 1/2."""

LARGEST_ADVANTAGE: Final = 0.5
"""Mean distance from the group's mean if half of the rewards are 0 and half are 1."""


def learnability(
    rollout_step: int, stats: SourceStats, *, floor: float = FLOOR, ceiling: float = CEILING, rate: float = RATE
) -> float:
    """``4 · mean of p·(1 − p)``, p being the pass rate of a prompt: 1 where every prompt is passed half of the time.

    0 where each prompt is either always or never passed, even if half of them are.
    """
    wanted = stats.learnability / MOST_LEARNABLE if stats.groups else ceiling
    return _limited(wanted, stats, floor, ceiling, rate)


def pass_rate_target(
    rollout_step: int,
    stats: SourceStats,
    *,
    target: float = 0.5,
    width: float = 0.2,
    floor: float = FLOOR,
    ceiling: float = CEILING,
    rate: float = RATE,
) -> float:
    """``exp(−(p − target)² / (2 · width²))``, p being the source's pass rate: 1 at the target, 0.61 a width away."""
    wanted = math.exp(-((stats.pass_rate - target) ** 2) / (2 * width**2)) if stats.groups else ceiling
    return _limited(wanted, stats, floor, ceiling, rate)


def upper_confidence_bound(
    rollout_step: int,
    stats: SourceStats,
    *,
    exploration: float = 0.5,
    floor: float = FLOOR,
    ceiling: float = CEILING,
    rate: float = RATE,
) -> float:
    """``2 · A + exploration · sqrt(2 · ln(1 + N) / (1 + n))``, A being the mean absolute advantage (up to 1/2).

    n and N are the decayed numbers of groups of this source and of all sources, so that a source which got no groups
    for long gets some again.
    """
    bonus = exploration * math.sqrt(2.0 * math.log1p(stats.all_recent) / (1.0 + stats.recent))
    wanted = stats.advantage / LARGEST_ADVANTAGE + bonus if stats.groups else ceiling
    return _limited(wanted, stats, floor, ceiling, rate)


def _limited(wanted: float, stats: SourceStats, floor: float, ceiling: float, rate: float) -> float:
    if not 0.0 <= floor <= ceiling or rate <= 0.0:
        raise ValueError(f"floor {floor}, ceiling {ceiling}, rate {rate}: need 0 <= floor <= ceiling and rate > 0")
    if stats.weight is not None:
        wanted = min(max(wanted, stats.weight - rate), stats.weight + rate)
    return min(max(wanted, floor), ceiling)
