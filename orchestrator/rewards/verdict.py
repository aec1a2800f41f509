"""What a reward function returned or raised, or a reward server answered, put into our words.

Invariants:

* A value is a finite number or an error; a text, ``None``, a NaN never become a number.
* ``detail`` is plain JSON of a limited size, because it travels in the header of its group's frame.
"""

from __future__ import annotations

import math
import traceback
from numbers import Real
from typing import Any, Final

import orjson

from orchestrator.errors import RewardError

from .port import RewardResult

__all__ = ["MAX_DETAIL_BYTES", "describe_exception", "to_result", "to_results"]

MAX_DETAIL_BYTES: Final = 16 << 10
"""16 KiB of JSON: the details of a group of 32 samples fill half of the 1 MiB that a frame's header may have."""

MAX_DESCRIPTION_CHARS: Final = 2000
"""Of an exception: some carry whole documents in their message."""


def to_results(function: str, value: Any, key: str | None, count: int | None) -> list[RewardResult]:
    """Turn what ``function`` returned for one sample, or for ``count`` samples of a group, into results.

    Args:
        function: its name, for the error message.
        value: for one sample see :func:`to_result`; for a group a list of such values, one for each sample and in their
            order, or a dictionary that has the list under ``key``.
        key: see :func:`to_result`.
        count: number of samples; ``None``: one sample and no list.

    Raises:
        RewardError: anything else, a list of another length included.
    """
    if count is None:
        return [to_result(function, value, key)]
    if isinstance(value, dict):
        value = _entry(function, value, key)
    values = value.tolist() if hasattr(value, "tolist") else value  # an array of numpy's or torch's
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {function}: it returned {value!r:.200} of type {type(value).__name__}; for a group it must return "
            f"a list of {count} rewards, one for each sample"
        )
    if len(values) != count:
        raise RewardError(f"reward {function}: it returned {len(values)} rewards for {count} samples")
    return [to_result(function, each, key) for each in values]


def to_result(function: str, value: Any, key: str | None) -> RewardResult:
    """Turn what ``function`` returned into a result.

    Args:
        function: its name, for the error message.
        value: a number (anything that is a ``numbers.Real``, numpy's included), or a dictionary.
        key: which entry of a dictionary is the number; not looked at where the function returned a number.

    Raises:
        RewardError: anything else, a number that is not finite, or a dictionary that is too large or not JSON.
    """
    if not isinstance(value, dict):
        return RewardResult(_number(function, "it returned", value))
    number = _number(function, f"it returned under {key!r}", _entry(function, value, key))
    return RewardResult(number, _plain(function, value))


def _entry(function: str, value: dict[Any, Any], key: str | None) -> Any:
    keys = ", ".join(repr(name) for name in value)[:MAX_DESCRIPTION_CHARS] or "none"
    if key is None:
        raise RewardError(
            f"reward {function}: it returned a dictionary; set `key` to the one of {keys} that is the reward"
        )
    if key not in value:
        raise RewardError(f"reward {function}: it returned a dictionary without the key {key!r}; its keys: {keys}")
    return value[key]


def describe_exception(error: BaseException) -> str:
    """An exception as ``Type: message (file:line)``, the place being where it was raised."""
    # format_exception_only copes with exceptions whose own __str__ fails.
    text = "".join(traceback.format_exception_only(error)).strip()[:MAX_DESCRIPTION_CHARS]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _number(function: str, what: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise RewardError(f"reward {function}: {what} {value!r:.200} of type {type(value).__name__}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(f"reward {function}: {what} {number}; expected a finite number")
    return number


def _plain(function: str, value: dict[Any, Any]) -> dict[str, Any]:
    """The dictionary as JSON would give it back; a NaN beside the reward becomes ``None``."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError as error:
        raise RewardError(f"reward {function}: its dictionary cannot be written as JSON: {error}") from error
    if len(text) > MAX_DETAIL_BYTES:
        raise RewardError(
            f"reward {function}: its dictionary has {len(text)} bytes of JSON; at most {MAX_DETAIL_BYTES} are allowed"
        )
    plain: dict[str, Any] = orjson.loads(text)
    return plain
