"""From what the config says of a reward to the reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.dotted import resolve
from orchestrator.errors import DottedPathError

from .builtin import BUILT_IN_REWARDS, BuiltInReward
from .functions import AsyncReward, ProcessReward
from .port import Reward

__all__ = ["build_reward"]


def build_reward(
    spec: str,
    *,
    key: str | None = None,
    timeout_s: float = 30.0,
    concurrency: int = 16,
    directory: Path | None = None,
) -> Reward:
    """Build the reward of one source. No process is started yet; a dotted path is imported here, once.

    Args:
        spec: ``exact_match``, ``contains``, or the dotted path of a function ``(sample, prompt)``, synchronous or
            asynchronous, that returns a number or a dictionary.
        key: which entry of a returned dictionary is the reward; the whole dictionary becomes its ``detail``.
        timeout_s: deadline of one call of the function in seconds.
        concurrency: calls at a time; for a synchronous function also processes.
        directory: where a dotted path is looked up beside ``sys.path``.

    Raises:
        DottedPathError: ``spec`` is neither a built-in nor leads to something callable.
        ValueError: a parameter is out of range, or a key is given for a built-in, which has none.
    """
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ValueError(f"timeout_s is {timeout_s}, a number of seconds above 0 is expected")
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}, it has to be 1 or more")
    if spec in BUILT_IN_REWARDS:
        if key is not None:
            raise ValueError(f"{spec} returns a number; key {key!r} is for functions that return a dictionary")
        return BuiltInReward(spec)
    if "." not in spec:
        raise DottedPathError(
            f"{spec!r} is neither a built-in reward ({', '.join(BUILT_IN_REWARDS)}) nor the dotted path of a function"
        )
    function = resolve(spec, directory=directory)
    if _is_async(function):
        return AsyncReward(spec, function, key=key, timeout_s=timeout_s, concurrency=concurrency)
    return ProcessReward(spec, directory=directory, key=key, timeout_s=timeout_s, concurrency=concurrency)


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling gives a coroutine; objects with an asynchronous ``__call__`` included."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
