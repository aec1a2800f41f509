"""What the daemon says of itself: its status, and the cause of a late batch.

Invariants:

* Reads everything and changes nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any, Final

import anyio

from orchestrator import __version__
from orchestrator.consumer.waits import Waiting
from orchestrator.core.mixture.outlook import Shortage
from orchestrator.daemon.control.run import RunControl
from orchestrator.logs import LogHandle
from orchestrator.production.group_source import ProducerStatistics
from orchestrator.rewards import RewardStatistics
from orchestrator.state import StateStore
from orchestrator.status import Facts, RunFacts, build_status, explain

from .parts import EngineParts, OutputParts, SourceParts, TrainerParts
from .settings import RunFigures

__all__ = ["Reporter"]

EVENTS: Final = 20
"""Of the last log lines, in a status: a screen."""

WRITE_PATIENCE_S: Final = 1.0
"""A status waits this long for what it reports to be written; a failing disk must not hide it."""


class Reporter:
    """See the module's invariants.

    Args:
        figures: what a status says of the config.
        store: the state.
        control: for whether the run is draining.
        sources: mixer, producers and rewards.
        engines: the pool, and pauses of it.
        trainer: who holds batches, waits and is connected.
        outputs: history, archive and sinks.
        logs: for the last lines.
    """

    def __init__(
        self,
        *,
        figures: RunFigures,
        store: StateStore,
        control: RunControl,
        sources: SourceParts,
        engines: EngineParts,
        trainer: TrainerParts,
        outputs: OutputParts,
        logs: LogHandle,
    ) -> None:
        self._figures = figures
        self._store = store
        self._control = control
        self._sources = sources
        self._engines = engines
        self._trainer = trainer
        self._outputs = outputs
        self._logs = logs
        self._started = time.monotonic()

    def reconfigure(self, figures: RunFigures) -> None:
        """The config in force says this now."""
        self._figures = figures

    # -- causes --------------------------------------------------------------------------------------------------------

    def cause(self, why: Waiting | Shortage | None) -> dict[str, Any]:
        """Why no batch is formed, as a sentence and as facts."""
        state, ledger = self._store.statistics(), self._store.ledger
        mixer, pool = self._sources.mixer, self._engines.pool
        facts = Facts(
            ledger=ledger,
            demands={name: mixer.demand(name) for name in ledger.sources},
            producers=self._producers(),
            rewards=self._rewards(),
            weights=mixer.table.at(ledger.step).raw,
            engines=pool.statistics(),
            paused_by=self._engines.control.describe_pause(),
            is_draining=self._control.is_draining,
            waiting_requests=pool.waiting,
            disk_fault=self._store.fault,
            unwritten_bytes=state.backlog_bytes,
        )
        return explain(
            facts,
            waiting=why.reason(time.monotonic()) if isinstance(why, Waiting) else None,
            shortage=why if isinstance(why, Shortage) else None,
        )

    def _cause_now(self) -> dict[str, Any] | None:
        """The cause of the wait for the next batch; ``None`` where it can be formed and nobody is kept from it."""
        outlook, trainer = self._sources.mixer.outlook(), self._trainer.waits.for_trainer
        if isinstance(outlook, Shortage):
            return self.cause(outlook)
        if self._store.fault is not None:
            return self.cause(None)
        return self.cause(trainer.why) if trainer.count else None

    def _producers(self) -> dict[str, ProducerStatistics]:
        return {name: pipeline.producer.statistics() for name, pipeline in self._sources.pipelines.items()}

    def _rewards(self) -> dict[str, RewardStatistics]:
        return {name: pipeline.reward.statistics() for name, pipeline in self._sources.pipelines.items()}

    # -- status --------------------------------------------------------------------------------------------------------

    async def kept_status(self, history: int = 0) -> dict[str, Any]:
        """The status, once what it reports is written: what is said to be buffered has to be there after a crash.

        Where the disk takes longer than :data:`WRITE_PATIENCE_S` it is as it is then: a fault must not hide itself.
        """
        status, mark = self.status(history), self._store.mark
        with anyio.move_on_after(WRITE_PATIENCE_S) as writing:
            await self._store.written(mark)
        return self.status(history) if writing.cancelled_caught else status

    def status(self, history: int = 0) -> dict[str, Any]:
        """Everything that ``orchestrator status --json`` prints, with the figures of that many of the last steps."""
        pool, trainer, outputs = self._engines.pool, self._trainer, self._outputs
        archiver = outputs.archiver
        facts = RunFacts(
            time_s=round(time.time(), 3),
            cause=self._cause_now(),
            run=self._run(),
            ledger=self._store.ledger,
            mixer=self._sources.mixer,
            producers=self._producers(),
            rewards=self._rewards(),
            engines=pool.statistics(),
            generation={
                "in_flight": pool.in_flight,
                "waiting": pool.waiting,
                "paused": self._engines.control.is_paused,
                "draining": self._control.is_draining,
            },
            starvation=asdict(trainer.starvation.statistics()),
            loop=asdict(outputs.loop.statistics()),
            held=self._held(),
            connections=[{"pid": c.holder.pid, "client": c.client} for c in trainer.connections.values()],
            state=asdict(self._store.statistics()),
            archive=None if archiver is None else asdict(archiver.statistics()),
            sinks=[asdict(feed.statistics()) for feed in outputs.feeds],
            problems=self._store.recovery.problems,
            events=self._logs.recent.last(EVENTS),
            history=outputs.history.last(history),
        )
        return build_status(facts)

    def _run(self) -> dict[str, Any]:
        return {
            "name": self._figures.name,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "num_rollout": self._figures.num_rollout,
            "rollout_batch_size": self._figures.rollout_batch_size,
            "n_samples_per_prompt": self._figures.n_samples_per_prompt,
            "has_archive": self._outputs.archiver is not None,
        }

    def _held(self) -> dict[str, tuple[int, float]]:
        """By lease: the process that holds it, and since how many seconds."""
        now, handouts = time.monotonic(), self._trainer.handouts
        return {
            lease: (holder.pid, round(now - handouts.held_since(lease), 3)) for lease, holder in handouts.held.items()
        }
