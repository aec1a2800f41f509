"""The built-in rewards: comparisons of the response's text with the prompt's label.

Invariants:

* 1.0 or 0.0, and never 0.0 for want of a label: a prompt without one is an error.
* They cost microseconds and run in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import anyio.lowlevel

from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample
from orchestrator.rewards.port import RewardResult, RewardStatistics
from orchestrator.rewards.tally import Tally

__all__ = ["BUILT_IN_REWARDS", "BuiltInReward", "contains", "exact_match"]


def exact_match(sample: Sample, prompt: Prompt) -> bool:
    """Whether the response is the label, or one of the labels of a list; both without surrounding white space.

    Raises:
        RewardError: the prompt has no label, or one that is not a text, a number, or a list of these.
    """
    return sample.text.strip() in _accepted(prompt)


def contains(sample: Sample, prompt: Prompt) -> bool:
    """Whether the response contains the label, or one of the labels of a list, without surrounding white space.

    Raises:
        RewardError: as :func:`exact_match`, and for a label that is empty, which every response contains.
    """
    accepted = _accepted(prompt)
    if "" in accepted:
        raise RewardError(f"the label of {_place(prompt)} is empty, so every response contains it")
    return any(answer in sample.text for answer in accepted)


BUILT_IN_REWARDS: Final[dict[str, Callable[[Sample, Prompt], bool]]] = {
    "contains": contains,
    "exact_match": exact_match,
}
"""By the name under which the config knows them."""


class BuiltInReward:
    """A :class:`~orchestrator.rewards.port.Reward` that is one of ``BUILT_IN_REWARDS``."""

    def __init__(self, name: str) -> None:
        self._function = BUILT_IN_REWARDS[name]
        self._tally = Tally(name, "built_in")

    @property
    def is_whole_group(self) -> bool:
        """Each sample by itself."""
        return False

    async def score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        """The reward of a finished sample.

        Raises:
            RewardError: the label cannot be compared with.
        """
        with self._tally.call():
            await anyio.lowlevel.checkpoint()
            return [RewardResult(float(self._function(sample, prompt))) for sample in samples]

    def statistics(self) -> RewardStatistics:
        """Counts since the start."""
        return self._tally.statistics()

    async def aclose(self) -> None:
        """Nothing is held."""


def _place(prompt: Prompt) -> str:
    return f"prompt {prompt.prompt_index} of source {prompt.source}"


def _accepted(prompt: Prompt) -> list[str]:
    """The accepted answers as text."""
    labels = prompt.label if isinstance(prompt.label, list) else [prompt.label]
    if not labels or not all(isinstance(label, str | int | float) for label in labels):
        raise RewardError(
            f"the label of {_place(prompt)} is {prompt.label!r:.200}; it must be a string, a number or a list of these"
        )
    return [str(label).strip() for label in labels]
