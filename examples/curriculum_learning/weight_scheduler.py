"""Schedules for ``data_source_weights``: the six built-in ones, and one of your own to start from.

A schedule is a function of the rollout step, from 0, that gives the weight of one source: a finite number of at least
0. Weights of a step are normalised over the sources, so only their ratios count. A config names it by its dotted path,
``examples.curriculum_learning.weight_scheduler.my_custom_schedule``, from the directory that ``examples`` is in.
"""

from __future__ import annotations

from orchestrator.adaptive_weights import SourceStats
from orchestrator.weight_scheduler import (
    easy_to_hard,
    exponential_decay,
    exponential_warmup,
    hard_to_easy,
    level_decreasing,
    level_increasing,
)

__all__ = [
    "easy_to_hard",
    "exponential_decay",
    "exponential_warmup",
    "hard_to_easy",
    "level_decreasing",
    "level_increasing",
    "my_custom_schedule",
    "until_learned",
]

LEARNED_REWARD = 0.85
LEARNED_WEIGHT = 0.25
UNLEARNED_WEIGHT = 1e6


def my_custom_schedule(rollout_step: int) -> float:
    """0.9 for the first 100 steps, 0.5 up to step 500, then 0.1."""
    if rollout_step < 100:
        return 0.9
    if rollout_step < 500:
        return 0.5
    return 0.1


def until_learned(rollout_step: int, stats: SourceStats) -> float:
    """Nearly everything until this source's mean reward has passed 0.85, and from then on a quarter of 1.

    Beside a source of weight 1 that is a share of all but one in a million, then of 20 %. The mean is of some ten
    batches, so that one lucky batch is not enough.

    A function that asks for ``stats`` is told how its source is doing (docs/adaptive_weights.md); ``stats.weight`` is
    what was in force last.
    """
    was_learned = stats.weight == LEARNED_WEIGHT
    return LEARNED_WEIGHT if was_learned or (stats.groups and stats.mean > LEARNED_REWARD) else UNLEARNED_WEIGHT
