"""A sink that uses a third-party package, in a process of its own.

Invariants:

* The package is never imported in the daemon: its memory, threads and signals belong to its own process, and a call
  that hangs costs that process only.
* A lost process is restarted with the next call, and continues the same run of the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from orchestrator.concurrency.processes import ProcessFailed, ProcessPool
from orchestrator.concurrency.processes.messages import encode_message

from .feed import SinkFailed, StepFigures, as_json

__all__ = ["CALL_DEADLINE_S", "PackageSink"]

CALL_DEADLINE_S: Final = 60.0
"""For a call with up to 32 steps: servers answer in a second or two, and a proxy's own deadline is often 30 s."""

SERVICE: Final = "orchestrator.sinks.service.serve"


class PackageSink:
    """A :class:`~orchestrator.sinks.feed.StepSink`; see the module's invariants.

    Args:
        options: see :func:`orchestrator.sinks.service.serve`.
        environment: variables that the process gets in addition to the daemon's own.
        call_deadline_s: see :data:`CALL_DEADLINE_S`.
        service: the dotted path of what runs in the process.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        call_deadline_s: float = CALL_DEADLINE_S,
        service: str = SERVICE,
    ) -> None:
        self._pool = ProcessPool(service, options, timeout_s=call_deadline_s, environment=environment)

    async def write(self, steps: Sequence[StepFigures]) -> None:
        """Log the steps.

        Raises:
            SinkFailed: the package refused them, or its process failed.
        """
        await self._call({"steps": as_json(steps)})

    async def finish(self) -> None:
        """Let the package end its run cleanly. Raises ``SinkFailed``."""
        if self._pool.alive:
            await self._call({"finish": True})

    async def aclose(self) -> None:
        """End the process."""
        await self._pool.aclose()

    async def _call(self, message: dict[str, Any]) -> None:
        try:
            answer = await self._pool.call(encode_message(message))
        except ProcessFailed as error:
            raise SinkFailed(error.message) from error
        if "error" in answer:
            raise SinkFailed(str(answer["error"]))
