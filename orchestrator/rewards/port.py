"""The port of rewards: from a finished sample and its prompt to a number.

Invariants:

* A failure is an error (``RewardError``, ``RewardTimeout``), never a zero.
* Every call has a deadline; a function that hangs loses its process, not the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.records import Prompt, Sample

__all__ = ["Reward", "RewardResult", "RewardStatistics"]


@dataclass(frozen=True, slots=True)
class RewardResult:
    """A finite ``value``, and ``detail``: the whole dictionary where the function returned one, else ``None``."""

    value: float
    detail: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RewardStatistics:
    """Counts since the start.

    ``scored``: calls that gave a number; ``failed``: calls that raised or crashed; ``timed_out``: calls that were
    killed at their deadline; ``running``: calls under way; ``last_error``: the newest failure in words.
    """

    scored: int = 0
    failed: int = 0
    timed_out: int = 0
    running: int = 0
    last_error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """Scores samples of one source."""

    async def score(self, sample: Sample, prompt: Prompt) -> RewardResult:
        """The reward of a finished sample.

        Raises:
            RewardError: the function raised, crashed, or returned something that is not a finite number (or a
                dictionary without one under the configured key).
            RewardTimeout: no answer within the deadline.
        """
        ...

    def statistics(self) -> RewardStatistics:
        """Counts since the start."""
        ...

    async def aclose(self) -> None:
        """Let go of processes and connections."""
        ...
