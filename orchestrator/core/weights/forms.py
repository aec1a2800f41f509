"""One weight in any of its forms: a number, ``"lambda step: …"``, or the dotted path of a function.

Invariants:

* A :class:`Weight` gives a finite number >= 0 or raises WeightError, whatever a user's function returns or raises.
* What a function is given is settled when it is parsed: the step; or the step and ``stats``, where it has a required
  parameter of that name (an *adaptive* weight); or ``stats`` alone, where that is its only one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from orchestrator.core.dotted import resolve
from orchestrator.core.observations import NO_STATS, SourceStats
from orchestrator.errors import WeightError

from .expressions import compile_expression

__all__ = ["Weight", "WeightKind", "parse_weight"]

WeightKind = Literal["constant", "lambda", "function", "adaptive"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One source's weight: called with a step, it gives a finite number >= 0.

    ``text`` is how it was written, ``kind`` which of the forms that is; an ``adaptive`` one is a function that also
    takes statistics, as ``stats``.
    """

    text: str
    kind: WeightKind
    function: Callable[..., Any]

    @property
    def is_adaptive(self) -> bool:
        """Whether it depends on more than the step."""
        return self.kind == "adaptive"

    def __call__(self, step: int, stats: SourceStats = NO_STATS) -> float:
        """The weight at a step; ``stats`` matter to adaptive ones alone.

        Raises:
            WeightError: the result is not a finite number >= 0, or the function raised.
        """
        try:
            result = self.function(step, stats) if self.kind == "adaptive" else self.function(step)
        except (WeightError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a CancelledError that it lets out is not ours: nothing is awaited here
            message = f"{self.text} raised {type(error).__name__} at step {step}: {error}"
            raise WeightError(message) from error
        if type(result) is float and 0.0 <= result < math.inf:
            return result
        value = _usable(result)
        if value is None:
            raise WeightError(f"{self.text} at step {step} gives {str(result)[:60]}; {_EXPECTED}")
        return value


_EXPECTED: Final = "expected a finite number of at least 0"


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
        raise WeightError(f"a weight must be a number, a lambda or a dotted path, not {str(value)[:60]!r}")
    text = str(value).strip() if isinstance(value, str) else f"{value!r:.60}"
    if text.startswith("lambda"):
        return Weight(text, "lambda", compile_expression(text).__call__)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        return _function_weight(text, directory)
    constant = _usable(number)
    if constant is None:
        raise WeightError(f"the weight is {number}; {_EXPECTED}")
    return Weight(text, "constant", lambda _: constant)


def _function_weight(path: str, directory: Path | None) -> Weight:
    if "." not in path:
        raise WeightError(f'{path[:60]!r} is not a number, a "lambda step: …", or the dotted path of a function')
    function = resolve(path, directory=directory)
    if inspect.iscoroutinefunction(function):
        raise WeightError(f"{path} is asynchronous; a weight must be a plain function of the step")
    try:
        signature = inspect.signature(function)
    except ValueError:  # built-in functions may have no signature to look at
        return Weight(path, "function", function)
    stats = signature.parameters.get("stats")
    if (
        stats is not None
        and stats.default is stats.empty
        and stats.kind not in (stats.VAR_POSITIONAL, stats.VAR_KEYWORD)
    ):
        return Weight(path, "adaptive", _adaptive(path, function, signature))
    try:
        signature.bind(0)
    except TypeError as error:
        raise WeightError(f"{path} cannot be called with only the step: {error}") from error
    return Weight(path, "function", function)


def _adaptive(path: str, function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """The function as one of step and statistics."""
    takes_step = next(iter(signature.parameters)) != "stats"
    try:
        signature.bind(*([0] if takes_step else []), stats=NO_STATS)
    except TypeError as error:
        raise WeightError(f"{path} cannot be called with the step and stats: {error}") from error

    def call(step: int, stats: SourceStats) -> Any:
        return function(step, stats=stats) if takes_step else function(stats=stats)

    return call
