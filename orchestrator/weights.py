"""The weights of the sources: one weight in any of its forms, and the table that evaluates all of them at a step.

Invariants:

* A weight is a function of the step alone. What stands in for a weight that fails at a step is the weight's value at
  the latest earlier step that has one, so it does not depend on what was asked before: looking ahead does not change
  it, nor does a restart (within :data:`MAX_LOOK_BACK_STEPS`), and a later value never stands in for an earlier one.
* Rows are of finite numbers >= 0, whatever a user's function returns or raises; each failure is a warning in the row.
* A weight is evaluated once a step as long as the step is remembered (:data:`MAX_REMEMBERED_STEPS`).
* Setting a weight at run time hides the configured one and forgets nothing of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .dotted import resolve
from .errors import SourceUnknown, WeightError
from .expressions import compile_expression

__all__ = ["Weight", "WeightHistory", "WeightKind", "WeightRow", "WeightTable", "parse_weight"]

WeightKind = Literal["constant", "lambda", "function"]

MAX_REMEMBERED_STEPS: Final = 256
"""Values kept for each source: more than any sensible look-ahead, some 40 kB a source."""

MAX_LOOK_BACK_STEPS: Final = 256
"""How far back an earlier value is looked for when a weight fails; about 1 ms for an expression, and only once,
because the value found is remembered for the step that failed."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One source's weight: called with a step, it gives a finite number >= 0.

    ``text`` is how it was written, ``kind`` which of the forms that is.
    """

    text: str
    kind: WeightKind
    function: Callable[[int], Any]

    def __call__(self, step: int) -> float:
        """The weight at a step.

        Raises:
            WeightError: the result is not a finite number >= 0, or the function raised.
        """
        try:
            result = self.function(step)
        except WeightError:
            raise
        except Exception as error:
            message = f"{self.text} raised {type(error).__name__} at step {step}: {error}"
            raise WeightError(message) from error
        value = _usable(result)
        if value is None:
            raise WeightError(f"{self.text} at step {step} gives {str(result)[:60]}, {_EXPECTED}")
        return value


_EXPECTED: Final = "a finite number of at least 0 is expected"


def _usable(result: Any) -> float | None:
    """The weight that a function's result is; ``None`` if it is none. Text is not a number here."""
    if type(result) is not float:
        try:
            result = math.nan if isinstance(result, str | bytes) else float(result)
        except (TypeError, ValueError, OverflowError):
            return None
    return result if 0.0 <= result < math.inf else None


def parse_weight(value: float | str, *, directory: Path | None = None) -> Weight:
    """Make a weight of a number, of ``"lambda step: …"``, or of the dotted path of a function of the step.

    A number may be written as text (the command line has nothing else).

    Args:
        value: the weight as the config or the command line gives it.
        directory: where dotted paths are looked up first; the working directory by default.

    Raises:
        WeightError: none of the forms, a constant that is not finite or below 0, or a function of another signature.
        ExpressionError: the lambda is malformed or says something that is not allowed.
        DottedPathError: the dotted path does not lead to a function.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise WeightError(f"a weight is a number, a lambda or a dotted path, not {str(value)[:60]!r}")
    text = str(value).strip() if isinstance(value, str) else f"{value!r:.60}"
    if text.startswith("lambda"):
        return Weight(text, "lambda", compile_expression(text))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        return Weight(text, "function", _function_of_step(text, directory))
    constant = _usable(number)
    if constant is None:
        raise WeightError(f"a weight is given as {number}, {_EXPECTED}")
    return Weight(text, "constant", lambda _: constant)


def _function_of_step(path: str, directory: Path | None) -> Callable[..., Any]:
    if "." not in path:
        raise WeightError(f'{path[:60]!r} is not a number, a "lambda step: …", or the dotted path of a function')
    function = resolve(path, directory=directory)
    if inspect.iscoroutinefunction(function):
        raise WeightError(f"{path} is asynchronous; a weight is a plain function of the step")
    try:
        inspect.signature(function).bind(0)
    except TypeError as error:
        raise WeightError(f"{path} cannot be called with the step alone: {error}") from error
    except ValueError:  # built-in functions may have no signature to look at
        pass
    return function


class WeightHistory:
    """One weight with the values it had; see the module's invariants for what stands in for a failure."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self._values: dict[int, tuple[float | None, str | None]] = {}

    def at(self, step: int) -> tuple[float | None, str | None]:
        """The value in force at a step and, if the weight failed there, what was wrong.

        The value is ``None`` if the weight failed there and at all the steps before that were looked at.
        """
        known = self._values.get(step)
        if known is None:
            known = self._evaluate(step)
            if len(self._values) >= MAX_REMEMBERED_STEPS:
                del self._values[next(iter(self._values))]
            self._values[step] = known
        return known

    def _evaluate(self, step: int) -> tuple[float | None, str | None]:
        try:
            return self.weight(step), None
        except WeightError as error:
            return self._before(step), error.message

    def _before(self, step: int) -> float | None:
        """The value in force at the step before, looking back until there is one."""
        for earlier in range(step - 1, max(-1, step - 1 - MAX_LOOK_BACK_STEPS), -1):
            if (known := self._values.get(earlier)) is not None:
                return known[0]
            try:
                return self.weight(earlier)
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

    Raises:
        WeightError: another number of weights than of sources.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[Weight]) -> None:
        self._live: dict[str, WeightHistory] = {}
        self.revision = 0
        """Rises with every change, so that plans made from the table know when they are out of date."""
        self.replace(names, weights)

    def weight(self, source: str) -> Weight:
        """The weight in force: the one set at run time, else the configured one.

        Raises:
            SourceUnknown: no such source.
        """
        return self._history(source).weight

    def _history(self, source: str) -> WeightHistory:
        if source not in self._configured:
            raise SourceUnknown(f"there is no source {source!r}; the sources are {', '.join(self.names)}")
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
            self._live[source] = WeightHistory(weight)
        self.revision += 1

    def replace(self, names: Sequence[str], weights: Sequence[Weight]) -> None:
        """Take over the sources and weights of a changed config; weights set at run time stay in force.

        Raises:
            WeightError: another number of weights than of sources; nothing has changed.
        """
        if len(weights) != len(names):
            raise WeightError(f"{len(weights)} weights for {len(names)} sources: give one for each, in their order")
        self.names = tuple(names)
        # Anew also where the text is the same: the code behind it may have changed.
        self._configured = {name: WeightHistory(weight) for name, weight in zip(names, weights, strict=True)}
        self._live = {name: history for name, history in self._live.items() if name in self._configured}
        self.revision += 1

    def overrides(self) -> dict[str, str]:
        """The weights set at run time, as they were written."""
        return {name: self._live[name].weight.text for name in self.names if name in self._live}

    def at(self, step: int, *, active: Collection[str] | None = None) -> WeightRow:
        """The weights at a step; ``active`` are the sources that take part, ``None`` for all."""
        raw: dict[str, float] = {}
        warnings: list[str] = []
        for name, history in (self._configured | self._live).items():
            value, problem = history.at(step)
            raw[name] = value or 0.0
            if problem is not None:
                kept = "it counts as 0" if value is None else f"its last good value {value:g} is kept"
                warnings.append(f"weight of {name} at step {step}: {problem}; {kept}")
        taking_part = raw if active is None else {name: raw[name] for name in self.names if name in active}
        largest = max(taking_part.values(), default=0.0)
        if largest <= 0.0:
            return WeightRow(step, raw, dict.fromkeys(self.names, 0.0), tuple(warnings))
        # Divided by the largest first: the sum of finite weights can overflow.
        scaled = {name: value / largest for name, value in taking_part.items()}
        total = math.fsum(scaled.values())
        return WeightRow(step, raw, {name: scaled.get(name, 0.0) / total for name in self.names}, tuple(warnings))
