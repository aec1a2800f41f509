"""What the daemon says of itself: its status, the cause of a late batch, the lines of each step.

Invariants:

* Reads everything and changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator import __version__
from orchestrator.archive import Archiver
from orchestrator.config import Config
from orchestrator.consumer import Connection, Handouts
from orchestrator.consumer.starvation import Starvation
from orchestrator.consumer.waits import Waiting, Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.mixture.outlook import Shortage
from orchestrator.core.weights.table import WeightTable
from orchestrator.daemon.control.engines import EngineControl
from orchestrator.daemon.control.run import RunControl
from orchestrator.engines import EnginePool
from orchestrator.logs import LogHandle
from orchestrator.sinks import SinkFeed, StepFigures
from orchestrator.state import StateStore
from orchestrator.status import Facts, RunFacts, StepHistory, StepMetrics, build_status, explain, report_point

from .source_lines import SourceLine

__all__ = ["Reporter", "StepLog"]

EVENTS: Final = 20
"""Of the last log lines, in a status: a screen."""

WRITE_PATIENCE_S: Final = 1.0
"""A status waits this long for what it reports to be written; a failing disk must not hide it."""


class StepLog:
    """Writes the lines of each batch that forms.

    Args:
        metrics: makes them.
        table: the weights, for what went wrong with them at a step.
        caps: the reward caps, for the same.
        waits: how long the trainer waited.
        history: takes the figures of every step.
        feeds: take them too.
        logs: where lines go.
        log: for warnings.
    """

    def __init__(
        self,
        *,
        metrics: StepMetrics,
        table: WeightTable,
        caps: RewardCaps,
        waits: Waits,
        history: StepHistory,
        feeds: Sequence[SinkFeed],
        logs: LogHandle,
        log: FilteringBoundLogger,
    ) -> None:
        self._metrics = metrics
        self._table = table
        self._caps = caps
        self._waits = waits
        self._history = history
        self._feeds = feeds
        self._logs = logs
        self._log = log

    def batch_formed(self, batch: LeasedBatch) -> None:
        """A batch has formed just now."""
        for warning in (*self._table.at(batch.step).warnings, *self._caps.warnings(batch.step)):
            self._log.warning(warning)
        waited_s = self._waits.waited_s(batch.step)
        if self._waits.for_engines.step == batch.step and self._waits.for_engines.is_told:
            self._log.info(f"the batch of step {batch.step} is there after {waited_s:.0f} s", action="batch_there")
        report = self._metrics.report(batch, trainer_wait_s=waited_s)
        self._logs.step(report)
        figures = StepFigures(batch.step, batch.policy_version, time.time(), report.slashed)
        self._history.add(report_point(report, figures.time_s))
        for feed in self._feeds:
            feed.offer(figures)


class Reporter:
    """See the module's invariants; arguments are the components that are looked at."""

    def __init__(
        self,
        *,
        config: Config,
        store: StateStore,
        mixer: Mixer,
        pool: EnginePool,
        lines: Mapping[str, SourceLine],
        control: RunControl,
        engines: EngineControl,
        handouts: Handouts,
        starvation: Starvation,
        waits: Waits,
        history: StepHistory,
        logs: LogHandle,
        connections: Mapping[int, Connection],
        archiver: Archiver | None,
        feeds: Sequence[SinkFeed],
    ) -> None:
        self._config = config
        self._store = store
        self._mixer = mixer
        self._pool = pool
        self._lines = lines
        self._control = control
        self._engines = engines
        self._handouts = handouts
        self._starvation = starvation
        self._waits = waits
        self._history = history
        self._logs = logs
        self._connections = connections
        self._archiver = archiver
        self._feeds = feeds
        self._started = time.monotonic()

    def reconfigure(self, config: Config) -> None:
        """This is the config in force now."""
        self._config = config

    def cause(self, why: Waiting | Shortage | None) -> dict[str, Any]:
        """Why no batch is formed, as a sentence and as facts."""
        state, ledger = self._store.statistics(), self._store.ledger
        facts = Facts(
            ledger=ledger,
            demands={name: self._mixer.demand(name) for name in ledger.sources},
            producers={name: line.producer.statistics() for name, line in self._lines.items()},
            rewards={name: line.reward.statistics() for name, line in self._lines.items()},
            weights=self._mixer.table.at(ledger.step).raw,
            engines=self._pool.statistics(),
            paused_by=self._engines.describe_pause(),
            is_draining=self._control.is_draining,
            waiting_requests=self._pool.waiting,
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
        outlook, trainer = self._mixer.outlook(), self._waits.for_trainer
        if isinstance(outlook, Shortage):
            return self.cause(outlook)
        if self._store.fault is not None:
            return self.cause(None)
        return self.cause(trainer.why) if trainer.count else None

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
        rollout = self._config.rollout
        now = time.monotonic()
        facts = RunFacts(
            time_s=round(time.time(), 3),
            cause=self._cause_now(),
            run={
                "name": self._config.run.name,
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "num_rollout": rollout.num_rollout,
                "rollout_batch_size": rollout.rollout_batch_size,
                "n_samples_per_prompt": rollout.n_samples_per_prompt,
                "has_archive": self._archiver is not None,
            },
            ledger=self._store.ledger,
            mixer=self._mixer,
            producers={name: line.producer.statistics() for name, line in self._lines.items()},
            rewards={name: line.reward.statistics() for name, line in self._lines.items()},
            engines=self._pool.statistics(),
            generation={
                "in_flight": self._pool.in_flight,
                "waiting": self._pool.waiting,
                "paused": self._engines.is_paused,
                "draining": self._control.is_draining,
            },
            starvation=asdict(self._starvation.statistics()),
            held={
                lease: (holder.pid, round(now - self._handouts.held_since(lease), 3))
                for lease, holder in self._handouts.held.items()
            },
            connections=[{"pid": c.holder.pid, "client": c.client} for c in self._connections.values()],
            state=asdict(self._store.statistics()),
            archive=None if self._archiver is None else asdict(self._archiver.statistics()),
            sinks=[asdict(feed.statistics()) for feed in self._feeds],
            problems=self._store.recovery.problems,
            events=self._logs.recent.last(EVENTS),
            history=self._history.last(history),
        )
        return build_status(facts)
