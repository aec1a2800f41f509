"""The lines and figures of each batch, written when it forms.

Invariants:

* It is the mixer's :class:`~orchestrator.core.mixture.mixer.BatchObserver`: it reads, queues what is to be written, and
  waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from structlog.typing import FilteringBoundLogger

from orchestrator.consumer.waits import Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.weights.table import WeightTable
from orchestrator.logs import LogHandle
from orchestrator.sinks import SinkFeed, StepFigures
from orchestrator.status import StepHistory, StepMetrics, report_point

__all__ = ["StepLog"]


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
            self._log.info(f"the batch of step {batch.step} is ready after {waited_s:.0f} s", action="batch_there")
        report = self._metrics.report(batch, trainer_wait_s=waited_s)
        self._logs.step(report)
        figures = StepFigures(batch.step, batch.policy_version, time.time(), report.slashed)
        self._history.add(report_point(report, figures.time_s))
        for feed in self._feeds:
            feed.offer(figures)
