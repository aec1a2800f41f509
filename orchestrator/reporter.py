"""What the daemon says of itself: its status, the cause of a late batch, the lines of each step.

Invariants:

* Reads everything and changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from structlog.typing import FilteringBoundLogger

from . import __version__
from .config import Config
from .consumer import Connection, LeaseDesk, Waiting
from .control import Control
from .engine_control import EngineControl
from .engines import EnginePool
from .filters import RewardCaps
from .leases import LeasedBatch
from .logs import LogHandle
from .mixer import Mixer, Shortage
from .source_lines import SourceLine
from .starvation import Starvation
from .state import StateStore
from .status import RunFacts, StepMetrics, build_status, explain
from .weights import WeightTable

__all__ = ["Reporter", "StepLog"]


class StepLog:
    """Writes the lines of each batch that forms.

    Args:
        metrics: makes them.
        table: the weights, for what went wrong with them at a step.
        caps: the reward caps, for the same.
        logs: where lines go.
        log: for warnings.
    """

    def __init__(
        self, *, metrics: StepMetrics, table: WeightTable, caps: RewardCaps, logs: LogHandle, log: FilteringBoundLogger
    ) -> None:
        self._metrics = metrics
        self._table = table
        self._caps = caps
        self._logs = logs
        self._log = log

    def batch_formed(self, batch: LeasedBatch) -> None:
        """A batch has formed just now."""
        for warning in (*self._table.at(batch.step).warnings, *self._caps.warnings(batch.step)):
            self._log.warning(warning)
        self._logs.step(self._metrics.report(batch))


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
        control: Control,
        engines: EngineControl,
        desk: LeaseDesk,
        starvation: Starvation,
        connections: Mapping[int, Connection],
    ) -> None:
        self._config = config
        self._store = store
        self._mixer = mixer
        self._pool = pool
        self._lines = lines
        self._control = control
        self._engines = engines
        self._desk = desk
        self._starvation = starvation
        self._connections = connections
        self._started = time.monotonic()

    def reconfigure(self, config: Config) -> None:
        """This is the config in force now."""
        self._config = config

    def cause(self, why: Waiting | Shortage | None) -> dict[str, Any]:
        """Why no batch is formed, as a sentence and as facts."""
        return explain(
            waiting=why.reason if isinstance(why, Waiting) else None,
            shortage=why if isinstance(why, Shortage) else None,
            ledger=self._store.ledger,
            producers={name: line.producer.statistics() for name, line in self._lines.items()},
            rewards={name: line.reward.statistics() for name, line in self._lines.items()},
            engines=self._pool.statistics(),
            is_paused=self._engines.is_paused,
            is_draining=self._control.is_draining,
            disk_fault=self._store.fault,
        )

    def status(self) -> dict[str, Any]:
        """Everything that ``orchestrator status --json`` prints."""
        rollout = self._config.rollout
        facts = RunFacts(
            run={
                "name": self._config.run.name,
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "num_rollout": rollout.num_rollout,
                "rollout_batch_size": rollout.rollout_batch_size,
                "n_samples_per_prompt": rollout.n_samples_per_prompt,
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
            held={lease: holder.pid for lease, holder in self._desk.held.items()},
            connections=[{"pid": c.holder.pid, "client": c.client} for c in self._connections.values()],
            state=asdict(self._store.statistics()),
            problems=self._store.recovery.problems,
        )
        return build_status(facts, self.cause)
