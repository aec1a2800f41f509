"""The state store: the ledger with its log, its snapshots and its compaction.

Invariants:

* **Applied at once, written in order**: a change is applied to the ledger and queued for the log in one step without an
  await between; whoever tells the outside about it awaits ``written()`` first.
* A snapshot is the ledger between two records; it is written once these records are synced.
* A segment is removed only when neither of the two kept snapshots, nor the log after them, needs it.
* Compaction copies the live frames of sparse segments to the end of the log, a few at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiofiles.os
import anyio
import msgspec
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.events import Archived, CheckpointLoaded, Event, Launched, LeaseAcked, encode_event
from orchestrator.core.ledger.groups import GroupFacts, LocatedFrames, Place, StoredGroup
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.errors import StateError

from .checkpoints import check_name, save_checkpoint
from .compaction import copies, slices, sparse_frames
from .faults import DiskFaults, Operation
from .readers import SegmentReaders
from .recovery import AS_CONFIGURED, OpenCheckpoint, Recovery, SourceRules, open_checkpoint, recover
from .reserve import NO_ROOM, Reserve, in_flight_bytes
from .segments import MOVED_HEADER_BYTES, RecordKind, list_segments, segment_path
from .snapshots import KEPT_SNAPSHOTS, Kept, kept_by, list_snapshots, remove_old_snapshots, write_snapshot
from .writer import SEGMENT_BYTES, LogWriter, StateStatistics

__all__ = ["StateStore"]

SNAPSHOT_LOG_BYTES: Final = 64 << 20
"""A snapshot after this much new log: a restart replays at most that."""

SNAPSHOT_INTERVAL_S: Final = 30.0
"""A snapshot at least this often while anything is recorded."""

SNAPSHOT_RETRY_S: Final = 1.0
"""After a snapshot that failed: space that comes back is used within seconds."""

FIRST_SNAPSHOT_DEADLINE_S: Final = 5.0
"""A daemon whose disk fails at the start serves what it has read back."""

MAX_BACKLOG_BYTES: Final = 256 << 20
"""Launching stops while more than this waits for the disk, and goes on at half of it."""


class _Capture(NamedTuple):
    """A snapshot before it is written."""

    data: dict[str, Any]
    sequence: int


def _encode(data: dict[str, Any]) -> tuple[bytes, Kept]:
    return msgspec.json.encode(data), kept_by(data)


class StateStore:
    """A :class:`~..core.ledger.journal.Journal`: :meth:`open` it, :meth:`run` it in a task, :meth:`aclose` it."""

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        recovery: Recovery,
        changed: Broadcast,
        replan: Broadcast,
        segment_bytes: int,
        log: FilteringBoundLogger | None = None,
        on_record: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self._on_record = on_record
        self.ledger = ledger
        self.recovery = recovery
        self._faults = DiskFaults(directory, log)
        self._reserve = Reserve(directory, self._faults)
        self._writer = LogWriter(
            directory,
            recovery.next_segment,
            segment_bytes,
            on_written=self._relieve,
            faults=self._faults,
            previous=recovery.end,
            make_room=self._make_room,
        )
        self._readers = SegmentReaders(directory)
        self._next_snapshot = max(list_snapshots(directory), default=0) + 1
        self._segments = {*list_segments(directory), recovery.next_segment}  # counted here: a status reads no disk
        self._previous = recovery.kept
        self._snapshot_from = self._writer.written_bytes
        self._recorded = anyio.Event()
        self._grown = anyio.Event()
        self._snapshot_lock = anyio.Lock()
        self._snapshots = 0
        self._congested = False
        self._changed = changed
        self._replan = replan
        for drop in recovery.drops:  # applied already: a restart of the restart has to find them here
            self._append_event(drop)

    @classmethod
    async def open(
        cls,
        directory: Path,
        sizes: dict[str, SourceSize],
        *,
        changed: Broadcast | None = None,
        replan: Broadcast | None = None,
        segment_bytes: int | None = None,
        log: FilteringBoundLogger | None = None,
        on_record: Callable[[Event], None] = lambda _: None,
        rules: SourceRules = AS_CONFIGURED,
    ) -> StateStore:
        """Recover the state of a directory whose lock is held.

        Args:
            directory: of the state.
            sizes: the sources of the config.
            changed: notified of every record.
            replan: notified of the records that may change what is asked of producers.
            segment_bytes: of the log's files; ``None``: :data:`SEGMENT_BYTES`.
            log: where faults of the disk are logged; without one they are in :attr:`fault` alone.
            on_record: told of every event once it is recorded; it must not raise.
            rules: how the sources of the state and those of the config come together.

        Raises:
            ForeignState, CorruptState, StateError: see :func:`~orchestrator.state.recovery.recover`.
        """
        ledger, recovery = await anyio.to_thread.run_sync(recover, directory, sizes, secrets.token_hex(4), rules)
        size = SEGMENT_BYTES if segment_bytes is None else segment_bytes
        return cls(directory, ledger, recovery, changed or Broadcast(), replan or Broadcast(), size, log, on_record)

    # -- the journal ---------------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """Apply the event and queue it for the log.

        Raises:
            VersionWentBack, CorruptState: the event does not fit; nothing is recorded.
        """
        self.ledger.apply(event)
        self._append_event(event)
        if not isinstance(event, Launched | LeaseAcked | Archived):
            self._replan.notify()

    def store_group(self, frame: bytes, facts: GroupFacts | None = None, prefix: bytes | None = None) -> StoredGroup:
        """A finished group enters its source's buffer; see :class:`~..core.ledger.journal.Journal`."""
        place = self._append(RecordKind.GROUP, frame, prefix)
        revision = self.ledger.plan_revision
        stored = StoredGroup.from_frame(frame, place) if facts is None else StoredGroup.of(facts, frame, place)
        self.ledger.put_stored(stored)
        if self.ledger.plan_revision != revision:  # it was one of a source's last: others may have to stand in
            self._replan.notify()
        return stored

    def store_partial(self, frame: bytes) -> None:
        """A group in flight gained a partial frame."""
        place = self._append(RecordKind.PARTIAL, frame)
        self.ledger.put_partial(frame, place)

    @property
    def mark(self) -> int:
        """Rises with every record."""
        return self._writer.sequence

    async def written(self, mark: int | None = None) -> None:
        """Return when everything recorded so far, or up to ``mark``, survives the end of this process."""
        await self._writer.written(mark)

    async def synced(self) -> None:
        """Return when everything recorded so far survives a power cut."""
        await self._writer.synced(self._writer.sequence)

    def _append_event(self, event: Event) -> None:
        self._append(RecordKind.EVENT, encode_event(event))
        self._on_record(event)

    def _append(self, kind: RecordKind, body: bytes, prefix: bytes | None = None) -> Place:
        place = self._writer.append(kind, body, prefix)
        self._segments.add(place.segment)
        self._recorded.set()
        if self._writer.written_bytes + self._writer.queued_bytes - self._snapshot_from > SNAPSHOT_LOG_BYTES:
            self._grown.set()
        self._changed.notify()
        return place

    async def located(self, groups: Sequence[StoredGroup]) -> LocatedFrames | None:
        """Where the frames of groups can be read; ``None`` where not all can be.

        Not those that compaction is just moving, and none while the disk has a fault: what it could not sync it may
        have lost.
        """
        return await self._readers.located(
            groups, self._segments, lambda place: self.fault is None and self._writer.is_written(place)
        )

    @property
    def is_congested(self) -> bool:
        """Whether the disk is full, or so much waits for it, that nothing new should be begun."""
        if self._writer.backlog_bytes > MAX_BACKLOG_BYTES or not self._reserve.is_kept:
            self._congested = True
        return self._congested

    def _relieve(self) -> None:
        """The disk has caught up, or has room again: what was held back may begin."""
        if self._congested and self._writer.backlog_bytes < MAX_BACKLOG_BYTES / 2 and self._reserve.is_kept:
            self._congested = False
            self._replan.notify()

    async def _make_room(self) -> bool:
        """The disk is full: give the reserve up, and let snapshots give back what is acknowledged."""
        self._recorded.set()
        self._grown.set()
        return await self._reserve.give_up()

    @property
    def fault(self) -> str | None:
        """What is wrong with the disk, in a sentence; ``None`` if nothing is."""
        return self._faults.current

    def statistics(self) -> StateStatistics:
        """Counts since the start."""
        return StateStatistics(
            written_bytes=self._writer.written_bytes,
            backlog_bytes=self._writer.backlog_bytes,
            snapshots=self._snapshots,
            segments=len(self._segments),
            fault=self.fault,
        )

    # -- working -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Write, sync, snapshot and compact until cancelled.

        Ready once the state read back is snapshotted anew; where the disk fails, after a while without.
        """
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._writer.run)
            await self._reserve.keep(in_flight_bytes(self.ledger))
            with anyio.move_on_after(FIRST_SNAPSHOT_DEADLINE_S):
                await self.snapshot()
            task_status.started()
            await self._snapshot_loop()

    async def _snapshot_loop(self) -> None:
        while True:
            if self.fault is None:
                await self._recorded.wait()
                with anyio.move_on_after(SNAPSHOT_INTERVAL_S):
                    await self._grown.wait()
            else:  # also where nothing is recorded: the fault has to end, and old segments give space back
                await anyio.sleep(SNAPSHOT_RETRY_S)
            await self._reserve.keep(in_flight_bytes(self.ledger))
            self._relieve()
            if await self.snapshot() and self.fault is None:
                await self.compact()

    async def snapshot(self) -> bool:
        """Write a snapshot of this moment; whether it succeeded (``fault`` says why not)."""
        async with self._snapshot_lock:
            is_written = False
            capture = self._capture()
            number, self._next_snapshot = self._next_snapshot, self._next_snapshot + 1
            try:
                data, kept = await anyio.to_thread.run_sync(_encode, capture.data)
                await self._writer.synced(capture.sequence)
                with self._faults.watching(Operation.SNAPSHOT):
                    await write_snapshot(self.directory, number, data)
                is_written = True
                self._snapshots += 1
                with self._faults.watching(Operation.REMOVE):
                    await remove_old_snapshots(self.directory)
                    await self._remove_segments(kept)
                self._previous = kept
            except OSError as error:  # it is in `fault`, and the loop tries again
                if error.errno in NO_ROOM:
                    await self._make_room()
            return is_written

    def _capture(self) -> _Capture:
        """This moment, between two records; nothing in it changes any more, so that a worker thread may encode it."""
        data = {"position": self._writer.end, "ledger": self.ledger.snapshot()}
        self._recorded = anyio.Event()
        self._grown = anyio.Event()
        self._snapshot_from = self._writer.queued_bytes + self._writer.written_bytes
        return _Capture(data, self._writer.sequence)

    async def _remove_segments(self, newest: Kept) -> None:
        """Remove the segments that neither of the two kept snapshots needs."""
        replayed_from = min(newest.replayed_from, self._previous.replayed_from)
        for number in sorted(self._segments):
            if number < replayed_from and number not in newest.frames | self._previous.frames:
                with suppress(FileNotFoundError):
                    await aiofiles.os.unlink(segment_path(self.directory, number))
                self._segments.discard(number)
                self._readers.forget(number)

    async def compact(self) -> None:
        """Copy the live frames of sparse segments to the end; the next snapshots let the segments go."""
        groups, partials = self.ledger.held()
        sparse = await anyio.to_thread.run_sync(
            sparse_frames, groups, partials, self._writer.end.segment, self._writer.segment_bytes
        )
        for some in slices(sparse):
            for old, prefix, body in await anyio.to_thread.run_sync(copies, some):
                place = self._append(RecordKind.MOVED, body, prefix)
                self.ledger.move(memoryview(body)[MOVED_HEADER_BYTES:], old, place)
            await self.written()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    async def save_checkpoint(self, name: str) -> None:
        """Make a checkpoint of this moment.

        Raises:
            BadRequest: it cannot be a checkpoint's name.
            StateError: the disk failed.
        """
        check_name(name)
        async with self._snapshot_lock:
            data, sequence = {"position": self._writer.end, "ledger": self.ledger.snapshot()}, self._writer.sequence
            text, kept = await anyio.to_thread.run_sync(_encode, data)
            await self._writer.synced(sequence)
            try:
                await anyio.to_thread.run_sync(save_checkpoint, self.directory, name, text, kept.frames)
            except OSError as error:
                raise StateError(f"checkpoint {name!r} was not saved: {error}") from error

    async def check_checkpoint(self, name: str) -> None:
        """Look whether a checkpoint can be loaded; raises as :meth:`load_checkpoint`."""
        await self._open_checkpoint(name)

    async def _open_checkpoint(self, name: str) -> OpenCheckpoint:
        sizes = {source: SourceSize(state.rows, state.epochs) for source, state in self.ledger.sources.items()}
        look = partial(open_checkpoint, self.directory, name, sizes, end=self._writer.end.segment)
        return await anyio.to_thread.run_sync(look)

    async def load_checkpoint(self, name: str) -> None:
        """Go back to a checkpoint: nothing of what the daemon holds is left. Nobody may record anything meanwhile.

        Raises:
            BadRequest: it cannot be a checkpoint's name.
            CheckpointError: there is none of that name, it is damaged, or of another state.
            ForeignState: it is of other sources.
            StateError: the disk failed, or it is of another format; nothing has changed.
        """
        nonce = secrets.token_hex(4)
        async with self._snapshot_lock:
            opened = await self._open_checkpoint(name)
            self.ledger.restore(opened.data["ledger"], opened.segments.frame, nonce)
            self._segments.update(kept_by(opened.data).frames)
            self._append_event(CheckpointLoaded(name, nonce, opened.checksum))
            self._replan.notify()
        for _ in range(KEPT_SNAPSHOTS):  # so that stepping over a damaged one does not undo it
            await self.snapshot()

    async def aclose(self) -> bool:
        """Write and sync what is queued, and a last snapshot; the caller sets the deadline and shields.

        Returns:
            Whether the snapshot was written; if not, the next start replays the log, and ``fault`` says why.
        """
        try:
            await self._writer.flush()
            return await self.snapshot()
        finally:
            self._readers.close()
            await self._writer.aclose()
