"""Summaries of numbers: of a batch at once, of a stream in constant memory, and the measured share of kept groups.

Invariants:

* Nothing here ever returns NaN or fails on few numbers: a summary of nothing is all zeros with count 0.
* Standard deviations are of the population (divided by n, not n - 1), so that one number has the deviation 0.
* :class:`Running` and :class:`Acceptance` hold a fixed number of floats, however much is added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["HALF_LIFE_GROUPS", "Acceptance", "Running", "Summary", "summarize"]

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


class Running:
    """Count, mean, standard deviation, smallest and largest of a stream.

    Welford's recurrence (B. P. Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products",
    Technometrics 4, 1962), which does not cancel where the sum of squares would.
    """

    __slots__ = ("_squares", "count", "max", "mean", "min")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.min = 0.0
        self.max = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Take one finite number into account.

        Raises:
            ValueError: the number is infinite or NaN, which would spoil everything added before.
        """
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be averaged")
        self.min = value if self.count == 0 else min(self.min, value)
        self.max = value if self.count == 0 else max(self.max, value)
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._squares += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation of the population; 0 for fewer than two numbers."""
        return math.sqrt(max(0.0, self._squares) / self.count) if self.count else 0.0

    def to_json(self) -> dict[str, float]:
        """A JSON object from which :meth:`from_json` goes on exactly here."""
        return {"count": self.count, "mean": self.mean, "min": self.min, "max": self.max, "squares": self._squares}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Running:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError: an entry is missing.
        """
        running = cls()
        running.count = int(data["count"])
        running.mean, running.min, running.max = float(data["mean"]), float(data["min"]), float(data["max"])
        running._squares = float(data["squares"])
        return running


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
