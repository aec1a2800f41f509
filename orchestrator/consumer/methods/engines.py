"""The methods of the consumer API that concern the engines: versions, pauses, parameters, engines themselves.

Invariants:

* Nothing is answered before what it reports is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.writing import kept
from orchestrator.core.ledger.journal import Journal
from orchestrator.engines import ParameterUpdate, UpdateMode
from orchestrator.errors import BadRequest

from . import params as m
from .table import Method

__all__ = ["EngineControl", "EngineMethods"]


class EngineControl(Protocol):
    """What may be done to the engines; each raises what its own documentation says."""

    def in_flight(self) -> int:
        """Generations under way."""
        ...

    async def pause(self, mode: str, timeout_s: float, owner: int) -> int:
        """Close dispatch and return when the engines are quiet; the pause ends with its owner or its deadline."""
        ...

    def is_paused_by(self, owner: int) -> bool:
        """Whether this connection holds a pause."""
        ...

    def resume(self) -> None:
        """End the pause, if there is one."""
        ...

    def left(self, owner: int) -> None:
        """A connection closed: its pause ends with it."""
        ...

    async def set_version(self, version: int, mode: str) -> tuple[int, int]:
        """All engines hold this version now; returns how many generations are in flight and were cut."""
        ...

    async def update_weights(
        self, update: ParameterUpdate, mode: UpdateMode, *, rolling: bool, timeout_s: float
    ) -> list[dict[str, Any]]:
        """New parameters for every engine; returns how it went at each."""
        ...

    def engines(self) -> list[dict[str, Any]]:
        """Every engine as it is now."""
        ...

    async def add(self, raw: Mapping[str, Any]) -> str:
        """One more engine, as a config file would say it; returns its name."""
        ...

    def drain(self, name: str, *, is_draining: bool) -> int:
        """Send an engine no new requests, or again; returns how many it still has."""
        ...

    def remove(self, name: str) -> int:
        """Let an engine go; returns how many requests go on elsewhere."""
        ...


class EngineMethods:
    """See the module's invariants.

    Args:
        control: the engines' side.
        journal: where changes are recorded.
    """

    def __init__(self, control: EngineControl, journal: Journal) -> None:
        self._control = control
        self._journal = journal

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        return {
            "set_policy_version": (m.SetPolicyVersion, self._set_policy_version),
            "pause_generation": (m.PauseGeneration, self._pause_generation),
            "continue_generation": (m.NoParams, self._continue_generation),
            "update_weights": (m.UpdateWeights, self._update_weights),
            "engines": (m.Engines, self._engines),
        }

    async def _set_policy_version(self, _: Connection, params: m.SetPolicyVersion) -> Answer:
        in_flight, aborted = await self._control.set_version(params.version, params.mode)
        await kept(self._journal, f"policy version {params.version} is in force")
        return Answer({"in_flight": in_flight, "aborted": aborted})

    async def _pause_generation(self, connection: Connection, params: m.PauseGeneration) -> Answer:
        owner = connection.holder.connection
        return Answer({"in_flight": await self._control.pause(params.mode, params.timeout_s, owner)})

    async def _continue_generation(self, _: Connection, __: m.NoParams) -> Answer:
        self._control.resume()
        return Answer({"in_flight": self._control.in_flight()})

    async def _update_weights(self, _: Connection, params: m.UpdateWeights) -> Answer:
        update = ParameterUpdate(params.path, params.version)
        engines = await self._control.update_weights(
            update, params.mode, rolling=params.rolling, timeout_s=params.timeout_s
        )
        await kept(self._journal, f"policy version {params.version} is in force", data={"engines": engines})
        return Answer({"version": params.version, "engines": engines})

    async def _engines(self, _: Connection, params: m.Engines) -> Answer:
        result: dict[str, Any] = {}
        match params:
            case m.Engines(action="list"):
                pass
            case m.Engines(action="add", engine=dict() as raw):
                result["name"] = await self._control.add(raw)
            case m.Engines(action="drain" | "resume" as action, name=str() as name):
                result["in_flight"] = self._control.drain(name, is_draining=action == "drain")
            case m.Engines(action="remove", name=str() as name):
                result["in_flight"] = self._control.remove(name)
            case m.Engines(action=action):
                needs = "`engine`, written as in a config file" if action == "add" else "`name`, the name of an engine"
                raise BadRequest(f"engines: {action} needs {needs}")
        engines = self._control.engines()
        await kept(self._journal, f"engines: {params.action} is done", data={**result, "engines": engines})
        return Answer({**result, "engines": self._control.engines()})
