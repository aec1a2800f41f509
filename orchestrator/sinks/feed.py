"""One sink's queue, and the task that empties it.

Invariants:

* :meth:`SinkFeed.offer` never waits: at most ``MAX_QUEUED`` steps are kept, and a new one replaces the oldest.
* A sink that fails, or does not answer within its deadline, is retried less and less often, with the steps that it has
  not taken. Each fault is logged once, and is in :meth:`SinkFeed.statistics` while it lasts.
* Lost steps are counted. No failure of a sink ends the feed, and the feed ends nothing else.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.errors import OrchestratorError

__all__ = ["MAX_QUEUED", "SinkFailed", "SinkFeed", "SinkStatistics", "StepFigures", "StepSink"]

MAX_QUEUED: Final = 2048
"""Steps kept for a sink that is unavailable: days of a slow run, and some 50 MB at 100 sources."""

BATCH_STEPS: Final = 32
"""Most steps in one call of a sink: enough to catch up soon, few enough for the call's deadline."""

GATHER_S: Final = 0.25
"""Pause between two calls of a sink that has taken everything. Faster steps are sent together, because a call costs a
file or a connection, and a thread."""

FIRST_RETRY_S: Final = 1.0
LONGEST_RETRY_S: Final = 60.0
"""Between two tries of a failing sink; the first start of some packages takes seconds of a core."""


SLOW_S: Final = 10.0
"""A longer call is reported as a fault while it lasts; the first start of some packages takes nearly as long."""


class SinkFailed(OrchestratorError, RuntimeError):
    """A sink did not accept its steps; the message says why, and what to do."""

    code = "sink_failed"


class StepFigures(NamedTuple):
    """The figures of one step: ``time_s`` is when its batch formed, in seconds since 1970; ``metrics`` are slashed."""

    step: int
    policy_version: int
    time_s: float
    metrics: Mapping[str, float]


class StepSink(Protocol):
    """Something that steps are written to."""

    async def write(self, steps: Sequence[StepFigures]) -> None:
        """Write the steps, within a deadline of its own.

        Raises:
            SinkFailed: not all steps were written; they will be given again.
        """
        ...

    async def finish(self) -> None:
        """End: there are no more steps. The caller sets a deadline. Raises ``SinkFailed``."""
        ...

    async def aclose(self) -> None:
        """Release everything, at once."""
        ...


@dataclass(frozen=True, slots=True)
class SinkStatistics:
    """The state of a sink.

    ``written`` and ``lost`` (steps) and ``failures`` (calls) count since the start. ``queued`` steps wait. ``where`` is
    what it writes to. ``fault`` says what is wrong, ``None`` if nothing is.
    """

    name: str
    where: str
    written: int
    queued: int
    lost: int
    failures: int
    newest_step: int | None
    fault: str | None


class SinkFeed:
    """See the module's invariants.

    Args:
        name: of the sink, in the status and the log.
        where: what it writes to, for people.
        sink: takes the steps.
        log: for faults.
        max_queued: see :data:`MAX_QUEUED`.
    """

    def __init__(
        self, name: str, where: str, sink: StepSink, *, log: FilteringBoundLogger, max_queued: int = MAX_QUEUED
    ) -> None:
        self.name = name
        self._where = where
        self._sink = sink
        self._log = log
        self._queue: deque[StepFigures] = deque()
        self._max_queued = max_queued
        self._news = anyio.Event()
        self._closing = anyio.Event()
        self._ended = anyio.Event()
        self._written = self._lost = self._failures = 0
        self._newest: int | None = None
        self._fault: str | None = None
        self._pause_s = FIRST_RETRY_S
        self._since: float | None = None

    def offer(self, figures: StepFigures) -> None:
        """One more step; returns at once."""
        if len(self._queue) >= self._max_queued:
            self._queue.popleft()
            self._lost += 1
        self._queue.append(figures)
        self._news.set()

    def statistics(self) -> SinkStatistics:
        """The current counts."""
        return SinkStatistics(
            name=self.name,
            where=self._where,
            written=self._written,
            queued=len(self._queue),
            lost=self._lost,
            failures=self._failures,
            newest_step=self._newest,
            fault=self._fault or self._slowness(),
        )

    def _slowness(self) -> str | None:
        taken = 0.0 if self._since is None else anyio.current_time() - self._since
        return f"no answer for {taken:.0f} s" if taken > SLOW_S else None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Write steps to the sink until :meth:`close` or cancelled."""
        task_status.started()
        try:
            await self._bring()
            await self._finish()
        finally:
            if self._queue:
                self._lost += len(self._queue)
                why = self.statistics().fault or "the daemon is stopping"
                self._log.warning(f"{self.name} did not receive the last steps ({len(self._queue)}): {why}")
            with anyio.CancelScope(shield=True):
                await self._sink.aclose()
            self._ended.set()

    async def _bring(self) -> None:
        while True:
            self._news = anyio.Event()
            if self._queue:
                took = await self._turn()
                if not took and self._closing.is_set():
                    return
                if took and not self._queue:
                    await self._rest(GATHER_S)
            elif self._closing.is_set():
                return
            else:
                await self._news.wait()

    async def close(self) -> None:
        """Write what is queued to the sink, trying once, and end it; the caller sets a deadline."""
        self._closing.set()
        self._news.set()
        await self._ended.wait()

    async def _turn(self) -> bool:
        """Give the sink what is queued, and after a failure wait for the next try; returns whether it took it."""
        steps = list(itertools.islice(self._queue, BATCH_STEPS))
        self._since = anyio.current_time()
        try:
            await self._sink.write(steps)
        except SinkFailed as error:
            self._since = None
            self._note(error)
            await self._rest(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
            return False
        self._since = None
        self._took(steps)
        return True

    async def _rest(self, seconds: float) -> None:
        """Wait so long, or until :meth:`close`."""
        with anyio.move_on_after(seconds):
            await self._closing.wait()

    def _took(self, steps: Sequence[StepFigures]) -> None:
        if self._fault is not None:
            self._log.info(f"{self.name} accepts metrics again")
            self._fault, self._pause_s = None, FIRST_RETRY_S
        self._written += len(steps)
        self._newest = steps[-1].step
        for step in steps:
            if self._queue and self._queue[0] is step:  # a new step may have replaced it meanwhile
                self._queue.popleft()

    def _note(self, error: SinkFailed) -> None:
        self._failures += 1
        if error.message != self._fault:
            self._fault = error.message
            self._log.warning(f"{self.name} does not accept metrics: {error}; retrying")

    async def _finish(self) -> None:
        try:
            await self._sink.finish()
        except SinkFailed as error:
            self._log.warning(f"{self.name} was not closed cleanly: {error}")


def as_json(steps: Sequence[StepFigures]) -> list[dict[str, Any]]:
    """The steps in the form of ``metrics.jsonl``."""
    return [
        {"step": s.step, "policy_version": s.policy_version, "time": s.time_s, "metrics": dict(s.metrics)}
        for s in steps
    ]
