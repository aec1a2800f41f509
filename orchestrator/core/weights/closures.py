"""The operations of an expression as closures over its step (``expressions.py``).

Invariants:

* What does not depend on the step is computed once, when the closure is made. Where that fails it fails at each
  evaluation, and only if the value is asked for, as in Python.
* Closures call each other and the functions that they were made with, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Evaluate", "Part", "apply", "chain", "closure", "conditional", "logical", "the_step"]

Evaluate = Callable[[float], float]
"""Gives the value at a step."""

Part = float | Evaluate
"""What a node becomes: its value, where that is the same at every step, or what computes it."""


def the_step(step: float) -> float:
    """The parameter itself."""
    return step


def closure(part: Part) -> Evaluate:
    """The part as something to call."""
    return part if callable(part) else lambda _: part


def apply(function: Callable[..., float], operands: tuple[Part, ...]) -> Part:
    """A function of its operands: computed now if all are values, else a closure that calls as little as it can."""
    values = [operand for operand in operands if isinstance(operand, float)]
    if len(values) == len(operands):
        try:
            return function(*values)
        except (ArithmeticError, ValueError):
            return lambda _: function(*values)
    if len(operands) == 2:
        return _apply_to_two(function, *operands)
    evaluates = [closure(operand) for operand in operands]
    if len(evaluates) == 1:
        (only,) = evaluates
        return lambda step: function(only(step))
    return lambda step: function(*[operand(step) for operand in evaluates])


def _apply_to_two(function: Callable[..., float], left: Part, right: Part) -> Evaluate:
    if isinstance(left, float):
        of_right = closure(right)
        return lambda step: function(left, of_right(step))
    if isinstance(right, float):
        if left is the_step:
            return lambda step: function(step, right)
        return lambda step: function(left(step), right)
    return lambda step: function(left(step), right(step))


def logical(is_and: bool, operands: Sequence[Evaluate]) -> Evaluate:
    """``and`` and ``or`` as Python has them: the value of the operand that decided."""

    def evaluate(step: float) -> float:
        value = 0.0
        for operand in operands:
            value = operand(step)
            if bool(value) is not is_and:
                break
        return value

    return evaluate


def conditional(condition: Evaluate, body: Evaluate, other: Evaluate) -> Evaluate:
    """``body if condition else other``, of which one is evaluated."""
    return lambda step: body(step) if condition(step) else other(step)


def chain(first: Evaluate, links: Sequence[tuple[Callable[..., float], Evaluate]]) -> Evaluate:
    """``a < b <= c``: true when every link is; ends at the first that is not."""

    def evaluate(step: float) -> float:
        left = first(step)
        for compare, operand in links:
            right = operand(step)
            if not compare(left, right):
                return 0.0
            left = right
        return 1.0

    return evaluate
