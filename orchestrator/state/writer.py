"""Writing the log: records are queued by the loop and written by a worker thread, many at a time.

Invariants:

* A record's place is fixed when it is queued. Writes are positional, so that a write that failed half-way (a full disk)
  is repeated at the same offset and leaves no hole and no double.
* Records become written in the order in which they were queued; ``written(seq)`` returns when everything up to
  ``seq`` has been given to the operating system, which then survives the end of this process.
* Records that somebody waits for are written at once. Others are gathered for ``GATHER_S``: a write, however small,
  costs a worker thread's waking up and the loop's, which is more than writing a finished group does.
* What is written is synced by one ``fdatasync`` within ``SYNC_WINDOW_S``.
* The loop never waits for the disk: every system call runs in a worker thread of aiofiles.
* A failing disk is not the end: the writer keeps what is queued or not synced, says why in ``faults``, and tries again
  until it succeeds. Between attempts nothing is held up that could go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskStatus

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.groups import Place

from .appender import MAX_BUFFERS_A_WRITE, Appender, Queued
from .faults import DiskFaults, Operation
from .reserve import NO_ROOM
from .segments import RECORD_PREFIX_BYTES, LogPosition, RecordKind, encode_continues, encode_prefix, segment_header

__all__ = ["SEGMENT_BYTES", "LogWriter", "StateStatistics"]

SEGMENT_BYTES: Final = 64 << 20
"""64 MiB: large enough that files are few, small enough that compaction gives space back in small slices."""

SYNC_WINDOW_S: Final = 0.05
"""Half of the 100 ms that the contract allows between a write and its sync."""

GATHER_S: Final = 0.02
"""With the window of the sync less than the 100 ms of the contract; a write then has tens of small groups."""

GATHER_BYTES: Final = 4 << 20
"""As much is written without waiting for more: larger writes cost no less a byte, and would hold up urgent records."""

RETRY_S: Final = 0.5
"""Between attempts to write to a disk that failed: space that comes back is used within a second."""

MAX_RECORDS_A_WRITE: Final = MAX_BUFFERS_A_WRITE // 3
"""A record has at most three buffers: prefix, body, padding."""


@dataclass(frozen=True, slots=True)
class StateStatistics:
    """Counts of the state store since the start.

    ``written_bytes``: given to the operating system; ``backlog_bytes``: kept until they are synced; ``snapshots``:
    written; ``segments``: files of the log; ``fault``: what is wrong with the disk, ``None`` if nothing is.
    """

    written_bytes: int
    backlog_bytes: int
    snapshots: int
    segments: int
    fault: str | None


class LogWriter:
    """See the module's invariants.

    Args:
        directory: the state directory.
        segment: number of the first segment to write; it must not exist yet.
        segment_bytes: a segment is closed before it grows beyond this.
        on_written: called when records have been written.
        faults: told how writing and syncing go.
        previous: the end of the log so far; ``None`` if there is none.
        make_room: called when the disk is full; whether it is worth another try at once.
    """

    def __init__(
        self,
        directory: Path,
        segment: int,
        segment_bytes: int = SEGMENT_BYTES,
        on_written: Callable[[], None] = lambda: None,
        faults: DiskFaults | None = None,
        previous: LogPosition | None = None,
        make_room: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._on_written = on_written
        self._make_room = make_room
        self._faults = faults or DiskFaults(directory)
        self.segment_bytes = segment_bytes
        self._queue: deque[Queued] = deque()
        self._end = LogPosition(segment, 0)
        self._is_empty = True
        self._file = Appender(directory)
        self._queued_seq = 0
        self._recorded_seq = 0
        self._taken_seq = 0  # what is queued up to here is being written, or is
        self._written_seq = 0
        self._synced_seq = 0
        self._work = anyio.Event()
        self._urgent = anyio.Event()
        self._progress = Broadcast()
        self._unsynced = anyio.Event()
        self._disk = anyio.Lock()
        self.queued_bytes = 0
        self.written_bytes = 0
        self._begin_segment(segment, previous)

    @property
    def end(self) -> LogPosition:
        """Where the next record will be."""
        return self._end

    def is_written(self, place: Place) -> bool:
        """Whether the record of that place has been given to the operating system."""
        return not self._queue or (place.segment, place.offset) < (self._queue[0].segment, self._queue[0].offset)

    @property
    def sequence(self) -> int:
        """Number of the newest queued record."""
        return self._queued_seq

    @property
    def backlog_bytes(self) -> int:
        """What is kept in memory until the disk has it: queued, or written and not synced."""
        return self.queued_bytes + self._file.unsynced_bytes

    def append(self, kind: RecordKind, body: bytes, prefix: bytes | None = None) -> Place:
        """Queue a record; returns where its body will lie. Never blocks.

        Args:
            kind: of the record.
            body: of the record.
            prefix: if :func:`~orchestrator.state.segments.encode_prefix` was called in a worker thread.
        """
        size = RECORD_PREFIX_BYTES + len(body) + -len(body) % 8
        if not self._is_empty and self._end.offset + size > self.segment_bytes:
            self._begin_segment(self._end.segment + 1, self._end)
        self._is_empty = False
        place = self._put(kind, body, size, prefix)
        self._recorded_seq = self._queued_seq
        return place

    def _begin_segment(self, number: int, previous: LogPosition | None) -> None:
        header = segment_header(number)
        self._push(Queued(number, 0, (header,), len(header)))
        self._end = LogPosition(number, len(header))
        if previous is not None:
            body = encode_continues(previous)
            self._put(RecordKind.CONTINUES, body, RECORD_PREFIX_BYTES + len(body))
        self._is_empty = True

    def _put(self, kind: RecordKind, body: bytes, size: int, prefix: bytes | None = None) -> Place:
        prefix = prefix or encode_prefix(kind, body)
        buffers = (prefix, body) if len(body) % 8 == 0 else (prefix, body, bytes(-len(body) % 8))
        segment, offset = self._end
        self._push(Queued(segment, offset, buffers, size))
        self._end = LogPosition(segment, offset + size)
        return Place(segment, offset + RECORD_PREFIX_BYTES, len(body))

    def _push(self, item: Queued) -> None:
        self._queue.append(item)
        self._queued_seq += 1
        self.queued_bytes += item.size
        self._work.set()
        if self.queued_bytes > GATHER_BYTES:
            self._urgent.set()

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def written(self, sequence: int | None = None) -> None:
        """Return when everything up to ``sequence`` (default: the newest record) is written.

        A daemon that has begun a new segment on a full disk, and has recorded nothing yet, may say what it holds.

        Waits for as long as the disk fails (``faults`` says why): a caller with a deadline sets it.
        """
        target = self._recorded_seq if sequence is None else sequence
        self._hurry(target)
        while self._written_seq < target:
            await self._progress.next().wait()

    async def synced(self, sequence: int | None = None) -> None:
        """Return when everything up to ``sequence`` is on the disk."""
        target = self._queued_seq if sequence is None else sequence
        self._hurry(target)
        while self._synced_seq < target:
            await self._progress.next().wait()

    def _hurry(self, sequence: int) -> None:
        """Somebody waits for what is queued up to ``sequence``."""
        if sequence > self._taken_seq:
            self._urgent.set()

    # -- working -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Write and sync until cancelled; what is queued then is left to :meth:`flush`."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sync_loop)
            task_status.started()
            while True:
                await self._work.wait()
                if not self._urgent.is_set():
                    with anyio.move_on_after(GATHER_S):
                        await self._urgent.wait()
                self._work, self._urgent = anyio.Event(), anyio.Event()
                self._taken_seq = self._queued_seq
                await self._write(self._taken_seq)

    async def _sync_loop(self) -> None:
        while True:
            await self._unsynced.wait()
            self._unsynced = anyio.Event()
            await anyio.sleep(SYNC_WINDOW_S)
            await self._sync_all()

    async def _write(self, sequence: int) -> None:
        """Write all that is queued up to ``sequence``, however often the disk fails."""
        while self._written_seq < sequence:
            try:
                async with self._disk:
                    await self._write_some()
            except OSError as error:
                await self._before_retry(error)

    async def _sync_all(self) -> None:
        """Sync all that is written, however often the disk fails."""
        while self._synced_seq < self._written_seq:
            try:
                async with self._disk:
                    await self._sync()
            except OSError as error:
                await self._before_retry(error)

    async def _before_retry(self, error: OSError) -> None:
        if error.errno in NO_ROOM and self._make_room is not None and await self._make_room():
            return
        await anyio.sleep(RETRY_S)

    async def _write_some(self) -> None:
        """Write the longest run of queued records that lies in one segment, up to the limit of buffers."""
        segment = self._queue[0].segment
        run = list(takewhile(lambda item: item.segment == segment, self._first_queued()))
        if not self._file.is_open(segment):
            await self._sync()
        with self._faults.watching(Operation.WRITE):
            if not self._file.is_open(segment):
                await self._file.open(segment)
            await self._file.write(run)
        for item in run:
            self._queue.popleft()
            self.queued_bytes -= item.size
            self.written_bytes += item.size
        self._written_seq += len(run)
        self._unsynced.set()
        self._progress.notify()
        self._on_written()

    def _first_queued(self) -> list[Queued]:
        return [self._queue[i] for i in range(min(len(self._queue), MAX_RECORDS_A_WRITE))]

    async def _sync(self) -> None:
        target = self._written_seq
        with self._faults.watching(Operation.SYNC):
            await self._file.sync()
        self._synced_seq = target
        self._progress.notify()
        self._on_written()

    async def flush(self) -> None:
        """Write and sync everything; for the end, after :meth:`run` was cancelled. The caller sets a deadline."""
        await self._write(self._queued_seq)
        await self._sync_all()

    async def aclose(self) -> None:
        """Close the file."""
        await self._file.aclose()
