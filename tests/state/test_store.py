"""State on disk: what was written is there after a restart; what is damaged is found, named and never used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import anyio
import pytest

from orchestrator.core.ledger.events import Dropped, LeaseAcked
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.errors import AlreadyRunning, CorruptState, ForeignState
from orchestrator.state import StateLock, StateStore
from orchestrator.state.recovery import recover
from orchestrator.state.segments import list_segments, segment_path
from orchestrator.state.snapshots import list_snapshots, snapshot_path
from tests.support.state_histories import SIZES, act, facts, opened


@pytest.mark.parametrize("seed", range(6))
async def test_a_copy_of_the_files_at_any_moment_is_the_state_at_that_moment(tmp_path: Path, seed: int) -> None:
    """What `written()` has returned for survives the end of the process: a copy of the directory recovers to it."""
    rng = random.Random(seed)
    directory = tmp_path / "state"
    directory.mkdir()
    async with opened(directory, segment_bytes=8192) as store:
        for moment in range(12):
            for _ in range(rng.randrange(1, 40)):
                act(store, rng)
            if rng.random() < 0.4:
                await store.snapshot()
                await store.compact()
            await store.written()
            expected = facts(store.ledger)
            copy = tmp_path / f"copy-{moment}"
            shutil.copytree(directory, copy)
            recovered, recovery = recover(copy, SIZES, "x")
            assert not recovery.problems
            assert facts(recovered) == expected
    recovered, recovery = recover(directory, SIZES, "x")
    assert facts(recovered) == facts(store.ledger)
    assert recovery.records == 0, "a clean stop leaves nothing to replay"


async def test_compaction_gives_space_back_and_keeps_every_live_frame(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=16384) as store:
        rng = random.Random(1)
        for _ in range(400):
            act(store, rng)
        await store.written()
        for state in store.ledger.sources.values():  # leave a few frames in each old segment
            for index in list(state.ready)[2:]:
                store.record(Dropped(state.name, index, "stale", [], False))
        for batch in list(store.ledger.leases.batches.values()):
            store.record(LeaseAcked(batch.step, 0))
        before = facts(store.ledger)
        size = sum(path.stat().st_size for path in tmp_path.glob("log-*"))
        for _ in range(3):
            await store.snapshot()
            await store.compact()
        await store.snapshot()
        assert facts(store.ledger) == before
        assert sum(path.stat().st_size for path in tmp_path.glob("log-*")) < size / 3
    recovered, _ = recover(tmp_path, SIZES, "x")
    assert facts(recovered) == before


async def _some_state(directory: Path) -> list[dict[str, object]]:
    """A log without a snapshot after it; returns the facts after each record, in order."""
    history = []
    store = await StateStore.open(directory, SIZES)
    history.append(facts(store.ledger))
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        rng = random.Random(3)
        for _ in range(25):
            act(store, rng)
            history.append(facts(store.ledger))
        await store.written()
        tasks.cancel_scope.cancel()
    return history


async def test_a_log_cut_at_any_length_recovers_to_a_moment_that_was(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    history = await _some_state(original)
    last = segment_path(original, list_segments(original)[-1])
    size = last.stat().st_size
    reached = set()
    for length in range(16, size, 37):
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        with segment_path(copy, list_segments(copy)[-1]).open("r+b") as file:
            file.truncate(length)
        recovered, _ = recover(copy, SIZES, "x")
        moment = facts(recovered)
        assert moment in history
        reached.add(history.index(moment))
        again, recovery = recover(copy, SIZES, "x")
        assert facts(again) == moment
        assert not recovery.problems, "the torn tail was cut off for good"
        shutil.rmtree(copy)
    assert len(reached) > 15, "cuts at different lengths reach different moments"


async def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    history = await _some_state(original)
    number = list_segments(original)[-1]
    data = segment_path(original, number).read_bytes()
    rng = random.Random(5)
    found = 0
    for _ in range(60):
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        damaged = bytearray(data)
        damaged[rng.randrange(16, len(data))] ^= 1 << rng.randrange(8)
        segment_path(copy, number).write_bytes(damaged)
        recovered, recovery = recover(copy, SIZES, "x")
        assert facts(recovered) in history
        found += bool(recovery.problems)
        shutil.rmtree(copy)
    assert found >= 50, "only padding bytes may go unnoticed, and change nothing"


async def test_a_segment_whose_header_is_damaged_is_set_aside(tmp_path: Path) -> None:
    history = await _some_state(tmp_path)
    last = segment_path(tmp_path, list_segments(tmp_path)[-1])
    data = bytearray(last.read_bytes())
    data[3] ^= 1
    last.write_bytes(data)
    recovered, recovery = recover(tmp_path, SIZES, "x")
    assert facts(recovered) == history[0]
    assert last.name in recovery.problems[0]
    assert last.with_suffix(".damaged").exists()


@pytest.mark.parametrize("seed", range(8))
async def test_a_damaged_snapshot_is_stepped_over(tmp_path: Path, seed: int) -> None:
    """The older snapshot and all that it needs of the log are still there, whatever was removed meanwhile."""
    directory = tmp_path / "state"
    directory.mkdir()
    async with opened(directory, segment_bytes=4096) as store:
        rng = random.Random(seed)
        for _ in range(6):
            for _ in range(rng.randrange(20, 80)):
                act(store, rng)
            for batch in list(store.ledger.leases.batches)[1:]:
                store.record(LeaseAcked(batch, 0))
            await store.snapshot()
            await store.compact()
            await store.written()
            expected = facts(store.ledger)
            copy = tmp_path / "copy"
            shutil.copytree(directory, copy)
            newest = snapshot_path(copy, list_snapshots(copy)[0])
            data = bytearray(newest.read_bytes())
            data[len(data) // 2] ^= 1
            newest.write_bytes(data)
            recovered, recovery = recover(copy, SIZES, "x")
            assert facts(recovered) == expected
            assert "checksum" in recovery.problems[0]
            assert newest.with_suffix(".damaged").exists()
            shutil.rmtree(copy)


async def test_without_any_sound_snapshot_a_cut_log_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=4096) as store:
        rng = random.Random(2)
        for _ in range(6):
            for _ in range(60):
                act(store, rng)
            for batch in list(store.ledger.leases.batches):
                store.record(LeaseAcked(batch, 0))
            await store.snapshot()
            await store.compact()
    assert list_segments(tmp_path)[0] > 1
    for number in list_snapshots(tmp_path):
        snapshot_path(tmp_path, number).unlink()
    with pytest.raises(CorruptState, match="no snapshot"):
        recover(tmp_path, SIZES, "x")


async def test_foreign_state_is_refused_with_both_lists(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    with pytest.raises(ForeignState, match=r"easy \(50 prompts\), hard \(50 prompts\).*easy \(50 prompts\), code"):
        recover(tmp_path, {"easy": SourceSize(50), "code": SourceSize(4)}, "x")
    with pytest.raises(ForeignState, match="51 prompts"):
        recover(tmp_path, {"easy": SourceSize(50), "hard": SourceSize(51)}, "x")


def test_a_state_directory_has_one_daemon(tmp_path: Path) -> None:
    with StateLock(tmp_path / "state"), pytest.raises(AlreadyRunning, match="pid"), StateLock(tmp_path / "state"):
        pass
    with StateLock(tmp_path / "state"):
        pass
