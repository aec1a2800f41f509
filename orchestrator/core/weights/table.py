"""The weights of the sources: the table that evaluates all of them at a step.

Invariants:

* A weight is a function of the step alone, but for adaptive ones, which also take the statistics of their source as
  they were when the last batch formed; the last one in force stands in for one that fails.
* What stands in for another weight that fails at a step is the weight's value at the latest earlier step that has one,
  so it does not depend on what was asked before: looking ahead does not change it, nor does a restart (within
  :data:`MAX_LOOK_BACK_STEPS`), and a later value never stands in for an earlier one.
* Rows are of finite numbers >= 0, whatever a user's function returns or raises; each failure is a warning in the row.
* A weight is evaluated once a step as long as the step is remembered (:data:`MAX_REMEMBERED_STEPS`).
* So is a row, for the sources that took part when its step was asked for last, if no weight is adaptive: nobody changes
  its mappings.
* Setting a weight at run time hides the configured one and forgets nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from orchestrator.core.observations import NO_STATS, SourceStats
from orchestrator.errors import SourceUnknown, WeightError

from .forms import Weight

__all__ = ["WeightHistory", "WeightRow", "WeightTable"]

MAX_REMEMBERED_STEPS: Final = 256
"""Values kept for each source, those of the steps asked for last: more than any sensible look-ahead, some 40 kB a
source."""

MAX_LOOK_BACK_STEPS: Final = 256
"""How far back an earlier value is looked for when a weight fails; about 1 ms for an expression, and only once,
because the value found is remembered for the step that failed."""

_Known = tuple[int, float | None, str | None]
"""A step, the value in force there, and what was wrong."""


class WeightHistory:
    """One weight with the values it had; see the module's invariants for what stands in for a failure."""

    def __init__(self, weight: Weight, stats: Callable[[], SourceStats] = lambda: NO_STATS) -> None:
        self.weight = weight
        self._stats = stats
        self._is_adaptive = weight.is_adaptive
        self._evaluate = weight.__call__  # bound once: every step calls it
        self._known: list[_Known | None] = [None] * MAX_REMEMBERED_STEPS  # of a step at its place modulo the length

    def at(self, step: int) -> tuple[float | None, str | None]:
        """The value in force at a step and, if the weight failed there, what was wrong.

        The value is ``None`` if the weight failed there and at all the steps before that were looked at.
        """
        if self._is_adaptive:  # not remembered: the same step has another weight once a batch has formed
            stats = self._stats()
            try:
                return self.weight(step, stats), None
            except WeightError as error:
                return stats.weight, error.message
        known = self._known[step % MAX_REMEMBERED_STEPS]
        if known is None or known[0] != step:
            try:
                known = (step, self._evaluate(step), None)
            except WeightError as error:
                known = (step, self._before(step), error.message)
            self._known[step % MAX_REMEMBERED_STEPS] = known
        return known[1], known[2]

    def _before(self, step: int) -> float | None:
        """The value in force at the step before, looking back until there is one."""
        for earlier in range(step - 1, max(-1, step - 1 - MAX_LOOK_BACK_STEPS), -1):
            known = self._known[earlier % MAX_REMEMBERED_STEPS]
            if known is not None and known[0] == earlier:
                return known[1]
            try:
                return self._evaluate(earlier)
            except WeightError:
                continue
        return None


@dataclass(frozen=True, slots=True)
class WeightRow:
    """All weights at one step.

    ``raw`` are the weights in force; ``shares`` the same normalised over the active sources to sum to 1, 0 for the
    others, all 0 when no active source has a weight above 0. ``warnings`` name source and step of what failed; asking
    for the same step again gives them again.
    """

    step: int
    raw: dict[str, float]
    shares: dict[str, float]
    warnings: tuple[str, ...]


class WeightTable:
    """The configured weights of all sources, and those set at run time.

    Args:
        names: the sources, in the order of the config.
        weights: one for each.
        stats: the statistics of a source, for adaptive weights.

    Raises:
        WeightError: another number of weights than of sources.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[Weight],
        stats: Callable[[str], SourceStats] = lambda _: NO_STATS,
    ) -> None:
        self._stats = stats
        self._live: dict[str, WeightHistory] = {}
        self._rows: dict[int, tuple[frozenset[str], WeightRow]] = {}  # with the sources that took part
        self.revision = 0
        """Rises with every change, so that plans made from the table know when they are out of date."""
        self.replace(names, weights)

    def _new(self, source: str, weight: Weight) -> WeightHistory:
        return WeightHistory(weight, partial(self._stats, source))

    @property
    def adaptive(self) -> tuple[str, ...]:
        """The sources whose weight in force is adaptive."""
        return tuple(name for name in self.names if self._history(name).weight.is_adaptive)

    def weight(self, source: str) -> Weight:
        """The weight in force: the one set at run time, else the configured one.

        Raises:
            SourceUnknown: no such source.
        """
        return self._history(source).weight

    def _history(self, source: str) -> WeightHistory:
        if source not in self._configured:
            raise SourceUnknown(f"no source {source!r}; the sources are {', '.join(self.names)}")
        return self._live.get(source) or self._configured[source]

    def set(self, source: str, weight: Weight | None) -> None:
        """Put a weight in force instead of the configured one; ``None``: the configured one again.

        Raises:
            SourceUnknown: no such source.
        """
        self._history(source)
        if weight is None:
            self._live.pop(source, None)
        else:
            self._live[source] = self._new(source, weight)
        self._changed()

    def replace(self, names: Sequence[str], weights: Sequence[Weight]) -> None:
        """Take over the sources and weights of a changed config; weights set at run time stay in force.

        Raises:
            WeightError: another number of weights than of sources; nothing has changed.
        """
        if len(weights) != len(names):
            raise WeightError(f"{len(weights)} weights for {len(names)} sources: write one for each, in the same order")
        self.names = tuple(names)
        # Anew also where the text is the same: the code behind it may have changed.
        self._configured = {name: self._new(name, weight) for name, weight in zip(names, weights, strict=True)}
        self._live = {name: history for name, history in self._live.items() if name in self._configured}
        self._changed()

    def _changed(self) -> None:
        self._rows.clear()
        self._all = frozenset(self.names)
        self._in_force = {name: self._history(name) for name in self.names}
        self._has_adaptive = bool(self.adaptive)
        self.revision += 1

    def at(self, step: int, *, active: Collection[str] | None = None) -> WeightRow:
        """The weights at a step; ``active`` are the sources that take part, ``None`` for all."""
        taking_part = self._all if active is None else frozenset(active)
        part, known = self._rows.get(step, (None, None))
        if known is None or part != taking_part:
            known = self._row(step, taking_part)
            if not self._has_adaptive:  # of the step alone; every plan asks for the same steps again
                if step not in self._rows and len(self._rows) >= MAX_REMEMBERED_STEPS:
                    del self._rows[next(iter(self._rows))]
                self._rows[step] = taking_part, known
        return known

    def _row(self, step: int, active: frozenset[str]) -> WeightRow:
        values: list[float] = []
        warnings: list[str] = []
        for name, history in self._in_force.items():
            value, problem = history.at(step)
            values.append(value or 0.0)
            if problem is not None:
                kept = "0 is used instead" if value is None else f"the last good value {value:g} is used instead"
                warnings.append(f"weight of {name} at step {step}: {problem}; {kept}")
        raw = dict(zip(self._in_force, values, strict=True))
        if not active >= self._all:
            values = [value if name in active else 0.0 for name, value in raw.items()]
        largest = max(values, default=0.0)
        if largest <= 0.0:
            return WeightRow(step, raw, dict.fromkeys(self.names, 0.0), tuple(warnings))
        # Divided by the largest first: the sum of finite weights can overflow.
        scaled = [value / largest for value in values]
        total = math.fsum(scaled)
        shares = dict(zip(raw, [value / total for value in scaled], strict=True))
        return WeightRow(step, raw, shares, tuple(warnings))
