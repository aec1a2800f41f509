"""The six weight schedules of the curriculum: functions of the rollout step, for one source each.

Invariants:

* The numbers are exactly those of slime's curriculum example, so that training runs stay comparable.
* Weights are normalised over the sources later. Pairs such as ``easy_to_hard`` and ``hard_to_easy`` already add up to
  1, so normalising does not change them.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = [
    "easy_to_hard",
    "exponential_decay",
    "exponential_warmup",
    "hard_to_easy",
    "level_decreasing",
    "level_increasing",
]

TRANSITION_STEPS: Final = 200
LEVEL_STEPS: Final = 50
LEVELS: Final = (0.5, 0.6, 0.7, 0.8)
DECAY_PER_STEP: Final = 0.015


def easy_to_hard(rollout_step: int) -> float:
    """From 0.9 down to 0.1 in a straight line over 200 steps, then 0.1."""
    return 0.9 - 0.8 * min(rollout_step / TRANSITION_STEPS, 1.0)


def hard_to_easy(rollout_step: int) -> float:
    """From 0.1 up to 0.9 in a straight line over 200 steps, then 0.9."""
    return 0.1 + 0.8 * min(rollout_step / TRANSITION_STEPS, 1.0)


def exponential_decay(rollout_step: int) -> float:
    """``0.9 · exp(−0.015 · step) + 0.1``: from 1.0 towards 0.1."""
    return 0.9 * math.exp(-DECAY_PER_STEP * rollout_step) + 0.1


def exponential_warmup(rollout_step: int) -> float:
    """One minus :func:`exponential_decay`: from 0.0 towards 0.9."""
    return 1.0 - exponential_decay(rollout_step)


def level_increasing(rollout_step: int) -> float:
    """0.5, 0.6, 0.7, 0.8, changing every 50 steps, then 0.8."""
    return LEVELS[min(rollout_step // LEVEL_STEPS, len(LEVELS) - 1)]


def level_decreasing(rollout_step: int) -> float:
    """0.8, 0.7, 0.6, 0.5, changing every 50 steps, then 0.5."""
    return LEVELS[-1 - min(rollout_step // LEVEL_STEPS, len(LEVELS) - 1)]
