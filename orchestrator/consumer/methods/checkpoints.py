"""The methods of the consumer API that concern named checkpoints.

Invariants:

* Every answer comes within a deadline, or an error says what is known by then.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import anyio

from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.errors import NotWritten, StateError

from . import params as m
from .table import Method

__all__ = ["CheckpointControl", "CheckpointMethods"]

SAVE_DEADLINE_S: Final = 120.0
"""It takes milliseconds, and seconds where much waits for the disk; a trainer stands still meanwhile."""

READ_DEADLINE_S: Final = 540.0
"""For every byte of a checkpoint, hundreds of gigabytes; clients wait for 600 s."""


class CheckpointControl(Protocol):
    """What may be done with checkpoints; each raises what its own documentation says."""

    async def save(self, name: str, trained_through: int | None) -> int:
        """Save a checkpoint; returns the step."""
        ...

    async def load(self, name: str) -> int:
        """Go back to a checkpoint; returns its step."""
        ...

    async def checkpoints(self) -> list[dict[str, Any]]:
        """All checkpoints, in the order in which they were saved."""
        ...

    async def verify(self, name: str | None) -> dict[str, list[str]]:
        """What is wrong with a checkpoint, or with each of them: sentences by name."""
        ...


class CheckpointMethods:
    """Answers them.

    Args:
        control: what does it.
    """

    def __init__(self, control: CheckpointControl) -> None:
        self._control = control

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        return {
            "save": (m.Save, self._save),
            "load": (m.Load, self._load),
            "checkpoints": (m.NoParams, self._checkpoints),
            "verify_checkpoints": (m.VerifyCheckpoints, self._verify),
        }

    async def _save(self, _: Connection, params: m.Save) -> Answer:
        with anyio.move_on_after(SAVE_DEADLINE_S):
            return Answer({"step": await self._control.save(params.name, params.trained_through)})
        raise NotWritten(
            f"checkpoint {params.name!r} was not saved within {SAVE_DEADLINE_S:g} s. An older one of that name is"
            " unchanged. Batches that it acknowledges stay acknowledged; see status.state.fault"
        )

    async def _load(self, _: Connection, params: m.Load) -> Answer:
        with anyio.move_on_after(READ_DEADLINE_S):
            return Answer({"step": await self._control.load(params.name)})
        raise StateError(f"checkpoint {params.name!r} was not read within {READ_DEADLINE_S:g} s; nothing changed")

    async def _checkpoints(self, _: Connection, __: m.NoParams) -> Answer:
        with anyio.move_on_after(READ_DEADLINE_S):
            return Answer({"checkpoints": await self._control.checkpoints()})
        raise StateError(f"the checkpoints were not read within {READ_DEADLINE_S:g} s")

    async def _verify(self, _: Connection, params: m.VerifyCheckpoints) -> Answer:
        with anyio.move_on_after(READ_DEADLINE_S):
            return Answer({"problems": await self._control.verify(params.name)})
        raise StateError(f"the checkpoints were not read within {READ_DEADLINE_S:g} s: verify one of them by name")
