"""Metrics of the newest batch: the same figures that the page plots and the log has."""

from __future__ import annotations

from typing import Any, Final

from .metric import of_newest_batch, of_run

__all__ = ["BATCH"]


def _newest(key: str) -> Any:
    return lambda status: status["history"][-1][key] if status["history"] else None


BATCH: Final = (
    of_run(
        "rollout_batch_step",
        "gauge",
        "step",
        "Step of the newest batch; the other rollout_batch_ figures describe it.",
        _newest("step"),
    ),
    of_run(
        "rollout_batch_trainer_wait_seconds", "gauge", "s", "How long the trainer waited for it.", _newest("wait_s")
    ),
    of_newest_batch("rollout_batch_weight", "share", "Normalised weight of the source, 0 to 1.", "weight"),
    of_newest_batch("rollout_batch_groups", "groups", "Groups handed out.", "group_count"),
    of_newest_batch("rollout_batch_samples", "samples", "Samples handed out.", "sample_count"),
    of_newest_batch(
        "rollout_batch_reward",
        "reward",
        "Reward of its samples.",
        "raw_reward/mean",
        "raw_reward/std",
        "raw_reward/min",
        "raw_reward/max",
    ),
    of_newest_batch(
        "rollout_batch_response_tokens",
        "tokens",
        "Length of its responses.",
        "response_len/mean",
        "response_len/min",
        "response_len/max",
    ),
    of_newest_batch(
        "rollout_batch_staleness_versions",
        "versions",
        "Staleness of its groups when it formed.",
        "staleness/mean",
        "staleness/max",
    ),
    of_newest_batch(
        "rollout_batch_buffered_groups", "groups", "Groups left in the buffer after it formed.", "buffer_groups"
    ),
    of_newest_batch("rollout_batch_in_flight_groups", "groups", "Groups in flight after it formed.", "in_flight"),
    of_newest_batch(
        "rollout_batch_resumed_samples",
        "samples",
        "Samples in it that were continued from a partial rollout.",
        "resumed_samples",
    ),
    of_newest_batch("rollout_batch_dropped_groups", "groups", "Groups dropped since the previous batch.", "dropped"),
)
