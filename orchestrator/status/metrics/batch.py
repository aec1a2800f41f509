"""Metrics of the newest batch: the figures of the step that the page draws and the log has."""

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
        "Step of the newest batch, which the figures below are of.",
        _newest("step"),
    ),
    of_run(
        "rollout_batch_trainer_wait_seconds", "gauge", "s", "For how long the trainer waited for it.", _newest("wait_s")
    ),
    of_newest_batch("rollout_batch_weight", "share", "Asked for, 0 to 1.", "weight"),
    of_newest_batch("rollout_batch_groups", "groups", "Handed out.", "group_count"),
    of_newest_batch("rollout_batch_samples", "samples", "Handed out.", "sample_count"),
    of_newest_batch(
        "rollout_batch_reward",
        "reward",
        "Of its samples.",
        "raw_reward/mean",
        "raw_reward/std",
        "raw_reward/min",
        "raw_reward/max",
    ),
    of_newest_batch(
        "rollout_batch_response_tokens",
        "tokens",
        "Of its samples.",
        "response_len/mean",
        "response_len/min",
        "response_len/max",
    ),
    of_newest_batch(
        "rollout_batch_staleness_versions",
        "versions",
        "Of its groups, when it formed.",
        "staleness/mean",
        "staleness/max",
    ),
    of_newest_batch(
        "rollout_batch_buffered_groups", "groups", "Left in the buffer when it had formed.", "buffer_groups"
    ),
    of_newest_batch("rollout_batch_in_flight_groups", "groups", "In flight when it had formed.", "in_flight"),
    of_newest_batch(
        "rollout_batch_resumed_samples",
        "samples",
        "Of it that were continued from a partial rollout.",
        "resumed_samples",
    ),
    of_newest_batch(
        "rollout_batch_dropped_groups", "groups", "Dropped since the batch before, for any reason.", "dropped"
    ),
)
