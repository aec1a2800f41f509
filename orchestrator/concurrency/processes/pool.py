"""The worker processes of one service: started when calls need them, used again, replaced when they fail.

Invariants:

* There are as many processes as there were calls at a time; whoever calls bounds that.
* A call that fails, outlives its deadline or is cancelled costs its process, and what that has started; the next call
  has another.
* The deadline of a call counts from when the process is asked; starting it has a deadline of its own.
* After :meth:`WorkerPool.aclose` no process is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from .messages import WorkerFailed, WorkerTimeout
from .process import WorkerProcess

__all__ = ["WorkerPool"]


class WorkerPool:
    """See the module's invariants.

    Args:
        service: the dotted path of the service.
        options: given to it in each process.
        timeout_s: deadline of one call in seconds.
        environment: variables that the processes have beside the daemon's own.
    """

    def __init__(
        self, service: str, options: dict[str, Any], *, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._service = service
        self._options = options
        self._timeout_s = timeout_s
        self._environment = environment or {}
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []  # the last used is used next, so that its caches are warm
        self._closed = False
        self.started = 0

    @property
    def alive(self) -> int:
        """Processes of now."""
        return len(self._workers)

    async def call(self, message: bytes) -> dict[str, Any]:
        """Ask an idle process, or a new one.

        Raises:
            WorkerRefused, WorkerTimeout, WorkerFailed: see there; no process is left of that call.
        """
        return await self._ask(await self._take(), message)

    async def _take(self) -> WorkerProcess:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await self._drop(worker)
        self._check_open()
        worker = await WorkerProcess.start(service=self._service, options=self._options, environment=self._environment)
        self.started += 1
        self._workers.add(worker)
        if self._closed:
            await self._drop(worker)
        self._check_open()
        return worker

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerFailed("it was closed")

    async def _ask(self, worker: WorkerProcess, message: bytes) -> dict[str, Any]:
        answered = False
        try:
            with anyio.move_on_after(self._timeout_s):
                answer = await worker.call(message)
                answered = True
                return answer
        finally:
            if answered and not self._closed:
                self._idle.append(worker)
            else:
                await self._drop(worker)
        raise WorkerTimeout(f"no answer within {self._timeout_s:g} s; its worker process was killed")

    async def _drop(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        await worker.kill()

    async def aclose(self) -> None:
        """Kill all processes; calls under way fail."""
        self._closed = True
        self._idle.clear()
        while self._workers:
            await self._drop(next(iter(self._workers)))
