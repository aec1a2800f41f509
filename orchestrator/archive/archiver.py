"""Brings the batches that were trained on from the state to the archive.

Invariants:

* A batch is written when its acknowledgements are synced, and let go of when its file is: after a crash at any moment
  it is either in the state, or in the archive, or in both, and then it is not written again. So each acknowledged batch
  has one file.
* The trainer never waits: writing is done in worker threads, one batch at a time, and an ``ack`` is answered before.
* A disk that fails is named in :meth:`Archiver.statistics` and in the log, and tried again; meanwhile batches wait in
  the state, up to ``MAX_WAITING_BYTES``. Beyond that, or where the state itself has no room left, the oldest are given
  up, each with an error in the log: what is trained on goes before what is read.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.events import Archived, Event
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.unarchived import BatchKey, TrainedBatch

from .names import remove_older, remove_unfinished
from .reading import find_step
from .survey import StepSurvey, survey
from .writing import Written, write_batch

__all__ = ["MAX_WAITING_BYTES", "ArchiveStatistics", "Archiver", "TrainedState"]

MAX_WAITING_BYTES: Final = 256 << 20
"""256 MiB of batches that wait: some 70 of 32 groups of 8 samples of 1,024 tokens; a full disk's quarter of an hour."""

FIRST_RETRY_S: Final = 0.5
LONGEST_RETRY_S: Final = 30.0
"""Between tries of a disk that fails: space that comes back is used within half a minute."""

TIDY_DEADLINE_S: Final = 1.0
"""At the start; a file system that hangs keeps nobody waiting."""

SLOW_S: Final = 30.0
"""A batch that takes longer is named: a network file system that hangs does not fail."""


class TrainedState(Protocol):
    """What the archiver needs of the state."""

    @property
    def ledger(self) -> Ledger:
        """It has the batches that were trained on and not archived yet; the same object for the whole run."""
        ...

    @property
    def is_congested(self) -> bool:
        """Whether the state's own disk has no room."""
        ...

    def record(self, event: Event) -> None:
        """Apply the event and queue it for writing."""
        ...

    async def synced(self) -> None:
        """Return when everything recorded so far survives a power cut."""
        ...


@dataclass(frozen=True, slots=True)
class ArchiveStatistics:
    """How the archive stands.

    ``written``, ``given_up`` (batches) and ``damaged`` (groups that were lost on the disk before) count since the
    start; ``waiting`` batches are trained on and not archived, and hold ``waiting_bytes``; ``newest_step`` is that of
    the batch that was written last; ``fault`` says what is wrong, ``None`` if nothing is.
    """

    path: str
    format: str
    keep: int | None
    written: int
    given_up: int
    damaged: int
    waiting: int
    waiting_bytes: int
    newest_step: int | None
    fault: str | None


class Archiver:
    """See the module's invariants.

    Args:
        directory: of the archive; made where missing.
        format_: ``jsonl`` or ``parquet``.
        keep: batches that are kept; ``None``: all.
        state: has the batches, and records that one is written.
        changed: notified of every record.
        log: for what happened.
        max_waiting_bytes: see :data:`MAX_WAITING_BYTES`.
    """

    def __init__(
        self,
        *,
        directory: Path,
        format_: str,
        keep: int | None,
        state: TrainedState,
        changed: Broadcast,
        log: FilteringBoundLogger,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._directory = directory
        self._format = format_
        self._keep = keep
        self._state = state
        self._ledger = state.ledger
        self._changed = changed
        self._log = log
        self._max_waiting_bytes = max_waiting_bytes
        self._thread = anyio.CapacityLimiter(1)
        self._writing: BatchKey | None = None
        self._since = 0.0
        self._fault: str | None = None
        self._written = self._given_up = self._damaged = 0
        self._newest: int | None = None

    def statistics(self) -> ArchiveStatistics:
        """Counts of now."""
        batches = self._ledger.unarchived.batches.values()
        return ArchiveStatistics(
            path=str(self._directory),
            format=self._format,
            keep=self._keep,
            written=self._written,
            given_up=self._given_up,
            damaged=self._damaged,
            waiting=len(batches),
            waiting_bytes=sum(batch.frame_bytes for batch in batches),
            newest_step=self._newest,
            fault=self._fault or self._slowness(),
        )

    def _slowness(self) -> str | None:
        taken = anyio.current_time() - self._since
        if self._writing is None or taken < SLOW_S:
            return None
        return f"writing step {self._writing.step} has taken {taken:.0f} s: {self._directory} is slow or hangs"

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Archive until cancelled; what is not archived then waits in the state for the next start."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._bound)
            await self._tidy()
            task_status.started()
            while True:
                change = self._changed.next()
                ready = self._ready()
                if not ready:
                    await change.wait()
                    continue
                await self._state.synced()
                for batch in ready:
                    await self._archive(batch)

    def look(self, step: int, source: str | None, ends: int) -> StepSurvey:
        """A step with some of its samples; see :func:`~orchestrator.archive.survey.survey`. Blocks.

        Raises:
            ArchiveError: it is not in the archive, or cannot be read.
        """
        return survey(find_step(self._directory, step)[0], source=source, ends=ends)

    async def flush(self) -> None:
        """Return when everything that is acknowledged by now is archived or given up; the caller sets a deadline."""
        while True:
            change = self._changed.next()
            if not self._ready():
                return
            await change.wait()

    async def _tidy(self) -> None:
        with suppress(OSError), anyio.move_on_after(TIDY_DEADLINE_S):  # it is said where a batch cannot be written
            await anyio.to_thread.run_sync(
                remove_unfinished, self._directory, limiter=self._thread, abandon_on_cancel=True
            )

    def _ready(self) -> list[TrainedBatch]:
        leases = self._ledger.leases
        return self._ledger.unarchived.ready(leases.nonce, iter(leases.batches))

    # -- one batch -----------------------------------------------------------------------------------------------------

    async def _archive(self, batch: TrainedBatch) -> None:
        """Write one batch, however often it has to be tried; or come back where it was given up."""
        pause_s = FIRST_RETRY_S
        while batch.key in self._ledger.unarchived.batches:
            self._writing, self._since = batch.key, anyio.current_time()
            try:
                lost = await anyio.to_thread.run_sync(
                    write_batch, self._directory, batch, self._format, limiter=self._thread, abandon_on_cancel=True
                )
            except OSError as error:
                self._failed(error)
            else:
                self._note(batch, lost)
                await self._retain()
                return
            finally:
                self._writing = None
            self._relieve()
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _note(self, batch: TrainedBatch, lost: Written) -> None:
        if self._fault is not None:
            self._log.info(f"the archive can be written again: {self._directory}")
            self._fault = None
        if lost:
            self._damaged += len(lost)
            some = "; ".join(f"group {index}: {why}" for index, why in list(lost.items())[:3])
            self._log.error(f"archived step {batch.key.step} without {len(lost)} of its groups: {some}")
        if batch.key in self._ledger.unarchived.batches:
            self._state.record(Archived(*batch.key))
        self._written += 1
        self._newest = batch.key.step

    def _failed(self, error: OSError) -> None:
        fault = f"cannot write the archive {self._directory}: {error.strerror or error}"
        if fault != self._fault:
            self._fault = fault
            self._log.error(f"{fault}. Trained batches wait in the state: make space, or fix archive.path")

    async def _retain(self) -> None:
        if self._keep is None:
            return
        try:
            await anyio.to_thread.run_sync(
                remove_older, self._directory, self._keep, limiter=self._thread, abandon_on_cancel=True
            )
        except OSError as error:
            self._log.warning(f"could not remove old files of the archive, will retry: {error}")

    # -- the bound -----------------------------------------------------------------------------------------------------

    async def _bound(self) -> None:
        while True:
            change = self._changed.next()
            self._relieve()
            await change.wait()

    def _relieve(self) -> None:
        """Give up the oldest batches that wait, where there is no more room for them."""
        batches = self._ledger.unarchived.batches
        size = sum(batch.frame_bytes for batch in batches.values()) if len(batches) > 1 else 0
        most = 0 if self._fault is not None and self._state.is_congested else self._max_waiting_bytes
        if size <= most:
            return
        for batch in self._ready():
            if batch.key == self._writing:
                continue
            size -= batch.frame_bytes
            self._state.record(Archived(*batch.key, is_given_up=True))
            self._given_up += 1
            self._log.error(
                f"step {batch.key.step} will not be in the archive: {self._fault or self._slowness() or 'it is slow'},"
                " and no more batches can wait for it"
            )
            if size <= most:
                return
