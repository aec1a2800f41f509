"""A disk that fails: nothing is lost, it is said once with its name, and it ends by itself."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiofiles.os
import anyio
import anyio.lowlevel
import pytest
import structlog
from structlog.testing import LogCapture

from orchestrator.core.ledger.events import VersionSet
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.state import StateLock, StateStore, appender, snapshots, store
from orchestrator.state.appender import Appender, Queued
from orchestrator.state.recovery import recover
from orchestrator.state.segments import RecordKind, Segment, list_segments, segment_path
from orchestrator.state.snapshots import list_snapshots, snapshot_path
from orchestrator.state.writer import GATHER_BYTES, LogWriter

SIZES = {"easy": SourceSize(50)}


class Disk:
    """Real system calls, of which the named one fails for as long as ``error`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        real: Callable[..., object] = getattr(os, call)
        self.error: int | None = None
        self.calls = 0

        def maybe(*arguments: object) -> object:
            self.calls += 1
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments)

        monkeypatch.setattr(appender, f"_{call}", aiofiles.os.wrap(maybe))


@contextmanager
def faster_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.state.writer.RETRY_S", 0.01)
        patch.setattr(store, "SNAPSHOT_RETRY_S", 0.01)
        yield


@asynccontextmanager
async def running(writer: LogWriter) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        await tasks.start(writer.run)
        yield
        tasks.cancel_scope.cancel()
    await writer.aclose()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is a plain attribute
            await anyio.sleep(0.005)


async def test_what_a_failed_sync_may_have_lost_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops a page whose write-back failed, says so once, and the next sync succeeds without it."""
    path = segment_path(tmp_path, 1)
    synced = 0
    failures = 2

    def losing(fd: int) -> None:
        nonlocal synced, failures
        if failures and os.fstat(fd).st_size > 100:
            failures -= 1
            os.truncate(path, synced)
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)
        synced = os.fstat(fd).st_size

    monkeypatch.setattr(appender, "_fdatasync", aiofiles.os.wrap(losing))
    with faster_retries(monkeypatch):
        writer = LogWriter(tmp_path, 1)
        async with running(writer):
            writer.append(RecordKind.EVENT, b"before")
            await writer.synced()
            for i in range(300):
                writer.append(RecordKind.EVENT, b"record %d" % i)
            await writer.synced()
    bodies = [bytes(record.body) for record in Segment(tmp_path, 1).records()]
    assert bodies == [b"before", *(b"record %d" % i for i in range(300))]
    assert not failures


async def test_a_sync_whose_answer_was_not_seen_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop cancels a sync in its thread; its failure, which the kernel reports once, would go unseen."""
    started, go_on, failed = threading.Event(), threading.Event(), threading.Event()

    def hanging(fd: int) -> None:
        started.set()
        go_on.wait(20)
        os.truncate(segment_path(tmp_path, 1), 0)
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(appender, "_fdatasync", aiofiles.os.wrap(hanging))
    file = Appender(tmp_path)
    await file.open(1)
    await file.write([Queued(1, 0, (b"x" * 64,), 64)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(file.sync)
        await anyio.to_thread.run_sync(started.wait, 20)
        tasks.cancel_scope.cancel()
    go_on.set()
    await anyio.to_thread.run_sync(failed.wait, 20)
    monkeypatch.setattr(appender, "_fdatasync", aiofiles.os.wrap(os.fdatasync))
    await file.sync()
    await file.aclose()
    assert segment_path(tmp_path, 1).read_bytes() == b"x" * 64


async def test_writing_goes_on_while_syncing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts to sync the writer slept with the disk in its hand: every answer waited for that."""
    disk = Disk(monkeypatch, "fdatasync")
    monkeypatch.setattr("orchestrator.state.writer.RETRY_S", 3600.0)
    writer = LogWriter(tmp_path, 1)
    async with running(writer):
        disk.error = errno.EIO
        writer.append(RecordKind.EVENT, b"a")
        await until(lambda: disk.calls > 0)
        writer.append(RecordKind.EVENT, b"b")
        with anyio.fail_after(20):
            await writer.written()


@pytest.mark.parametrize("wait", [LogWriter.written, LogWriter.synced])
async def test_records_are_gathered_until_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[LogWriter], Awaitable[None]]
) -> None:
    monkeypatch.setattr("orchestrator.state.writer.GATHER_S", 3600.0)
    disk = Disk(monkeypatch, "pwritev")
    writer = LogWriter(tmp_path, 1)
    async with running(writer):
        with anyio.fail_after(20):
            await wait(writer)
            begun = disk.calls
            for times in range(1, 4):
                for i in range(20):
                    writer.append(RecordKind.EVENT, b"record %d" % i)
                    await anyio.lowlevel.checkpoint()
                assert disk.calls == begun + times - 1
                await wait(writer)
                assert disk.calls == begun + times


async def test_what_nobody_waits_for_is_written_all_the_same(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, 1)
    async with running(writer):
        writer.append(RecordKind.EVENT, b"a")
        await until(lambda: writer.queued_bytes == 0)


async def test_as_much_as_a_write_should_have_is_not_kept_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.state.writer.GATHER_S", 3600.0)
    writer = LogWriter(tmp_path, 1)
    async with running(writer):
        writer.append(RecordKind.GROUP, bytes(GATHER_BYTES))
        await until(lambda: writer.queued_bytes == 0)


@asynccontextmanager
async def opened(directory: Path, log: LogCapture | None = None) -> AsyncIterator[StateStore]:
    logger = None if log is None else structlog.wrap_logger(None, processors=[log])
    state = await StateStore.open(directory, SIZES, log=logger)
    async with anyio.create_task_group() as tasks:
        await tasks.start(state.run)
        yield state
        tasks.cancel_scope.cancel()
    await state.aclose()


@pytest.mark.parametrize(("call", "words"), [("pwritev", "write the log"), ("fdatasync", "sync the log")])
async def test_a_fault_is_logged_once_and_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, words: str
) -> None:
    disk = Disk(monkeypatch, call)
    log = LogCapture()
    with faster_retries(monkeypatch):
        async with opened(tmp_path, log) as state:
            disk.error = errno.EIO
            state.record(VersionSet(1))
            await until(lambda: disk.calls > 8)
            assert state.fault is not None
            assert words in state.fault
            assert state.statistics().fault == state.fault
            [entry] = log.entries
            assert entry["log_level"] == "error"
            assert "EIO" in entry["event"]
            assert "copy the state directory to another disk" in entry["event"]
            disk.error = None
            await until(lambda: state.fault is None)  # nothing more is recorded
            assert "written again" in log.entries[1]["event"]
            assert len(log.entries) == 2
    ledger, _ = recover(tmp_path, SIZES, "x")
    assert ledger.policy_version == 1


async def test_a_snapshot_that_failed_is_tried_again_without_a_new_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    broken = True

    def failing(old: Path, new: Path) -> None:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(aiofiles.os, "replace", aiofiles.os.wrap(failing))
    with faster_retries(monkeypatch):
        async with opened(tmp_path) as state:
            assert state.fault is not None
            assert "write a snapshot" in state.fault
            assert not list_snapshots(tmp_path)
            assert not list(tmp_path.glob("*.tmp")), "on a full disk its space is needed"
            broken = False
            await until(lambda: state.fault is None)
            assert list_snapshots(tmp_path)


async def test_the_last_snapshot_does_not_meet_the_one_that_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled snapshot may still be at work in its thread: it must not write into the last one's file."""
    at_work, go_on, done = threading.Event(), threading.Event(), threading.Event()
    real = os.replace

    def held_up(old: Path, new: Path) -> None:
        at_work.set()
        go_on.wait(20)
        real(old, new)
        done.set()

    async with opened(tmp_path) as state:
        state.record(VersionSet(1))
        monkeypatch.setattr(aiofiles.os, "replace", aiofiles.os.wrap(held_up))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(state.snapshot)
            await anyio.to_thread.run_sync(at_work.wait, 20)
            tasks.cancel_scope.cancel()
        monkeypatch.setattr(aiofiles.os, "replace", aiofiles.os.wrap(real))
        state.record(VersionSet(2))
        assert await state.snapshot()
        newest = snapshot_path(tmp_path, list_snapshots(tmp_path)[0])
        text = newest.read_bytes()
        go_on.set()
        assert await anyio.to_thread.run_sync(done.wait, 10), "its temporary file was taken by the other one"
        assert newest.read_bytes() == text
        ledger, recovery = recover(tmp_path, SIZES, "x")
        assert (ledger.policy_version, recovery.problems) == (2, [])


async def test_closing_says_whether_the_last_snapshot_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await StateStore.open(tmp_path, SIZES)
    state.record(VersionSet(1))
    assert await state.aclose() is True
    state = await StateStore.open(tmp_path, SIZES)
    state.record(VersionSet(2))

    async def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(snapshots, "sync_directory", broken)
    assert await state.aclose() is False
    assert state.fault is not None
    assert "EIO" in state.fault
    ledger, _ = recover(tmp_path, SIZES, "x")
    assert ledger.policy_version == 2, "the log has it"


async def test_a_daemon_starts_on_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as state:
        state.record(VersionSet(4))
    disk = Disk(monkeypatch, "pwritev")
    disk.error = errno.ENOSPC
    monkeypatch.setattr(store, "FIRST_SNAPSHOT_DEADLINE_S", 0.05)
    with faster_retries(monkeypatch):
        async with opened(tmp_path) as state:
            assert state.ledger.policy_version == 4
            assert state.fault is not None
            disk.error = None
            await until(lambda: state.fault is None)


async def test_what_a_crash_left_of_a_snapshot_is_removed(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    left = tmp_path / "snapshot-00000099.tmp"
    left.write_bytes(b"half")
    recover(tmp_path, SIZES, "x")
    assert not left.exists()


async def test_a_full_disk_does_not_keep_the_lock_from_being_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with StateLock(tmp_path):
        pass


async def test_a_log_of_many_segments_is_synced_before_the_next_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, "fdatasync")
    with faster_retries(monkeypatch):
        writer = LogWriter(tmp_path, 1, segment_bytes=256)
        async with running(writer):
            disk.error = errno.EIO
            for i in range(20):
                writer.append(RecordKind.EVENT, b"record %d" % i)
            await until(lambda: disk.calls > 3)
            assert list_segments(tmp_path) == [1]
            disk.error = None
            await writer.synced()
    bodies = [
        bytes(record.body)
        for number in list_segments(tmp_path)
        for record in Segment(tmp_path, number).records()
        if record.kind is RecordKind.EVENT
    ]
    assert bodies == [b"record %d" % i for i in range(20)]


async def test_a_full_disk_costs_the_reserve_and_launching_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the reserve is there the disk is full for nobody but new groups."""
    path = tmp_path / "reserve"
    real = os.pwritev
    is_full = False

    def limited(fd: int, buffers: list[bytes], offset: int) -> int:
        if is_full and path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, buffers, offset)

    real_statvfs = os.statvfs

    def statvfs(where: Path) -> os.statvfs_result:
        found = real_statvfs(where)
        return os.statvfs_result((*found[:4], 0, *found[5:])) if is_full else found

    monkeypatch.setattr(appender, "_pwritev", aiofiles.os.wrap(limited))
    monkeypatch.setattr(os, "statvfs", statvfs)
    log = LogCapture()
    with faster_retries(monkeypatch):
        async with opened(tmp_path, log) as state:
            assert path.exists()
            assert not state.is_congested
            is_full = True
            state.record(VersionSet(1))
            with anyio.fail_after(20):
                await state.written()
            assert state.is_congested
            assert not path.exists()
            assert state.fault is not None
            assert "reserve" in state.fault
            assert "ENOSPC" in log.entries[0]["event"]
            assert "make space" in log.entries[0]["event"]
            is_full = False
            await until(lambda: state.fault is None)
            assert not state.is_congested
            assert path.exists()


async def test_no_snapshot_refers_to_records_that_are_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, "fdatasync")
    with faster_retries(monkeypatch):
        async with opened(tmp_path) as state:
            before = list_snapshots(tmp_path)
            disk.error = errno.EIO
            state.record(VersionSet(1))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(state.snapshot)
                await until(lambda: disk.calls > 10)
                assert list_snapshots(tmp_path) == before
                disk.error = None
            assert list_snapshots(tmp_path) != before
