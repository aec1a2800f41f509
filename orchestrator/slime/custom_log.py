"""The metrics of each source for slime (``--custom-rollout-log-function-path``).

Invariants:

* Every source reports its weight and its number of samples in every rollout, 0 if it has none. Lengths and rewards are
  reported only if there are samples, so that no mean of nothing enters a curve.
* A sample belongs to the source that it is tagged with; names are compared as a whole.
* A sample without a reward does not count as a reward of 0.
* slime still logs its own metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

from orchestrator.core.statistics import summarize

from .options import BATCHES_FORMED, read_weights
from .samples import SOURCE_KEY, Samples, leaves, optional_module, reward_value

__all__ = ["custom_rollout_log_function", "rollout_metrics"]

logger = logging.getLogger(__name__)

TRACKERS: Final = ("slime.utils.tracking_utils", "slime.utils.logging_utils")
"""Modules in which different versions of slime have ``log(args, metrics, step_key=…)``."""


def rollout_metrics(
    samples: Samples, weights: Mapping[str, float], *, reward_key: str | None = None
) -> dict[str, float]:
    """The metrics of one rollout.

    Args:
        samples: those that will be trained on, in any nesting; those of no source of ``weights`` are left out.
        weights: each source's share of the batch.
        reward_key: where rewards are dictionaries, the entry that counts.

    Returns:
        ``rollout/{source}/`` and ``weight``, ``sample_count``, ``response_len/{mean,median,max,min}`` (tokens),
        ``raw_reward/{mean,median,max,min}``.
    """
    by_source: dict[Any, list[Any]] = {name: [] for name in weights}
    for sample in leaves(samples):
        by_source.get((sample.metadata or {}).get(SOURCE_KEY), []).append(sample)
    metrics: dict[str, float] = {}
    for name, mine in by_source.items():
        prefix = f"rollout/{name}"
        metrics[f"{prefix}/weight"] = weights[name]
        metrics[f"{prefix}/sample_count"] = len(mine)
        rewards = (reward_value(sample, reward_key) for sample in mine)
        metrics |= _spread(f"{prefix}/response_len", [sample.response_length for sample in mine])
        metrics |= _spread(f"{prefix}/raw_reward", [reward for reward in rewards if reward is not None])
    return metrics


def _spread(prefix: str, values: Iterable[float]) -> dict[str, float]:
    summary = summarize(values)
    if not summary.count:
        return {}
    return {
        f"{prefix}/mean": summary.mean,
        f"{prefix}/median": summary.median,
        f"{prefix}/max": summary.max,
        f"{prefix}/min": summary.min,
    }


def custom_rollout_log_function(
    rollout_id: int,
    args: Any,
    samples: Samples,
    rollout_extra_metrics: MutableMapping[str, Any] | None,
    rollout_time: float,
) -> bool:
    """Log the sources of a rollout, and tell the data source that a batch has been formed.

    The numbers are added to ``rollout_extra_metrics``, which slime logs in one row with its own. If slime passes none,
    they go through slime's tracking; without slime they go through :mod:`logging`, at level INFO.
    ``args.data_source_batches_formed`` is set to ``rollout_id + 1``, which tells our data source the step, so that
    filtered groups do not advance the curriculum.

    Args:
        rollout_id: slime's number of the rollout, from 0; the step at which the weights are evaluated.
        args: slime's options, changed here.
        samples: those that will be trained on.
        rollout_extra_metrics: slime's metrics so far, changed here; or ``None``.
        rollout_time: seconds; not used, because slime logs it.

    Returns:
        ``False``. ``True`` would mean that everything is logged, and slime would leave out its own metrics (response
        lengths, truncation, throughput).

    Raises:
        ConfigError: the sources or weights cannot be used (a ``ValueError``).
    """
    row = read_weights(args).at(rollout_id)
    for warning in row.warnings:
        logger.warning("%s", warning)
    metrics = rollout_metrics(samples, row.shares, reward_key=getattr(args, "reward_key", None))
    _warn_of_unknown_sources(rollout_id, samples, row.shares)
    setattr(args, BATCHES_FORMED, rollout_id + 1)
    if rollout_extra_metrics is not None:
        rollout_extra_metrics.update(metrics)
    if optional_module("slime") is None:
        logger.info("rollout %d: %s", rollout_id, metrics)
    elif rollout_extra_metrics is None:
        _track(rollout_id, args, metrics)
    return False


def _warn_of_unknown_sources(rollout_id: int, samples: Samples, weights: Mapping[str, float]) -> None:
    tags = [(sample.metadata or {}).get(SOURCE_KEY) for sample in leaves(samples)]
    unknown = [tag for tag in tags if tag not in weights]
    if unknown:
        logger.warning(
            "rollout %d: %d samples are not counted: metadata[%r] must be one of %s, but is %s",
            rollout_id,
            len(unknown),
            SOURCE_KEY,
            ", ".join(weights),
            ", ".join(sorted({repr(tag) for tag in unknown})[:5]),
        )


def _track(rollout_id: int, args: Any, metrics: dict[str, float]) -> None:
    """Log like slime: one row, with the step under ``rollout/step``."""
    steps = optional_module("slime.utils.metric_utils")
    compute_step = getattr(steps, "compute_rollout_step", None)
    step = rollout_id if compute_step is None else compute_step(args, rollout_id)
    trackers = (getattr(optional_module(name), "log", None) for name in TRACKERS)
    track = next((found for found in trackers if found is not None), None)
    if track is None:
        logger.info("rollout %d: %s", rollout_id, metrics)
    else:
        track(args, metrics | {"rollout/step": step}, step_key="rollout/step")
