"""From what the config says of a reward to the reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from orchestrator.core.dotted import resolve
from orchestrator.errors import DottedPathError

from .builtin import BUILT_IN_REWARDS, BuiltInReward
from .functions import AsyncReward, ProcessReward
from .packages import PACKAGE_REWARDS, missing_package
from .port import Reward

__all__ = ["build_reward"]


def build_reward(
    path: str | None = None,
    *,
    kind: Literal["function", "http"] = "function",
    url: str | None = None,
    key: str | None = None,
    timeout_s: float = 30.0,
    concurrency: int = 16,
    group: bool = False,
    api_key_env: str | None = None,
    directory: Path | None = None,
) -> Reward:
    """Build the reward of one source. Nothing is started or contacted yet; a dotted path is imported here, once.

    Args:
        path: of ``kind`` function: a name that is built in, or the dotted path of a function ``(sample, prompt)``,
            synchronous or asynchronous, that returns a number or a dictionary; with ``group`` of a function
            ``(samples, prompt)`` that returns a list of these.
        kind: ``function`` or ``http``.
        url: of ``kind`` http: where to post.
        key: which entry of a returned dictionary is the reward; the whole dictionary becomes its ``detail``.
        timeout_s: deadline of one call in seconds.
        concurrency: calls at a time; for a synchronous function also processes.
        group: score all samples of a group in one call.
        api_key_env: of ``kind`` http: environment variable that holds the server's key.
        directory: where a dotted path is looked up beside ``sys.path``.

    Raises:
        DottedPathError: ``path`` is neither built in nor leads to something callable.
        ValueError: a parameter is out of range or does not go with the others, a package is not installed, or the
            environment has no key.
    """
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ValueError(f"timeout_s is {timeout_s}, a number of seconds above 0 is expected")
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}, it has to be 1 or more")
    if kind == "http":
        if url is None or path is not None:
            raise ValueError("a reward of kind http has a url, and no path")
        from .http import HttpReward  # here: worker processes import this room too, and need no HTTP client

        return HttpReward(
            url, key=key, timeout_s=timeout_s, concurrency=concurrency, group=group, api_key_env=api_key_env
        )
    if path is None or url is not None:
        raise ValueError("a reward of kind function has a path, and no url")
    if path in BUILT_IN_REWARDS or path in PACKAGE_REWARDS:
        return _built_in(path, key=key, timeout_s=timeout_s, concurrency=concurrency, group=group)
    if "." not in path:
        raise DottedPathError(
            f"{path!r} is neither a built-in reward ({', '.join((*BUILT_IN_REWARDS, *PACKAGE_REWARDS))}) nor the "
            "dotted path of a function"
        )
    function = resolve(path, directory=directory)
    if _is_async(function):
        return AsyncReward(path, function, key=key, timeout_s=timeout_s, concurrency=concurrency, group=group)
    return ProcessReward(
        path,
        function=path,
        directory=directory,
        key=key,
        timeout_s=timeout_s,
        concurrency=concurrency,
        group=group,
    )


def _built_in(name: str, *, key: str | None, timeout_s: float, concurrency: int, group: bool) -> Reward:
    if key is not None:
        raise ValueError(f"{name} returns a number; key {key!r} is for functions that return a dictionary")
    if group:
        raise ValueError(f"{name} scores each sample by itself; group is for functions of all samples of a group")
    if name in BUILT_IN_REWARDS:
        return BuiltInReward(name)
    if (missing := missing_package(name)) is not None:
        raise ValueError(missing)
    package = PACKAGE_REWARDS[name]
    return ProcessReward(
        name,
        function=package.function,
        directory=None,
        key="score",
        timeout_s=timeout_s,
        concurrency=concurrency,
        group=False,
        environment=package.environment,
    )


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling gives a coroutine; objects with an asynchronous ``__call__`` included."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
