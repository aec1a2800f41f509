"""Verdicts on finished groups: keep, or drop with a reason under which the drop is counted.

Invariants:

* A verdict is a function of the group's samples (and, for caps, of the step); it changes nothing.
* A filter that fails is an error (:class:`FilterError`), never a verdict.
* Reasons are short names made of letters, digits, ``_``, ``-`` and ``.``: they become parts of metric names.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightHistory
from orchestrator.errors import FilterError
from orchestrator.records import Sample

from .dotted import resolve

__all__ = [
    "BUILT_IN_FILTERS",
    "GroupFilter",
    "RewardCaps",
    "Verdict",
    "check_reward_nonzero_std",
    "load_filter",
]

ZERO_STD: Final = "zero_std"
REWARD_CAP: Final = "reward_cap"

MAX_REASON_CHARACTERS: Final = 64
"""Reasons are names, not explanations."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a group is kept, and if not, the reason under which it is counted."""

    keep: bool
    reason: str | None = None


GroupFilter = Callable[[Any, Sequence[Sample]], Verdict]
"""Called with ``(args, samples)``; raises :class:`FilterError` and nothing else."""

_KEEP: Final = Verdict(True)


def _rewards(samples: Sequence[Sample]) -> list[float]:
    """The rewards of a scored group.

    Raises:
        FilterError: the group is empty or a sample has no reward yet.
    """
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if not rewards or len(rewards) < len(samples):
        raise FilterError(
            f"{len(samples) - len(rewards)} of {len(samples)} samples have no reward: score the group first"
        )
    return rewards


def check_reward_nonzero_std(args: Any, samples: Sequence[Sample], **kwargs: Any) -> Verdict:
    """Drop a group whose rewards are all equal, from which a group-relative advantage learns nothing.

    A group of a single sample has no spread that could be judged and is kept; otherwise nothing would ever be.

    Raises:
        FilterError: the group is empty or a sample has no reward yet.
    """
    rewards = _rewards(samples)
    if len(rewards) > 1 and min(rewards) == max(rewards):
        return Verdict(False, ZERO_STD)
    return _KEEP


BUILT_IN_FILTERS: Final[dict[str, Callable[..., Verdict]]] = {"check_reward_nonzero_std": check_reward_nonzero_std}
"""What ``dynamic_sampling_filter`` may name without a path."""


def load_filter(spec: str | None, *, directory: Path | None = None) -> GroupFilter:
    """The filter that a config names.

    Args:
        spec: a name of :data:`BUILT_IN_FILTERS`; the dotted path of a function ``(args, samples, **kwargs)`` that
            returns a bool, a :class:`Verdict`, or anything with ``keep`` and ``reason``; ``None`` keeps every group.
        directory: where dotted paths are looked up first; the working directory by default.

    Raises:
        DottedPathError: the path does not lead to a function.
        FilterError: neither a built-in nor a dotted path, or an asynchronous function.
    """
    if spec is None:
        return lambda _args, _samples: _KEEP
    if spec in BUILT_IN_FILTERS:
        return BUILT_IN_FILTERS[spec]
    if "." not in spec:
        known = ", ".join(BUILT_IN_FILTERS)
        raise FilterError(f"{spec!r} is neither a built-in filter ({known}) nor the dotted path of a function")
    function = resolve(spec, directory=directory)
    if inspect.iscoroutinefunction(function):
        raise FilterError(f"{spec} is asynchronous; a filter must be a plain function of (args, samples)")

    def verdict(args: Any, samples: Sequence[Sample]) -> Verdict:
        try:
            answer = function(args, samples)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a CancelledError that it lets out is not ours: nothing is awaited here
            raise FilterError(f"filter {spec} raised {type(error).__name__}: {error}") from error
        return _to_verdict(spec, answer)

    return verdict


def _to_verdict(spec: str, answer: Any) -> Verdict:
    keep = _to_bool(getattr(answer, "keep", answer))
    if keep is None:
        raise FilterError(
            f"filter {spec} returned {str(answer)[:60]} ({type(answer).__name__}):"
            " expected a bool, or an object with keep and reason"
        )
    if keep:
        return _KEEP
    reason = getattr(answer, "reason", None)
    return Verdict(False, _reason_name(spec.rpartition(".")[2] if reason is None else str(reason)))


def _to_bool(value: Any) -> bool | None:
    """A bool of Python, or a scalar one of numpy or torch; ``None`` for anything else."""
    if isinstance(value, bool):
        return value
    item = getattr(value, "item", None)
    scalar = item() if callable(item) and getattr(value, "ndim", None) == 0 else None
    return scalar if isinstance(scalar, bool) else None


def _reason_name(reason: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", reason)[:MAX_REASON_CHARACTERS] or "filtered"


class RewardCaps:
    """For each source the mean reward above which a group is too easy to be worth training on.

    A cap is written in the forms of weights (so it is >= 0), or ``None`` for no cap. Where a cap fails at a step, its
    last good value is kept as weights do it; without one there is no cap. :meth:`warnings` tells.

    Args:
        names: the sources, in the order of the config.
        caps: one for each, or ``None`` (or empty) for no caps at all.
        directory: where dotted paths are looked up first; the working directory by default.

    Raises:
        FilterError: another number of caps than of sources.
        WeightError, ExpressionError, DottedPathError: a cap cannot be used.
    """

    def __init__(
        self, names: Sequence[str], caps: Sequence[float | str | None] | None, *, directory: Path | None = None
    ) -> None:
        self._caps: dict[str, WeightHistory] = {}
        self.replace(names, caps, directory=directory)

    def replace(
        self, names: Sequence[str], caps: Sequence[float | str | None] | None, *, directory: Path | None = None
    ) -> None:
        """Take over those of a changed config; arguments and errors are the class's. An error changes nothing."""
        caps = caps or [None] * len(names)
        if len(caps) != len(names):
            raise FilterError(f"{len(caps)} reward caps for {len(names)} sources: write one for each, or null")
        parsed = {
            name: parse_weight(cap, directory=directory)
            for name, cap in zip(names, caps, strict=True)
            if cap is not None
        }
        for cap in parsed.values():
            if cap.is_adaptive:
                raise FilterError(f"{cap.text} has a parameter stats, but reward caps are functions of the step only")
        self._caps = {name: WeightHistory(cap) for name, cap in parsed.items()}

    def cap(self, source: str, step: int) -> float | None:
        """The cap in force for a source at a step; ``None``: no cap."""
        history = self._caps.get(source)
        return None if history is None else history.at(step)[0]

    def check(self, step: int, source: str, samples: Sequence[Sample]) -> Verdict:
        """Drop a group whose mean reward exceeds the cap of its source at that step.

        Raises:
            FilterError: there is a cap, and the group is empty or a sample has no reward yet.
        """
        cap = self.cap(source, step)
        if cap is None:
            return _KEEP
        rewards = _rewards(samples)
        return Verdict(False, REWARD_CAP) if math.fsum(rewards) / len(rewards) > cap else _KEEP

    def warnings(self, step: int) -> tuple[str, ...]:
        """What is wrong with the caps at a step, naming source and step."""
        problems = ((name, history.at(step)[1]) for name, history in self._caps.items())
        return tuple(f"reward cap of {name} at step {step}: {problem}" for name, problem in problems if problem)
