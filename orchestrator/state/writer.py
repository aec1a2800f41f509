"""Writing the log: records are queued by the loop and written by a worker thread, many at a time.

Invariants:

* A record's place is fixed when it is queued. Writes are positional, so that a write that failed half-way (a full disk)
  is repeated at the same offset and leaves no hole and no double.
* Records become written in the order in which they were queued; ``written(seq)`` returns when everything up to
  ``seq`` has been given to the operating system, which then survives the end of this process.
* What is written is synced by one ``fdatasync`` within ``SYNC_WINDOW_S``.
* The loop never waits for the disk: every system call runs in a worker thread of aiofiles.
* A failing disk is not the end: the writer keeps what is queued, says why in ``fault``, and tries again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import aiofiles.os
import anyio
from anyio.abc import TaskStatus

from orchestrator.broadcast import Broadcast
from orchestrator.buffer import Place

from .segments import (
    RECORD_PREFIX_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordKind,
    encode_prefix,
    segment_header,
    segment_path,
)

__all__ = ["SEGMENT_BYTES", "LogPosition", "LogWriter"]

SEGMENT_BYTES: Final = 64 << 20
"""64 MiB: large enough that files are few, small enough that compaction gives space back in small slices."""

SYNC_WINDOW_S: Final = 0.05
"""Half of the 100 ms that the contract allows between a write and its sync."""

RETRY_S: Final = 0.5
"""Between attempts to write to a disk that failed: space that comes back is used within a second."""

MAX_BUFFERS_A_WRITE: Final = 512
"""Half of Linux' IOV_MAX."""

_open = aiofiles.os.wrap(os.open)
_pwritev = aiofiles.os.wrap(os.pwritev)
_fdatasync = aiofiles.os.wrap(os.fdatasync)
_fsync = aiofiles.os.wrap(os.fsync)
_close = aiofiles.os.wrap(os.close)


class LogPosition(NamedTuple):
    """A place between two records: segment number and byte offset."""

    segment: int
    offset: int


class _Queued(NamedTuple):
    segment: int
    offset: int
    buffers: tuple[bytes, ...]
    size: int


class LogWriter:
    """See the module's invariants.

    Args:
        directory: the state directory.
        segment: number of the first segment to write; it must not exist yet.
        segment_bytes: a segment is closed before it grows beyond this.
        on_written: called when records have been written.
    """

    def __init__(
        self,
        directory: Path,
        segment: int,
        segment_bytes: int = SEGMENT_BYTES,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._on_written = on_written
        self.segment_bytes = segment_bytes
        self._queue: deque[_Queued] = deque()
        self._end = LogPosition(segment, SEGMENT_HEADER_BYTES)
        self._fd: int | None = None
        self._fd_segment = -1
        self._queued_seq = 0
        self._written_seq = 0
        self._synced_seq = 0
        self._work = anyio.Event()
        self._progress = Broadcast()
        self._unsynced = anyio.Event()
        self._disk = anyio.Lock()
        self.backlog_bytes = 0
        self.written_bytes = 0
        self.fault: str | None = None
        self._queue_segment_header()

    @property
    def end(self) -> LogPosition:
        """Where the next record will be."""
        return self._end

    @property
    def sequence(self) -> int:
        """Number of the newest queued record."""
        return self._queued_seq

    def append(self, kind: RecordKind, body: bytes) -> Place:
        """Queue a record; returns where its body will lie. Never blocks."""
        size = RECORD_PREFIX_BYTES + len(body) + -len(body) % 8
        if self._end.offset > SEGMENT_HEADER_BYTES and self._end.offset + size > self.segment_bytes:
            self._end = LogPosition(self._end.segment + 1, SEGMENT_HEADER_BYTES)
            self._queue_segment_header()
        prefix = encode_prefix(kind, body)
        buffers = (prefix, body) if len(body) % 8 == 0 else (prefix, body, bytes(-len(body) % 8))
        segment, offset = self._end
        self._push(_Queued(segment, offset, buffers, size))
        self._end = LogPosition(segment, offset + size)
        return Place(segment, offset + RECORD_PREFIX_BYTES, len(body))

    def _queue_segment_header(self) -> None:
        header = segment_header(self._end.segment)
        self._push(_Queued(self._end.segment, 0, (header,), len(header)))

    def _push(self, item: _Queued) -> None:
        self._queue.append(item)
        self._queued_seq += 1
        self.backlog_bytes += item.size
        self._work.set()

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def written(self, sequence: int | None = None) -> None:
        """Return when everything up to ``sequence`` (default: all that is queued now) is written.

        Waits for as long as the disk fails (``fault`` says why): a caller with a deadline sets it.
        """
        target = self._queued_seq if sequence is None else sequence
        while self._written_seq < target:
            await self._progress.next().wait()

    async def synced(self, sequence: int | None = None) -> None:
        """Return when everything up to ``sequence`` is on the disk."""
        target = self._queued_seq if sequence is None else sequence
        while self._synced_seq < target:
            await self._progress.next().wait()

    # -- working -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Write and sync until cancelled; what is queued then is left to :meth:`flush`."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sync_loop)
            task_status.started()
            while True:
                await self._work.wait()
                self._work = anyio.Event()
                await self._drain()

    async def _sync_loop(self) -> None:
        while True:
            await self._unsynced.wait()
            self._unsynced = anyio.Event()
            await anyio.sleep(SYNC_WINDOW_S)
            await self._guarded_sync()

    async def _guarded_sync(self) -> None:
        async with self._disk:
            while self._synced_seq < self._written_seq:
                try:
                    await self._sync()
                except OSError as error:
                    self._failed("sync", error)
                    await anyio.sleep(RETRY_S)

    async def _drain(self) -> None:
        """Write all that is queued, however often the disk fails."""
        while self._queue:
            async with self._disk:
                try:
                    await self._write_some()
                    self.fault = None
                except OSError as error:
                    self._failed("write", error)
            if self.fault:
                await anyio.sleep(RETRY_S)

    def _failed(self, what: str, error: OSError) -> None:
        self.fault = f"cannot {what} the log in {self._directory}: {error.strerror or error}"
        self._progress.notify()

    async def _write_some(self) -> None:
        """Write the longest run of queued records that lies in one segment, up to the limit of buffers."""
        first = self._queue[0]
        run: list[_Queued] = []
        buffers: list[bytes] = []
        for item in self._queue:
            if item.segment != first.segment or len(buffers) >= MAX_BUFFERS_A_WRITE:
                break
            run.append(item)
            buffers.extend(item.buffers)
        fd = await self._file(first.segment)
        size = sum(item.size for item in run)
        offset = first.offset
        while size:
            done = await _pwritev(fd, buffers, offset)
            size, offset = size - done, offset + done
            if size:
                buffers = _after(buffers, done)
        for item in run:
            self._queue.popleft()
            self.backlog_bytes -= item.size
            self.written_bytes += item.size
        self._written_seq += len(run)
        self._unsynced.set()
        self._progress.notify()
        self._on_written()

    async def _file(self, segment: int) -> int:
        """The descriptor of a segment; the one before it is synced and closed first."""
        if self._fd is not None and self._fd_segment == segment:
            return self._fd
        if self._fd is not None:
            await self._sync()
            fd, self._fd = self._fd, None  # before the await: a cancelled close has closed it all the same
            await _close(fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._fd = await _open(segment_path(self._directory, segment), flags, 0o600)
        self._fd_segment = segment
        await sync_directory(self._directory)
        return self._fd

    async def _sync(self) -> None:
        target = self._written_seq
        if self._fd is not None:
            await _fdatasync(self._fd)
        self._synced_seq = target
        self._progress.notify()

    async def flush(self) -> None:
        """Write and sync everything; for the end, after :meth:`run` was cancelled. The caller sets a deadline."""
        await self._drain()
        await self._guarded_sync()

    async def aclose(self) -> None:
        """Close the file."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            await _close(fd)


def _after(buffers: list[bytes], done: int) -> list[bytes]:
    """What is left of the buffers after ``done`` bytes."""
    for i, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[i + 1 :]]
        done -= len(buffer)
    return []


async def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    fd = await _open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await _fsync(fd)
    finally:
        await _close(fd)
