"""The methods of the consumer API that change the config of a running daemon: reload, and sources.

Invariants:

* Nothing is answered before what it reports is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.errors import BadRequest

from . import params as m
from .table import Method

__all__ = ["ReloadControl", "SourceControl", "SourceMethods"]


class ReloadControl(Protocol):
    """The config file of a running daemon."""

    async def reload(self) -> list[dict[str, Any]]:
        """Read the config file again and take it over; returns what differs, when it is written."""
        ...


class SourceControl(Protocol):
    """What may be done to sources; each raises what its own documentation says, and returns when it is written."""

    def sources(self) -> list[dict[str, Any]]:
        """Every source as it is now."""
        ...

    async def add(self, raw: Mapping[str, Any], weight: float | str, cap: float | str | None) -> str:
        """One more source; returns its name."""
        ...

    async def remove(self, name: str) -> None:
        """Let a source go."""
        ...

    async def restore(self, name: str) -> None:
        """Have a removed source of the file again."""
        ...


class SourceMethods:
    """Answers them.

    Args:
        control: does what is asked of sources.
        reloader: reads the file again.
        ledger: for the step.
    """

    def __init__(self, control: SourceControl, reloader: ReloadControl, ledger: Ledger) -> None:
        self._control = control
        self._reloader = reloader
        self._ledger = ledger

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        return {"reload": (m.NoParams, self._reload), "sources": (m.Sources, self._sources)}

    async def _reload(self, _: Connection, __: m.NoParams) -> Answer:
        return Answer({"changes": await self._reloader.reload(), "step": self._ledger.step})

    async def _sources(self, _: Connection, params: m.Sources) -> Answer:
        match params:
            case m.Sources(action="list"):
                pass
            case m.Sources(action="add", source=dict() as raw, weight=float() | int() | str() as weight):
                await self._control.add(raw, weight, params.cap)
            case m.Sources(action="remove", name=str() as name):
                await self._control.remove(name)
            case m.Sources(action="restore", name=str() as name):
                await self._control.restore(name)
            case m.Sources(action="add"):
                raise BadRequest("sources: add needs `source`, written as in a config file, and `weight`")
            case m.Sources(action=action):
                raise BadRequest(f"sources: {action} needs `name`, the name of a source")
        return Answer({"sources": self._control.sources(), "step": self._ledger.step})
