"""What people and trainers may do to a running daemon: pauses, weights, drain.

Invariants:

* A pause has an owner (a connection) and a deadline; it ends with the first of them, or by ``continue_generation``, and
  is not kept over a restart.
* A weight that is set at run time is checked before it is recorded, is in force from the next batch that forms, and
  ends with a warning when the file changes that weight.
* Draining parks everything in flight and is final for this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from .broadcast import Broadcast
from .engines import EnginePool
from .errors import BadRequest, BatchTimeout
from .events import WeightSet
from .ledger import Journal, Ledger
from .weights import WeightTable, parse_weight

__all__ = ["Control"]

PARK_DEADLINE_S: Final = 30.0
"""Parking cuts connections and writes partial rollouts; it waits for no generation."""


@dataclass(slots=True)
class _Pause:
    owner: int
    timeout_s: float


class Control:
    """Implements :class:`~orchestrator.consumer.service.GenerationControl`; see the module's invariants.

    Args:
        pool: the engines.
        ledger: the run's facts.
        journal: where changes are recorded.
        table: the weights in force.
        file_weights: each source's weight as the file gives it.
        directory: for dotted paths of weights.
        changed: notified when the demand may have changed.
        park: cancels the producers and returns when everything in flight is parked and snapshotted.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        pool: EnginePool,
        ledger: Ledger,
        journal: Journal,
        table: WeightTable,
        file_weights: Mapping[str, float | str],
        directory: Path,
        changed: Broadcast,
        park: Callable[[], object],
        log: FilteringBoundLogger,
    ) -> None:
        self._pool = pool
        self._ledger = ledger
        self._journal = journal
        self._table = table
        self._file_weights = dict(file_weights)
        self._directory = directory
        self._changed = changed
        self._park = park
        self._log = log
        self._pause: _Pause | None = None
        self._pauses = Broadcast()
        self._drained = anyio.Event()
        self.is_draining = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Hold pauses to their deadlines until cancelled."""
        task_status.started()
        while True:
            changed = self._pauses.next()
            pause = self._pause
            if pause is None:
                await changed.wait()
                continue
            with anyio.move_on_after(pause.timeout_s) as deadline:
                await changed.wait()
            if deadline.cancelled_caught and self._pause is pause:
                self._log.warning(f"a pause of generation ended by its deadline of {pause.timeout_s:g} s")
                self.resume(None)

    # -- generation ----------------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether a pause is in force."""
        return self._pause is not None

    def in_flight(self) -> int:
        """Generations under way."""
        return self._pool.in_flight

    def interrupt(self) -> int:
        """Cut what is in flight into partial rollouts; returns how many were cut."""
        return self._pool.interrupt()

    async def pause(self, mode: str, timeout_s: float, owner: int) -> int:
        """Close dispatch and return when the engines are quiet.

        Raises:
            BadRequest: another connection holds a pause.
            BatchTimeout: the engines were not quiet within ``timeout_s``, which ends the pause too.
        """
        if self._pause is not None and self._pause.owner != owner:
            raise BadRequest("another connection has paused generation; it ends with that connection or its deadline")
        self._pause = _Pause(owner, timeout_s)
        self._pauses.notify()
        self._pool.pause()
        if mode == "abort":
            self._pool.interrupt()
        with anyio.move_on_after(timeout_s):
            await self._pool.quiet()
            return 0
        raise BatchTimeout(
            f"{self.in_flight()} generations did not finish within {timeout_s:g} s:"
            " use mode abort, or a longer timeout_s"
        )

    def resume(self, owner: int | None) -> None:
        """Open dispatch; with an owner only if the pause is that owner's."""
        if self._pause is None or (owner is not None and self._pause.owner != owner):
            return
        if owner is not None:
            self._log.warning("a pause of generation ended because its connection closed")
        self._pause = None
        self._pauses.notify()
        if not self.is_draining:
            self._pool.resume()

    async def drain(self) -> None:
        """Stop launching, park what is in flight, snapshot; returns when that is done."""
        if not self.is_draining:
            self.is_draining = True
            self._log.info("draining: launching has stopped, what is in flight is parked")
            self._park()
            self._changed.notify()
        with anyio.fail_after(PARK_DEADLINE_S):
            await self._drained.wait()

    def drained(self) -> None:
        """Everything is parked."""
        self._drained.set()

    # -- weights -------------------------------------------------------------------------------------------------------

    def set_weight(self, source: str, weight: float | str | None) -> None:
        """Put a weight in force from the next batch that forms, and record it; ``None``: back to the file.

        Raises:
            SourceUnknown: no such source.
            ExpressionError, DottedPathError, WeightError: the weight cannot be used.
        """
        self._ledger.source(source)
        if weight is None:
            self._table.set(source, None)
        else:
            parsed = parse_weight(weight, directory=self._directory)
            parsed(self._ledger.step)  # a weight that fails at once is refused
            self._table.set(source, parsed)
        self._journal.record(WeightSet(source, weight, self._file_weights[source]))
        self._changed.notify()

    def restore_weights(self) -> None:
        """Put weights of an earlier run in force again, unless the file has changed that weight since."""
        for name, state in self._ledger.sources.items():
            if state.weight_override is None:
                continue
            if state.weight_in_file != self._file_weights[name]:
                self._log.warning(
                    f"the weight {state.weight_override!r} of {name}, set at run time, ends:"
                    f" the config file now says {self._file_weights[name]!r}"
                )
                self._journal.record(WeightSet(name, None, self._file_weights[name]))
            else:
                self._table.set(name, parse_weight(state.weight_override, directory=self._directory))
