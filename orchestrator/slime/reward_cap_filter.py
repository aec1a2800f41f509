"""The reward cap of each source, as a filter for slime (``--dynamic-sampling-filter-path``).

Invariants:

* A verdict depends only on ``args`` and on the group. The cap is that of the step at which the group was first handed
  out, which its samples carry.
* A group is dropped with the reason ``reward_cap_{source}``, so that slime's ``rollout/dynamic_filter/drop_{reason}``
  counts by source. A source without a cap loses nothing.
* A missing reward is an error, never a reward of 0.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

from orchestrator.core.filters import REWARD_CAP, RewardCaps, Verdict
from orchestrator.errors import FilterError

from .options import read_reward_caps
from .samples import STEP_KEY, Samples, leaves, optional_module, reward_value, source_of

__all__ = ["check_reward_cap_per_source"]

KEPT_CAPS: Final = 4
"""Parsed caps are kept for this many runs in one process; there is one, except in tests."""


def check_reward_cap_per_source(args: Any, samples: Samples, **kwargs: Any) -> Any:
    """Drop a group whose mean reward is above the cap of its source: it is too easy to learn from.

    Args:
        args: slime's options; ``data_source_reward_caps`` has one cap for each source, in the forms of weights, or
            ``None`` for no cap. With ``reward_key``, that entry of a dictionary of rewards counts.
        samples: one scored group of our data source.
        kwargs: whatever else slime passes; ignored.

    Returns:
        An object with ``keep`` and ``reason``: slime's ``DynamicFilterOutput`` if slime is installed.

    Raises:
        ConfigError: the caps cannot be used (a ``ValueError``).
        SourceUnknown: the samples do not name one source.
        FilterError: the source has a cap, and a sample has no reward or no step.
    """
    names, caps = _caps(_frozen(args, "prompt_data"), _frozen(args, "prompt_data_source_names"), _frozen(args, _CAPS))
    source = source_of(samples, names)
    group = list(leaves(samples))
    step = group[0].metadata.get(STEP_KEY)
    if not isinstance(step, int):
        raise FilterError(f"a group of {source} has no {STEP_KEY} in its metadata: keep the metadata of get_samples")
    cap = caps.cap(source, step)
    if cap is None:
        return _output(True, None)
    rewards = [reward_value(sample, getattr(args, "reward_key", None)) for sample in group]
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < len(rewards):
        raise FilterError(
            f"{len(rewards) - len(scored)} of {len(rewards)} samples of {source} have no numeric reward: score groups"
            " before filtering, and set reward_key if rewards are dictionaries"
        )
    keep = math.fsum(scored) / len(scored) <= cap
    return _output(keep, None if keep else f"{REWARD_CAP}_{source}")


_CAPS: Final = "data_source_reward_caps"


def _frozen(args: Any, name: str) -> Any:
    value = getattr(args, name, None)
    return tuple(value) if isinstance(value, list | tuple) else value


class _Args:
    """The three options that caps are a function of."""

    def __init__(self, prompt_data: Any, names: Any, caps: Any) -> None:
        self.prompt_data = prompt_data
        self.prompt_data_source_names = names
        self.data_source_reward_caps = caps


@lru_cache(maxsize=KEPT_CAPS)
def _caps(prompt_data: Any, names: Any, caps: Any) -> tuple[tuple[str, ...], RewardCaps]:
    """Parsed caps; slime calls the filter once for every group."""
    return read_reward_caps(_Args(prompt_data, names, caps))


def _output(keep: bool, reason: str | None) -> Any:
    module = optional_module("slime.rollout.filter_hub.base_types")
    return Verdict(keep, reason) if module is None else module.DynamicFilterOutput(keep=keep, reason=reason)
