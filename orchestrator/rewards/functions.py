"""Rewards that are functions of the user's: ``(sample, prompt) -> float | int | bool | dict``.

Invariants:

* Not more than ``concurrency`` calls run at a time; the others wait for their turn, and their deadline with them: it
  counts from when the function is called, and neither waiting nor the start of a process is part of it.
* A synchronous function runs in a process of its own; hanging or crashing costs that process and that call.
* An asynchronous function runs in the loop: it is for waiting on something else, and must not compute for long. It
  is given the sample itself and must not change it.
* Nothing is retried here; the producer decides what becomes of a sample without a reward.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.records import Prompt, Sample

from .port import RewardResult, RewardStatistics
from .process import WorkerProcess
from .tally import Tally
from .verdict import describe_exception, to_result
from .wire import encode_call

__all__ = ["AsyncReward", "ProcessReward"]


class AsyncReward:
    """A :class:`~orchestrator.rewards.port.Reward` that awaits a function in the loop.

    Args:
        name: the dotted path of the function, for messages.
        function: the function itself.
        key: which entry of a returned dictionary is the reward.
        timeout_s: deadline of one call in seconds.
        concurrency: calls at a time.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Sample, Prompt], Awaitable[Any]],
        *,
        key: str | None,
        timeout_s: float,
        concurrency: int,
    ) -> None:
        self._name = name
        self._function = function
        self._key = key
        self._timeout_s = timeout_s
        self._limiter = anyio.CapacityLimiter(concurrency)
        self._tally = Tally()

    async def score(self, sample: Sample, prompt: Prompt) -> RewardResult:
        """The reward of a finished sample; see the port."""
        async with self._limiter:
            with self._tally.call():
                return await self._call(sample, prompt)

    async def _call(self, sample: Sample, prompt: Prompt) -> RewardResult:
        with anyio.move_on_after(self._timeout_s):
            try:
                value = await self._function(sample, prompt)
            except RewardError:
                raise
            except (Exception, SystemExit) as error:
                raise RewardError(f"reward {self._name}: it raised {describe_exception(error)}") from error
            return to_result(self._name, value, self._key)
        raise RewardTimeout(f"reward {self._name}: no answer within {self._timeout_s:g} s; the call was cancelled")

    def statistics(self) -> RewardStatistics:
        """Counts since the start; ``extra`` has ``oldest_running_s`` and ``waiting`` (calls without a turn yet)."""
        return self._tally.statistics(waiting=self._limiter.statistics().tasks_waiting)

    async def aclose(self) -> None:
        """Nothing is held."""


class ProcessReward:
    """A :class:`~orchestrator.rewards.port.Reward` that calls a function in worker processes.

    Processes are started when calls need them, at most ``concurrency``, and are used again until they fail, are
    cancelled in a call, or the reward is closed. Cancelling a call kills its process.

    Args:
        name: the dotted path of the function.
        directory: where the path is looked up beside ``sys.path``; ``None``: nowhere else.
        key: which entry of a returned dictionary is the reward.
        timeout_s: deadline of one call in seconds.
        concurrency: processes, and so calls at a time.
    """

    def __init__(
        self, name: str, *, directory: Path | None, key: str | None, timeout_s: float, concurrency: int
    ) -> None:
        self._name = name
        self._directory = directory
        self._key = key
        self._timeout_s = timeout_s
        self._limiter = anyio.CapacityLimiter(concurrency)
        self._tally = Tally()
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []  # the last used is used next, so that its caches are warm
        self._started = 0
        self._closed = False

    async def score(self, sample: Sample, prompt: Prompt) -> RewardResult:
        """The reward of a finished sample; see the port."""
        async with self._limiter:
            with self._tally.call():
                try:
                    call = encode_call(sample, prompt)
                except (TypeError, ValueError) as error:
                    raise RewardError(f"reward {self._name}: it cannot be called: {error}") from error
                answer = await self._ask(await self._take_worker(), call)
                if "error" in answer:
                    raise RewardError(answer["error"])
                return RewardResult(answer["value"], answer["detail"])

    async def _take_worker(self) -> WorkerProcess:
        """An idle process, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await self._drop(worker)
        self._check_open()
        worker = await WorkerProcess.start(function=self._name, directory=self._directory, key=self._key)
        self._started += 1
        self._workers.add(worker)
        if self._closed:
            await self._drop(worker)
        self._check_open()
        return worker

    def _check_open(self) -> None:
        if self._closed:
            raise RewardError(f"reward {self._name}: it was closed")

    async def _ask(self, worker: WorkerProcess, call: bytes) -> dict[str, Any]:
        answered = False
        try:
            with anyio.move_on_after(self._timeout_s):
                answer = await worker.call(call)
                answered = True
                return answer
        finally:
            if answered and not self._closed:
                self._idle.append(worker)
            else:
                await self._drop(worker)
        raise RewardTimeout(
            f"reward {self._name}: no answer within {self._timeout_s:g} s; its worker process was killed"
        )

    async def _drop(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        await worker.kill()

    def statistics(self) -> RewardStatistics:
        """Counts since the start.

        ``extra`` has ``oldest_running_s``, ``waiting`` (calls without a turn yet), ``processes`` (alive) and
        ``processes_started`` (since the start; far above ``concurrency`` when a function keeps hanging or crashing).
        """
        return self._tally.statistics(
            waiting=self._limiter.statistics().tasks_waiting,
            processes=len(self._workers),
            processes_started=self._started,
        )

    async def aclose(self) -> None:
        """Kill all processes; calls under way fail. The daemon ends its producers first."""
        self._closed = True
        self._idle.clear()
        while self._workers:
            await self._drop(next(iter(self._workers)))
