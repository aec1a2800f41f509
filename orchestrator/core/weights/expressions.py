"""``"lambda step: …"`` as a function, by an allow-list over the syntax tree; nothing of the text is ever executed.

Invariants:

* What is not listed here is refused: there are no strings, attributes (but ``math.NAME``), subscripts, keywords or
  comprehensions, and only the functions listed below can be called.
* All values are floats, those of literals and comparisons included (true is 1.0). Nothing can grow: every operation
  takes and gives 8 bytes and ends within microseconds; ``2 ** 10 ** 9`` is an overflow, not a number of 10^9 bits.
  Functions that work on unbounded integers (``factorial``, ``comb``, ``perm``, ``gcd``, …) are left out for that.
* A text has at most :data:`MAX_CHARACTERS` characters and :data:`MAX_NODES` nodes, so an evaluation takes at most as
  many operations. A tree of closures does it, about 0.1 µs an operation.
* Evaluation either returns a float or raises :class:`~orchestrator.errors.WeightError`. The float may be infinite or
  not a number where IEEE arithmetic says so without an error (``1e308 * 10``); ``weights`` refuses these.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, Final

from orchestrator.errors import ExpressionError, WeightError

from .closures import Evaluate, Part, apply, chain, closure, conditional, logical, the_step

__all__ = ["MAX_CHARACTERS", "MAX_NODES", "Expression", "compile_expression"]

MAX_CHARACTERS: Final = 512
"""A schedule that needs more is better read as a function in a file."""

MAX_NODES: Final = 128
"""Names, numbers, operations and calls; some 12 µs an evaluation, and no depth that could end the recursion."""

_Function = tuple[Callable[..., float], int, int]
"""A function with the least and the most arguments that it takes."""

_ANY: Final = MAX_NODES  # as many arguments as fit into an expression


def _returning_float(function: Callable[..., Any]) -> Callable[..., float]:
    """Of functions that return an int or a bool; an int of a float has at most 1,024 bits."""
    return lambda *arguments: float(function(*arguments))


def _round(value: float, digits: float = 0.0) -> float:
    """``round``; ``digits`` is cut to an integer."""
    return float(round(value, int(digits)))


_ONE_FLOAT: Final = (
    "acos acosh asin asinh atan atanh cbrt cos cosh degrees erf erfc exp exp2 expm1 fabs gamma lgamma log10 log1p log2"
    " radians sin sinh sqrt tan tanh ulp"
)
_NOT_RETURNING_FLOATS: Final = "ceil floor trunc isfinite isinf isnan"
_TWO_FLOATS: Final = "atan2 copysign fmod pow remainder"
_CONSTANTS: Final = "e inf nan pi tau"

_MATH: Final[dict[str, float | _Function]] = {
    **{name: (getattr(math, name), 1, 1) for name in _ONE_FLOAT.split()},
    **{name: (_returning_float(getattr(math, name)), 1, 1) for name in _NOT_RETURNING_FLOATS.split()},
    **{name: (getattr(math, name), 2, 2) for name in _TWO_FLOATS.split()},
    **{name: float(getattr(math, name)) for name in _CONSTANTS.split()},
    "hypot": (math.hypot, 1, _ANY),
    "log": (math.log, 1, 2),
}

_BUILT_IN: Final[dict[str, float | _Function]] = {
    "abs": (abs, 1, 1),
    "max": (max, 2, _ANY),
    "min": (min, 2, _ANY),
    "round": (_round, 1, 2),
}

_SHORT: Final = "ceil cos e exp floor log log10 log2 pi pow sin sqrt tanh"
"""What schedules are made of: these may be written without ``math.``."""

_BARE: Final = _BUILT_IN | {name: _MATH[name] for name in _SHORT.split()}

_OPERATORS: Final[dict[type[ast.AST], Callable[..., float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,  # the operator of floats can return complex numbers
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: _returning_float(operator.not_),
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_ALLOWED: Final = (
    "allowed are numbers, the parameter, + - * / // % **, comparisons, and/or/not, `a if b else c`,"
    f" {', '.join(_BUILT_IN)}, and the functions and constants of math that work on floats"
)


class Expression:
    """A compiled expression: called with a step, it gives a float."""

    __slots__ = ("_evaluate", "text")

    def __init__(self, text: str, evaluate: Evaluate) -> None:
        self.text = text
        self._evaluate = evaluate

    def __call__(self, step: float) -> float:
        """The value at a step; it may be infinite or not a number.

        Raises:
            WeightError: a division by zero, an overflow, or an argument outside of a function's domain.
        """
        try:
            return self._evaluate(float(step))
        except (ArithmeticError, ValueError) as error:
            raise WeightError(f"{self.text!r} has no value at step {step}: {error}") from error


def compile_expression(text: str, *, parameter: str = "step") -> Expression:
    """Make a function of ``"lambda step: …"``.

    Args:
        text: the whole lambda.
        parameter: the name that its one parameter has to have.

    Raises:
        ExpressionError: the text is not such a lambda or says something that is not allowed; the message names the
            text, the column (from 1) and what is allowed.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(
            f"an expression may have at most {MAX_CHARACTERS} characters, but {text[:40]!r}… has {len(text)}:"
            " write it as a function in a file and give its dotted path"
        )
    if "#" in text:
        raise ExpressionError(f"{text!r}, column {text.index('#') + 1}: comments are not allowed; {_ALLOWED}")
    text = " ".join(
        text.split()
    )  # one line, so that a column says where; there are no strings whose spaces would matter
    return Expression(text, _Compiler(text, parameter).compile(_parse(text)))


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of spellings such as `1if` that are refused or harmless here
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        place = f", column {error.offset}" if error.offset else ""
        raise ExpressionError(f"{text!r}{place}: {error.msg}; write it as `lambda step: …`") from error
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes, surrogates, nesting beyond the parser
        raise ExpressionError(f"{text!r} cannot be parsed: {error}; {_ALLOWED}") from error


class _Compiler:
    """Turns the nodes of one text into closures; refuses what it does not know."""

    def __init__(self, text: str, parameter: str) -> None:
        self._text = text
        self._parameter = parameter

    def compile(self, root: ast.expr) -> Evaluate:
        expected = ast.arguments([], [ast.arg(self._parameter)], None, [], [], None, [])
        if not isinstance(root, ast.Lambda) or ast.dump(root.args) != ast.dump(expected):
            raise self._refusal(root, f"write it as `lambda {self._parameter}: …`, with exactly this one parameter")
        nodes = sum(isinstance(node, ast.expr) for node in ast.walk(root.body))
        if nodes > MAX_NODES:
            raise self._refusal(root, f"it has {nodes} names, numbers and operations; at most {MAX_NODES} are allowed")
        return closure(self._part(root.body))

    def _part(self, node: ast.expr) -> Part:
        match node:
            case ast.Constant():
                return self._number(node)
            case ast.Name() | ast.Attribute():
                return self._name(node)
            case ast.BinOp(left, symbol, right) if type(symbol) in _OPERATORS:
                return apply(_OPERATORS[type(symbol)], (self._part(left), self._part(right)))
            case ast.UnaryOp(symbol, operand) if type(symbol) in _OPERATORS:
                return apply(_OPERATORS[type(symbol)], (self._part(operand),))
            case ast.BoolOp(symbol, values):
                return logical(isinstance(symbol, ast.And), [self._expression(value) for value in values])
            case ast.Compare():
                return self._comparison(node)
            case ast.IfExp(condition, body, other):
                return conditional(*(self._expression(part) for part in (condition, body, other)))
            case ast.Call():
                return self._call(node)
            case _:
                raise self._refusal(node, f"{type(node).__name__} is not allowed")

    def _expression(self, node: ast.expr) -> Evaluate:
        return closure(self._part(node))

    def _number(self, node: ast.Constant) -> float:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self._refusal(node, f"{ast.unparse(node)[:40]} is not a number")
        try:
            value = float(node.value)
        except OverflowError:
            value = math.inf
        if math.isinf(value):
            raise self._refusal(node, "this number is too large")
        return value

    def _name(self, node: ast.expr) -> Part:
        if isinstance(node, ast.Name) and node.id == self._parameter:
            return the_step
        value = self._known(node)
        if not isinstance(value, float):
            raise self._refusal(node, f"{ast.unparse(node)} is {'unknown' if value is None else 'a function: call it'}")
        return value

    def _known(self, node: ast.expr) -> float | _Function | None:
        """What a name or ``math.NAME`` stands for."""
        match node:
            case ast.Name(name):
                return _BARE.get(name) if name != self._parameter else None
            case ast.Attribute(ast.Name("math"), name):
                return _MATH.get(name)
            case ast.Attribute():
                raise self._refusal(node, "no attributes are allowed except math.NAME")
            case _:
                return None

    def _call(self, node: ast.Call) -> Part:
        entry = self._known(node.func)
        if not isinstance(entry, tuple):
            raise self._refusal(node.func, "this cannot be called")
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self._refusal(node, "keywords and * are not allowed in calls")
        function, least, most = entry
        if not least <= len(node.args) <= most:
            expected = str(least) if least == most else f"at least {least}" if most == _ANY else f"{least} to {most}"
            raise self._refusal(node, f"{ast.unparse(node.func)} takes {expected} arguments, not {len(node.args)}")
        return apply(function, tuple(self._part(argument) for argument in node.args))

    def _comparison(self, node: ast.Compare) -> Evaluate:
        if not all(type(symbol) in _OPERATORS for symbol in node.ops):
            raise self._refusal(node, "`in` and `is` are not allowed")
        symbols = [_OPERATORS[type(symbol)] for symbol in node.ops]
        operands = [self._expression(operand) for operand in node.comparators]
        return chain(self._expression(node.left), list(zip(symbols, operands, strict=True)))

    def _refusal(self, node: ast.expr, reason: str) -> ExpressionError:
        column = len(self._text.encode()[: node.col_offset].decode()) + 1  # the tree counts bytes
        return ExpressionError(f"{self._text!r}, column {column}: {reason}; {_ALLOWED}")
