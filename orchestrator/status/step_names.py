"""The figures of a step and what each means: ``rollout/{source}/{name}`` in the log, ``rollout.{name}`` by source.

Invariants:

* Every name that a step has is here, and every name here is one that a step can have; a test holds a real run to it.
"""

from __future__ import annotations

from typing import Final

__all__ = ["RUN_NAMES", "SOURCE_NAMES"]

RUN_NAMES: Final = {
    "rollout/trainer_wait_s": ("s", "for how long the trainer waited for the batch; 0: it was there when asked for"),
}
"""Of no source: the full name, its unit and its meaning."""

SOURCE_NAMES: Final = {
    "weight": ("share", "asked for, normalised over the sources that take part, 0 to 1"),
    "group_count": ("groups", "of the source in the batch"),
    "sample_count": ("samples", "of the source in the batch"),
    "response_len/mean": ("tokens", "length of its responses in the batch"),
    "response_len/median": ("tokens", ""),
    "response_len/max": ("tokens", ""),
    "response_len/min": ("tokens", ""),
    "response_len/std": ("tokens", "standard deviation"),
    "raw_reward/mean": ("reward", "of its samples in the batch, as scored"),
    "raw_reward/median": ("reward", ""),
    "raw_reward/max": ("reward", ""),
    "raw_reward/min": ("reward", ""),
    "raw_reward/std": ("reward", "standard deviation"),
    "reward_cap": ("reward", "in force at the step; absent where the source has none"),
    "staleness/mean": ("versions", "age of its groups when the batch formed: policy version minus the oldest in them"),
    "staleness/max": ("versions", ""),
    "buffer_groups": ("groups", "left in its buffer when the batch had formed"),
    "in_flight": ("groups", "in flight when the batch had formed"),
    "carry": ("groups", "remainder carried to the next batch"),
    "debt": ("groups", "that others gave in its place; negative: that it gave for others"),
    "length_bias/overtaking": ("ratio", "mean length handed out ÷ launched and kept, minus 1, in the whole run"),
    "length_bias/total": ("ratio", "mean length handed out ÷ launched, minus 1, in the whole run"),
    "resumed_samples": ("samples", "in the batch that were continued from a partial rollout"),
    "filter_ratio_all_zero": ("share", "of the groups that ended since the batch before: dropped as `zero_std`"),
    "filter_ratio_reward_cap": ("share", "of the groups that ended since the batch before: dropped as `reward_cap`"),
    "dropped/{reason}": ("groups", "dropped since the batch before, by reason"),
}
"""By the name after ``rollout/{source}/``."""
