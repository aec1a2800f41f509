"""The methods of the consumer API that concern the run as a whole: status, weights, pauses of sources, drain.

Invariants:

* Nothing is answered before what it reports is written. What is done to the run is recorded by the control, not here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.writing import kept
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger

from . import params as m
from .table import Method, who

__all__ = ["RunControl", "RunMethods"]


class RunControl(Protocol):
    """What may be done to the run; each raises what its own documentation says."""

    async def drain(self) -> None:
        """Stop launching, park what is in flight, snapshot."""
        ...

    def set_weight(self, source: str, weight: float | str | None, *, by: str) -> None:
        """Put a weight in force, and record it."""
        ...

    def pause_source(self, name: str, *, by: str) -> None:
        """Keep a source out of new batches, and record it."""
        ...

    def resume_source(self, name: str, *, by: str) -> None:
        """Let a paused source take part again, and record it."""
        ...


class RunMethods:
    """See the module's invariants.

    Args:
        control: does what is asked.
        ledger: for the step.
        journal: where the control records it.
        status: everything that ``status`` reports, all of it written, with the figures of that many of the last steps.
    """

    def __init__(
        self,
        control: RunControl,
        *,
        ledger: Ledger,
        journal: Journal,
        status: Callable[[int], Awaitable[dict[str, Any]]],
    ) -> None:
        self._control = control
        self._ledger = ledger
        self._journal = journal
        self._status = status

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        return {
            "status": (m.Status, self._report_status),
            "set_weight": (m.SetWeight, self._set_weight),
            "pause": (m.Source, self._pause),
            "resume": (m.Source, self._resume),
            "drain": (m.NoParams, self._drain),
        }

    async def _report_status(self, _: Connection, params: m.Status) -> Answer:
        return Answer(await self._status(params.history))

    async def _set_weight(self, connection: Connection, params: m.SetWeight) -> Answer:
        self._control.set_weight(params.source, params.weight, by=who(connection))
        return await self._written(f"the weight of {params.source} is set")

    async def _pause(self, connection: Connection, params: m.Source) -> Answer:
        self._control.pause_source(params.source, by=who(connection))
        return await self._written(f"{params.source} is paused")

    async def _resume(self, connection: Connection, params: m.Source) -> Answer:
        self._control.resume_source(params.source, by=who(connection))
        return await self._written(f"{params.source} is resumed")

    async def _drain(self, _: Connection, __: m.NoParams) -> Answer:
        await self._control.drain()
        return Answer({"step": self._ledger.step})

    async def _written(self, what: str) -> Answer:
        await kept(self._journal, what)
        return Answer({"step": self._ledger.step})
