"""The metrics of each step, under the seed's names (``rollout/{source}/…``).

Invariants:

* Every source reports at every step, with weight and count 0 if it has nothing in the batch.
* Values describe the batch that was handed out. Only the flows (``dropped``, ``filter_ratio``) describe the time since
  the previous batch.
* Every value is a finite number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from orchestrator.core.ledger.groups import StoredGroup
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.staleness import staleness
from orchestrator.core.statistics import Summary, summarize

__all__ = ["StepMetrics", "StepReport"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step: ``sources[name]`` holds the nested metrics of a source.

    ``slashed`` are the same under the seed's names: ``rollout/{source}/response_len/mean`` and so on.
    ``trainer_wait_s``: seconds that the trainer waited for this batch because it could not be formed; 0 if it was ready
    when the trainer asked for it.
    """

    step: int
    policy_version: int
    sources: dict[str, dict[str, Any]]
    slashed: dict[str, float]
    trainer_wait_s: float = 0.0


@dataclass(slots=True)
class _Flow:
    """Counters of a source at the previous step."""

    finished: int
    dropped: dict[str, int]


class _Names(NamedTuple):
    """The slashed names of a source's metrics, in their order; ``shape`` are the keys that are not always the same."""

    shape: tuple[str, ...]
    slashed: list[str]


def _slashed_names(prefix: str, metrics: dict[str, Any]) -> list[str]:
    names: list[str] = []
    for key, value in metrics.items():
        names += [f"{prefix}/{key}/{inner}" for inner in value] if isinstance(value, dict) else [f"{prefix}/{key}"]
    return names


class StepMetrics:
    """Turns formed batches into reports.

    Args:
        ledger: the run's facts.
        reward_cap: the cap in force for a source at a step, ``None`` without one.
    """

    def __init__(self, ledger: Ledger, reward_cap: Callable[[str, int], float | None]) -> None:
        self._ledger = ledger
        self._reward_cap = reward_cap
        self._before = {name: self._flow(state) for name, state in (ledger.sources | ledger.retired).items()}
        self._names: dict[str, _Names] = {}  # of each source at the step before: they seldom change

    def report(self, batch: LeasedBatch, *, trainer_wait_s: float = 0.0) -> StepReport:
        """The metrics of a batch that was formed just now, after the trainer had waited for it so long."""
        groups: dict[str, list[StoredGroup]] = {name: [] for name in self._ledger.sources}
        for share in batch.shares:
            for group in share.groups:
                groups[group.source].append(group)
        sources = {name: self._source(batch, self._ledger.source(name), groups[name]) for name in groups}
        return StepReport(
            batch.step, batch.policy_version, sources, self._slashed(sources, trainer_wait_s), trainer_wait_s
        )

    def _slashed(self, sources: dict[str, dict[str, Any]], trainer_wait_s: float) -> dict[str, float]:
        flat: dict[str, float] = {"rollout/trainer_wait_s": trainer_wait_s}
        for source, metrics in sources.items():
            shape = (*metrics, *metrics["dropped"])
            known = self._names.get(source)
            if known is None or known.shape != shape:
                known = self._names[source] = _Names(shape, _slashed_names(f"rollout/{source}", metrics))
            values: list[float] = []
            for value in metrics.values():
                if isinstance(value, dict):
                    values += value.values()
                else:
                    values.append(value)
            flat.update(zip(known.slashed, values, strict=True))
        return flat

    def _source(self, batch: LeasedBatch, state: SourceState, groups: list[StoredGroup]) -> dict[str, Any]:
        ages = [staleness(batch.policy_version, group.oldest_version) for group in groups]
        lengths = list(chain.from_iterable([group.lengths for group in groups]))
        metrics: dict[str, Any] = {
            "weight": batch.weights.get(state.name, 0.0),
            "sample_count": len(lengths),
            "group_count": len(groups),
            "response_len": _spread(summarize(lengths)),
            "raw_reward": _spread(summarize(chain.from_iterable([group.rewards for group in groups]))),
            "staleness": {"mean": sum(ages) / len(ages) if ages else 0.0, "max": max(ages, default=0)},
            "buffer_groups": len(state.ready),
            "in_flight": len(state.in_flight),
            "carry": state.carry,
            "debt": state.debt,
            "length_bias": state.lengths.bias(state.handed_out_lengths),
            "resumed_samples": sum([group.resumed for group in groups]),
        }
        cap = self._reward_cap(state.name, batch.step)
        if cap is not None:
            metrics["reward_cap"] = cap
        metrics.update(self._flows(state))
        return metrics

    def _flow(self, state: SourceState) -> _Flow:
        finished = state.launched - len(state.in_flight)
        return _Flow(finished, {reason: count.groups for reason, count in state.dropped.items()})

    def _flows(self, state: SourceState) -> dict[str, Any]:
        before, now = self._before.get(state.name, _Flow(0, {})), self._flow(state)
        self._before[state.name] = now
        dropped = {reason: groups - before.dropped.get(reason, 0) for reason, groups in now.dropped.items()}
        finished = max(1, now.finished - before.finished)
        return {
            "filter_ratio_all_zero": dropped.get("zero_std", 0) / finished,
            "filter_ratio_reward_cap": dropped.get("reward_cap", 0) / finished,
            "dropped": dropped,
        }


def _spread(summary: Summary) -> dict[str, float]:
    return {
        "mean": summary.mean,
        "median": summary.median,
        "max": summary.max,
        "min": summary.min,
        "std": summary.std,
    }
