"""Coroutines of users' code, run as what they are: code that may raise anything, cancel anything, or never end.

Invariants:

* A foreign coroutine runs in a task of its own. Nothing that it raises leaves :meth:`ForeignTasks.call` as it is: a
  cancellation that is not ours, ``SystemExit``, ``GeneratorExit`` and groups of them become :class:`ForeignError`.
* Our own cancellation and our own deadline are never confused with it. The call ends at once, whatever the coroutine
  does: it is cancelled ``CANCELLATIONS`` times, and then abandoned and counted.
* Tasks that were abandoned are kept referenced until they end, and are bounded: above ``MAX_ABANDONED`` a new call is
  refused, because each of them may still use the loop.
* The end of the process does not wait for them: see :func:`unfinished_tasks`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Generic, TypeVar

__all__ = [
    "CANCELLATIONS",
    "MAX_ABANDONED",
    "ForeignError",
    "ForeignRefused",
    "ForeignTasks",
    "ForeignTimeout",
    "foreign_name",
    "unfinished_tasks",
]

CANCELLATIONS: Final = 3
"""A retry loop with a bare ``except`` swallows one; code that swallows three in a row does not mean to end."""

CANCELLATION_S: Final = 0.1
"""From one cancellation to the next: enough for clean-up that does not wait for a network."""

MAX_ABANDONED: Final = 256
"""Of one :class:`ForeignTasks`: each is a task that never ends, so more would only slow the loop down."""

T = TypeVar("T")


class ForeignError(Exception):
    """The coroutine raised something; ``error`` is what."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)  # its own words may fail to come
        self.error = error


class ForeignTimeout(Exception):
    """The deadline came first; ``was_abandoned``: the coroutine swallowed its cancellations and runs on."""

    def __init__(self, *, was_abandoned: bool) -> None:
        super().__init__("the deadline passed")
        self.was_abandoned = was_abandoned


class ForeignRefused(Exception):
    """Too many earlier calls were abandoned and have not ended."""


@dataclass(slots=True)
class _Outcome(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


async def _contained(name: str, function: Callable[[], Awaitable[T]]) -> _Outcome[T]:
    """Await the foreign coroutine; ``name`` is for :func:`foreign_name`, which finds it on a stack.

    ``SystemExit`` and ``KeyboardInterrupt`` that a task raises end the loop itself, so they must not leave it.
    """
    try:
        return _Outcome(value=await function())
    except BaseException as error:  # noqa: BLE001 - the outcome is raised where the call is made
        return _Outcome(error=error)


class ForeignTasks:
    """Runs foreign coroutines and counts those that would not end.

    Args:
        name: whose code it is, for stacks and for tasks' names.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.abandoned_total = 0
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def abandoned(self) -> int:
        """How many of those abandoned still run."""
        return len(self._abandoned)

    async def call(self, function: Callable[[], Awaitable[T]], *, timeout_s: float) -> T:
        """What the coroutine returns.

        Args:
            function: makes the awaitable; called within the task.
            timeout_s: deadline in seconds; infinite: none.

        Raises:
            ForeignError: it raised.
            ForeignTimeout: it did not end in time.
            ForeignRefused: too many calls that were abandoned still run.
        """
        if len(self._abandoned) >= MAX_ABANDONED:
            raise ForeignRefused(f"{len(self._abandoned)} earlier calls were abandoned and are still running")
        task = asyncio.create_task(_contained(self.name, function), name=f"foreign code: {self.name}")
        try:
            done, _ = await asyncio.wait({task}, timeout=None if math.isinf(timeout_s) else max(timeout_s, 0.0))
            if not done and not await self._ended(task):
                raise ForeignTimeout(was_abandoned=self._abandon(task))
        except asyncio.CancelledError:
            self._let_go(task)
            raise
        if not done:
            raise ForeignTimeout(was_abandoned=False)
        outcome = task.result()
        if outcome.error is not None:
            raise ForeignError(outcome.error) from outcome.error
        return outcome.value  # type: ignore[return-value]  # T may be None

    async def _ended(self, task: asyncio.Task[Any]) -> bool:
        """Cancel it a few times; whether it has ended."""
        for _ in range(CANCELLATIONS):
            task.cancel()
            if (await asyncio.wait({task}, timeout=CANCELLATION_S))[0]:
                return True
        return False

    def _abandon(self, task: asyncio.Task[Any]) -> bool:
        self.abandoned_total += 1
        self._keep(task)
        return True

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        """The caller was cancelled: it does not wait; the coroutine is cancelled until it ends, or given up."""
        self._keep(task)
        left = CANCELLATIONS

        def cancel() -> None:
            nonlocal left
            if task.done():
                return
            if left == 0:
                self.abandoned_total += 1
                return
            left -= 1
            task.cancel()
            loop.call_later(CANCELLATION_S, cancel)

        loop = asyncio.get_running_loop()
        cancel()

    def _keep(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)


def foreign_name(frame: FrameType | None) -> str | None:
    """Whose foreign code is at work in this frame or one that it was called from; ``None``: nobody's."""
    while frame is not None:
        if frame.f_code is _contained.__code__:
            return str(frame.f_locals["name"])
        frame = frame.f_back
    return None


async def unfinished_tasks(*, patience_s: float = 1.0) -> list[str]:
    """Cancel what is left of all tasks but the current one; the names of those that do not end.

    A loop that is closed waits for every task, so one that swallows cancellation keeps its process alive for ever.
    Whoever calls this ends the process by itself where a name is returned.
    """
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        _, rest = await asyncio.wait(rest, timeout=patience_s)
    return sorted(task.get_name() for task in rest)
