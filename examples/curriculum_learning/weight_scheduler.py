"""Schedules for ``data_source_weights``: the six built-in ones, and one of your own to start from.

A schedule is a function of the rollout step (from 0) that returns the weight of one source: a finite number of at least
0. The weights of a step are normalised over the sources, so only their ratios count. A config gives the dotted path,
``examples.curriculum_learning.weight_scheduler.my_custom_schedule``, starting in the directory that has ``examples``.
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
    """Nearly the whole batch until this source's mean reward has passed 0.85, and a weight of 0.25 from then on.

    Next to a source of weight 1, its share is all but one in a million, and later 20%. The mean covers some ten
    batches, so that one lucky batch is not enough.

    A function with the parameter ``stats`` gets the statistics of its source (docs/adaptive_weights.md);
    ``stats.weight`` is the last weight in force.
    """
    was_learned = stats.weight == LEARNED_WEIGHT
    return LEARNED_WEIGHT if was_learned or (stats.groups and stats.mean > LEARNED_REWARD) else UNLEARNED_WEIGHT
