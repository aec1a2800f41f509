"""Schedules for ``data_source_reward_caps``: the built-in ones, and one of your own to start from.

A cap is a function of the rollout step (from 0). It returns the mean reward above which a group of that source is too
easy to train on. Such groups are dropped and counted, and others are generated in their place. A config gives the
dotted path, ``examples.curriculum_learning.reward_cap_scheduler.increasing_cap``, starting in the directory that has
``examples``.
"""

from __future__ import annotations

from orchestrator.reward_cap_scheduler import (
    decreasing_cap,
    exponential_decrease,
    exponential_increase,
    increasing_cap,
    level_decreasing,
    level_increasing,
    step_function_cap,
    warmup_then_constant,
)

__all__ = [
    "decreasing_cap",
    "exponential_decrease",
    "exponential_increase",
    "increasing_cap",
    "level_decreasing",
    "level_increasing",
    "my_custom_cap",
    "step_function_cap",
    "warmup_then_constant",
]


def my_custom_cap(rollout_step: int) -> float:
    """No cap for 50 steps (1.0, if rewards are at most 1), then 0.8."""
    return 1.0 if rollout_step < 50 else 0.8
