"""The figures of a step and what each means: ``rollout/{source}/{name}`` in the log, ``rollout.{name}`` by source.

Invariants:

* Every name that a step can have is here, and no other. A test checks this against a real run.
"""

from __future__ import annotations

from typing import Final

__all__ = ["RUN_NAMES", "SOURCE_NAMES"]

RUN_NAMES: Final = {
    "rollout/trainer_wait_s": ("s", "how long the trainer waited for the batch; 0: it was ready when asked for"),
}
"""Figures that belong to no source: full name, unit and meaning."""

SOURCE_NAMES: Final = {
    "weight": ("share", "weight, normalised over the sources that take part, 0 to 1"),
    "group_count": ("groups", "groups of the source in the batch"),
    "sample_count": ("samples", "samples of the source in the batch"),
    "response_len/mean": ("tokens", "length of its responses in the batch"),
    "response_len/median": ("tokens", ""),
    "response_len/max": ("tokens", ""),
    "response_len/min": ("tokens", ""),
    "response_len/std": ("tokens", "standard deviation"),
    "raw_reward/mean": ("reward", "reward of its samples in the batch, as scored"),
    "raw_reward/median": ("reward", ""),
    "raw_reward/max": ("reward", ""),
    "raw_reward/min": ("reward", ""),
    "raw_reward/std": ("reward", "standard deviation"),
    "reward_cap": ("reward", "reward cap in force at the step; absent if the source has none"),
    "staleness/mean": ("versions", "policy version when the batch formed, minus the oldest version in a group"),
    "staleness/max": ("versions", ""),
    "buffer_groups": ("groups", "groups left in its buffer after the batch formed"),
    "in_flight": ("groups", "groups in flight after the batch formed"),
    "carry": ("groups", "remainder carried to the next batch"),
    "debt": ("groups", "groups that others gave in its place; negative: groups that it gave for others"),
    "length_bias/overtaking": ("ratio", "mean length handed out ÷ launched and kept, minus 1, over the whole run"),
    "length_bias/total": ("ratio", "mean length handed out ÷ launched, minus 1, over the whole run"),
    "resumed_samples": ("samples", "samples in the batch that were continued from a partial rollout"),
    "filter_ratio_all_zero": ("share", "groups finished since the previous batch: the share dropped as `zero_std`"),
    "filter_ratio_reward_cap": ("share", "groups finished since the previous batch: the share dropped as `reward_cap`"),
    "dropped/{reason}": ("groups", "groups dropped since the previous batch, by reason"),
}
"""By the name after ``rollout/{source}/``."""
