"""Rewards that are functions of the user's, of one sample or of a whole group, and what a config says of them.

``(sample, prompt) -> float | int | bool | dict``, or ``(samples, prompt)`` and a list of these.

Invariants:

* A synchronous function runs in worker processes (``processes.py``).
* An asynchronous function runs in the loop, in a task of its own: it is for waiting on something else, and must not
  compute for long. Whatever it raises is a failure of that call, a cancellation that is not ours included. A call that
  does not end is given up. It is given the samples themselves and must not change them.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestrator.concurrency.foreign import ForeignError, ForeignRefused, ForeignTasks, ForeignTimeout
from orchestrator.core.dotted import resolve
from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.records import Prompt, Sample
from orchestrator.schema.fields import is_dotted_path, nearest, problem

from .bounded import BoundedReward
from .builtin.spec import REWARD_NAMES
from .port import Reward, RewardResult, RewardStatistics
from .processes import ProcessReward
from .spec import RewardSpec
from .verdict import describe_exception, to_results

__all__ = ["AsyncReward", "FunctionSpec"]


class AsyncReward(BoundedReward):
    """A :class:`~orchestrator.rewards.port.Reward` that awaits a function in the loop.

    Args:
        name: the dotted path of the function, for messages.
        function: the function itself.
        key: which entry of a returned dictionary is the reward.
        timeout_s: deadline of one call in seconds.
        concurrency: calls at a time.
        group: whether the function takes all samples of a group.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any, Prompt], Awaitable[Any]],
        *,
        key: str | None,
        timeout_s: float,
        concurrency: int,
        group: bool,
    ) -> None:
        super().__init__(name, "function", concurrency=concurrency, group=group)
        self._function = function
        self._key = key
        self._timeout_s = timeout_s
        self._tasks = ForeignTasks(f"reward {name}")

    async def _score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        given = list(samples) if self._group else samples[0]
        try:
            value = await self._tasks.call(lambda: self._function(given, prompt), timeout_s=self._timeout_s)
        except ForeignTimeout as timeout:
            how = "it ignores cancellation and runs on" if timeout.was_abandoned else "the call was cancelled"
            raise RewardTimeout(f"reward {self._name}: no answer within {self._timeout_s:g} s; {how}") from timeout
        except ForeignRefused as refused:
            raise RewardError(
                f"reward {self._name}: {refused}; make it end when it is cancelled, and restart the daemon"
            ) from refused
        except ForeignError as raised:
            if isinstance(raised.error, RewardError):
                raise raised.error from None
            raise RewardError(f"reward {self._name}: it raised {describe_exception(raised.error)}") from raised.error
        return to_results(self._name, value, self._key, len(samples) if self._group else None)

    def statistics(self) -> RewardStatistics:
        """Counts since the start; ``extra`` also has ``abandoned``: calls that ignored cancellation and run on."""
        return self._tally.statistics(waiting=self._limiter.statistics().tasks_waiting, abandoned=self._tasks.abandoned)

    async def aclose(self) -> None:
        """Nothing is held."""


class FunctionSpec(RewardSpec):
    """A reward that is a function of the user's."""

    known_as = "functions"

    kind: Literal["function"] = Field(
        "function", description="function: a function of your own, by its dotted path; optional."
    )
    path: str = Field(description="Dotted path of a function (sample, prompt), relative to the working directory.")

    @model_validator(mode="before")
    @classmethod
    def _has_a_path(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("path") is None:
            raise problem(
                "the reward has no path", f"set path to one of {', '.join(REWARD_NAMES)}, or package.module.f"
            )
        return raw

    @model_validator(mode="after")
    def _is_dotted(self) -> FunctionSpec:
        if not is_dotted_path(self.path):
            near = nearest(self.path, REWARD_NAMES)
            raise problem(
                f"{self.path!r} is neither a built-in reward nor a dotted path",
                f"did you mean {near}?"
                if near
                else f"built-in are {', '.join(REWARD_NAMES)}; or write package.module.f",
            )
        return self

    @property
    def name(self) -> str:
        """The dotted path."""
        return self.path

    def build(self, *, directory: Path | None) -> Reward:
        """In the daemon's loop if the function is asynchronous, else in worker processes.

        Raises:
            DottedPathError: ``path`` leads to nothing that can be called.
        """
        function = resolve(self.path, directory=directory)
        if _is_async(function):
            return AsyncReward(
                self.path,
                function,
                key=self.key,
                timeout_s=self.timeout_s,
                concurrency=self.concurrency,
                group=self.group,
            )
        return ProcessReward(
            self.path,
            function=self.path,
            directory=directory,
            key=self.key,
            timeout_s=self.timeout_s,
            concurrency=self.concurrency,
            group=self.group,
        )


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling gives a coroutine; objects with an asynchronous ``__call__`` included."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
