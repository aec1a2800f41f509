"""Schedules of reward caps: functions of the rollout step, for one source each (``data_source_reward_caps``).

A cap is the mean reward above which a group is too easy to train on (``orchestrator.core.filters``).

Invariants:

* The numbers are exactly those of slime's curriculum example, over its 200 steps.
* A cap is never negative. It is not normalised: unlike a weight, it does not depend on the other sources.
"""

from __future__ import annotations

import math
from typing import Final

from .weight_scheduler import level_decreasing, level_increasing

__all__ = [
    "decreasing_cap",
    "exponential_decrease",
    "exponential_increase",
    "increasing_cap",
    "level_decreasing",
    "level_increasing",
    "step_function_cap",
    "warmup_then_constant",
]

TRANSITION_STEPS: Final = 200
DECAY_PER_STEP: Final = 0.003
STAGE_STEPS: Final = 100
STAGES: Final = (0.2, 0.5, 0.8)
WARMUP_STEPS: Final = 100
WARMUP_FROM: Final = 0.1
WARMUP_TO: Final = 0.6


def increasing_cap(rollout_step: int) -> float:
    """From 0.1 (hard groups only) up to 0.9 in a straight line over 200 steps, then 0.9."""
    return 0.1 + 0.8 * min(rollout_step / TRANSITION_STEPS, 1.0)


def decreasing_cap(rollout_step: int) -> float:
    """From 0.9 down to 0.1 (hard groups only) in a straight line over 200 steps, then 0.1."""
    return 0.9 - 0.8 * min(rollout_step / TRANSITION_STEPS, 1.0)


def exponential_decrease(rollout_step: int) -> float:
    """``0.9 · exp(−0.003 · step) + 0.1``: from 1.0 towards 0.1, halfway at step 231."""
    return 0.9 * math.exp(-DECAY_PER_STEP * rollout_step) + 0.1


def exponential_increase(rollout_step: int) -> float:
    """One minus :func:`exponential_decrease`: from 0.0 towards 0.9."""
    return 1.0 - exponential_decrease(rollout_step)


def step_function_cap(rollout_step: int) -> float:
    """0.2, 0.5, 0.8, changing every 100 steps, then 0.8."""
    return STAGES[min(rollout_step // STAGE_STEPS, len(STAGES) - 1)]


def warmup_then_constant(rollout_step: int) -> float:
    """From 0.1 up to 0.6 in a straight line over 100 steps, then 0.6."""
    return WARMUP_FROM + (WARMUP_TO - WARMUP_FROM) * min(rollout_step / WARMUP_STEPS, 1.0)
