"""Summaries of the numbers of a batch, and the measured share of groups that a filter keeps.

Invariants:

* Nothing here ever returns NaN or fails on few numbers: a summary of nothing is all zeros with count 0.
* Standard deviations are of the population (divided by n, not n - 1), so that one number has the deviation 0.
* :class:`Acceptance` holds one float, however much is added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["HALF_LIFE_GROUPS", "Acceptance", "Summary", "summarize"]

HALF_LIFE_GROUPS: Final = 32
"""After this many groups an old observation counts half. About one batch: short enough to follow a model that learns,
long enough that a run of dropped groups at the start does not look like a filter that drops everything."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Count, mean, median, largest, smallest and standard deviation of some numbers; all 0 when there are none."""

    count: int = 0
    mean: float = 0.0
    median: float = 0.0
    max: float = 0.0
    min: float = 0.0
    std: float = 0.0


def summarize(values: Iterable[float]) -> Summary:
    """The summary of finite numbers; the median of an even count is the mean of the middle two."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return Summary()
    smallest, largest = float(ordered[0]), float(ordered[-1])
    # Rounding may put the mean of equal numbers beside them; a mean belongs between the smallest and the largest.
    mean = min(max(math.fsum(ordered) / count, smallest), largest)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    distances = [value - mean for value in ordered]
    variance = math.fsum(map(operator.mul, distances, distances)) / count
    return Summary(count, mean, median, largest, smallest, math.sqrt(variance))


class Acceptance:
    """Measured share of finished groups that the filter keeps: an exponentially weighted mean.

    ``value`` is in [0, 1] and starts at 1 (nothing is known, so nothing is launched on suspicion); every group moves it
    towards 1 or 0 so that the weight of what was seen halves every :data:`HALF_LIFE_GROUPS` groups.
    """

    __slots__ = ("value",)

    _DECAY: Final = 0.5 ** (1 / HALF_LIFE_GROUPS)

    def __init__(self) -> None:
        self.value = 1.0

    def add(self, kept: bool) -> None:
        """Take one finished group into account."""
        self.value = self._DECAY * self.value + (1.0 - self._DECAY) * float(kept)
