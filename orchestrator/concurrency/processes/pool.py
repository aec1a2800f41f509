"""The processes of one service: started when calls need them, used again, replaced when they fail.

Invariants:

* There are as many processes as there were calls at a time; whoever calls bounds that.
* A call that fails, outlives its deadline or is cancelled costs its process, and what that has started; the next call
  has another.
* The deadline of a call counts from when the process is asked; starting it has a deadline of its own.
* After :meth:`ProcessPool.aclose` no process is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from .messages import ProcessFailed, ProcessTimeout
from .process import ServiceProcess

__all__ = ["ProcessPool"]


class ProcessPool:
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
        self._processes: set[ServiceProcess] = set()
        self._idle: list[ServiceProcess] = []  # the last used is used next, so that its caches are warm
        self._closed = False
        self.started = 0

    @property
    def alive(self) -> int:
        """Processes of now."""
        return len(self._processes)

    async def call(self, message: bytes) -> dict[str, Any]:
        """Ask an idle process, or a new one.

        Raises:
            ServiceRefused, ProcessTimeout, ProcessFailed: see there; no process is left of that call.
        """
        return await self._ask(await self._take(), message)

    async def _take(self) -> ServiceProcess:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            await self._drop(process)
        self._check_open()
        process = await ServiceProcess.start(
            service=self._service, options=self._options, environment=self._environment
        )
        self.started += 1
        self._processes.add(process)
        if self._closed:
            await self._drop(process)
        self._check_open()
        return process

    def _check_open(self) -> None:
        if self._closed:
            raise ProcessFailed("it was closed")

    async def _ask(self, process: ServiceProcess, message: bytes) -> dict[str, Any]:
        answered = False
        try:
            with anyio.move_on_after(self._timeout_s):
                answer = await process.call(message)
                answered = True
                return answer
        finally:
            if answered and not self._closed:
                self._idle.append(process)
            else:
                await self._drop(process)
        raise ProcessTimeout(f"no answer within {self._timeout_s:g} s; its worker process was killed")

    async def _drop(self, process: ServiceProcess) -> None:
        self._processes.discard(process)
        await process.kill()

    async def aclose(self) -> None:
        """Kill all processes; calls under way fail."""
        self._closed = True
        self._idle.clear()
        while self._processes:
            await self._drop(next(iter(self._processes)))
