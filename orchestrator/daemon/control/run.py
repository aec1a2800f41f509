"""What people and trainers may do to a running daemon beside its engines: weights, pauses of sources, drain.

Invariants:

* A weight that is set at run time is checked before it is recorded, is in force from the next batch that forms, and
  ends with a warning when the file changes that weight.
* That a source is paused or takes part again is recorded here and nowhere else.
* Draining parks everything in flight and is final for this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.events import SourcePaused, SourceResumed, WeightSet
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import ShuttingDown
from orchestrator.production.producers import PARK_DEADLINE_S, Producers
from orchestrator.state import StateStore

__all__ = ["RunControl"]


class RunControl:
    """Implements :class:`~orchestrator.consumer.methods.run.RunControl`; see the module's invariants.

    Args:
        store: the run's facts, where changes are recorded, and what writes a snapshot.
        table: the weights in force.
        file_weights: each source's weight as the file gives it.
        directory: for dotted paths of weights.
        changed: notified when the demand may have changed.
        production: the producers.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        store: StateStore,
        table: WeightTable,
        file_weights: Mapping[str, float | str],
        directory: Path,
        changed: Broadcast,
        production: Producers,
        log: FilteringBoundLogger,
    ) -> None:
        self._store = store
        self._ledger = store.ledger
        self._table = table
        self._file_weights = dict(file_weights)
        self._directory = directory
        self._changed = changed
        self._production = production
        self._log = log
        self.is_draining = False

    # -- drain ---------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Stop launching, park what is in flight, snapshot; returns when that is done.

        Raises:
            ShuttingDown: it took too long; it goes on nevertheless.
        """
        if not self.is_draining:
            self.is_draining = True
            self._log.info("draining: launching has stopped, and what is in flight is being saved", action="draining")
            self._changed.notify()
        with anyio.move_on_after(PARK_DEADLINE_S):
            await self._production.stop()
            await self._store.snapshot()
            return
        raise ShuttingDown(f"draining takes longer than {PARK_DEADLINE_S:g} s and continues; see status.state.fault")

    def reconfigure(self, file_weights: Mapping[str, float | str]) -> None:
        """These are the file's weights now; one set at run time ends where the file's has changed."""
        self._file_weights = dict(file_weights)
        self.restore_weights()

    # -- weights -------------------------------------------------------------------------------------------------------

    def set_weight(self, source: str, weight: float | str | None, *, by: str) -> None:
        """Put a weight in force from the next batch that forms, and record it; ``None``: back to the file.

        Raises:
            SourceUnknown: no such source.
            ExpressionError, DottedPathError, WeightError: the weight cannot be used.
        """
        self._ledger.source(source)
        before = self._table.weight(source).text
        if weight is None:
            self._table.set(source, None)
        else:
            parsed = parse_weight(weight, directory=self._directory)
            parsed(self._ledger.step)  # a weight that fails at once is refused
            self._table.set(source, parsed)
        self._store.record(WeightSet(source, weight, self._file_weights[source]))
        self._changed.notify()
        now = self._table.weight(source).text
        self._audit(
            f"the weight of {source} is {now}{' (from the config file)' if weight is None else ''}, was {before}", by
        )

    def restore_weights(self) -> None:
        """Put the weights that the ledger has from run time in force, unless the file has changed that weight since."""
        for name, state in self._ledger.sources.items():
            if state.weight_override is None:
                self._table.set(name, None)
            elif state.weight_in_file != self._file_weights[name]:
                self._log.warning(
                    f"the weight {state.weight_override!r} of {name}, which was set at run time, no longer applies:"
                    f" the config file changed it to {self._file_weights[name]!r}"
                )
                self._table.set(name, None)
                self._store.record(WeightSet(name, None, self._file_weights[name]))
            else:
                self._table.set(name, parse_weight(state.weight_override, directory=self._directory))

    # -- pauses --------------------------------------------------------------------------------------------------------

    def pause_source(self, name: str, *, by: str) -> None:
        """Keep a source out of new batches, and record it; a paused one stays as it is.

        Raises:
            SourceUnknown: no such source.
        """
        if not self._ledger.source(name).paused:
            self._store.record(SourcePaused(name))
            self._audit(f"{name} is paused", by)

    def resume_source(self, name: str, *, by: str) -> None:
        """Let a paused source take part again, and record it; raises as :meth:`pause_source`."""
        if self._ledger.source(name).paused:
            self._store.record(SourceResumed(name))
            self._audit(f"{name} is resumed", by)

    def _audit(self, what: str, by: str) -> None:
        """Say in the log what was done to the run, and by whom."""
        self._log.info(f"{what} from step {self._ledger.step} on, by {by}")
