"""The files of checkpoints: whole or not there, whatever instant a crash took."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.ledger.ledger import Ledger
from orchestrator.errors import CheckpointError
from orchestrator.state import list_checkpoints, remove_checkpoint, verify_checkpoint
from orchestrator.state.checkpoints import read_checkpoint
from orchestrator.state.recovery import recover
from orchestrator.state.segments import list_segments, segment_path
from tests.support.state_histories import SIZES, act, facts, opened

SEGMENT_BYTES = 8192


async def with_checkpoint(directory: Path, name: str = "one") -> Path:
    async with opened(directory) as store:
        await store.save_checkpoint(name)
    return directory / "checkpoints" / name


async def test_what_was_to_be_replaced_is_there_again_if_it_was_not(tmp_path: Path) -> None:
    """The instant between the two renames."""
    path = await with_checkpoint(tmp_path)
    path.rename(path.with_name(".one.old"))
    path.with_name(".one.unfinished").mkdir()
    recover(tmp_path, SIZES, "x")
    assert [entry.name for entry in path.parent.iterdir()] == ["one"]
    assert verify_checkpoint(tmp_path, "one") == []


async def test_what_was_replaced_or_half_removed_goes_at_the_next_start(tmp_path: Path) -> None:
    path = await with_checkpoint(tmp_path)
    for name in (".one.old", ".two.removed", ".three.unfinished"):
        path.with_name(name).mkdir()
        (path.with_name(name) / "log-00000001.rol").write_bytes(b"rest")
    assert [fact.name for fact in list_checkpoints(tmp_path)] == ["one"]
    recover(tmp_path, SIZES, "x")
    assert [entry.name for entry in path.parent.iterdir()] == ["one"]


async def test_one_that_is_removed_is_gone_at_once(tmp_path: Path) -> None:
    path = await with_checkpoint(tmp_path)
    remove_checkpoint(tmp_path, "one")
    assert list(path.parent.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"no checkpoint 'one'.*there are: none"):
        read_checkpoint(tmp_path, "one")


# -- in a directory of their own --------------------------------------------------------------------------------------


def known(ledger: Ledger) -> dict[str, Any]:
    """But for acknowledged groups that wait for the archive: these are what they are, whatever is loaded."""
    return facts(ledger) | {"unarchived": None}


async def moved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A state directory that holds a checkpoint ``one`` alone, and what it is of."""
    rng = random.Random(5)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    async with opened(old, segment_bytes=SEGMENT_BYTES) as store:
        for _ in range(150):
            act(store, rng)
        await store.save_checkpoint("one")
        before = known(store.ledger)
        for _ in range(50):
            act(store, rng)
    shutil.copytree(old / "checkpoints", new / "checkpoints")
    return new, before


async def test_a_checkpoint_is_loaded_into_a_directory_of_its_own(tmp_path: Path) -> None:
    """The log that begins there does not come to the numbers of the checkpoint's segments, however long it grows."""
    directory, before = await moved(tmp_path)
    kept = set(list_segments(directory / "checkpoints" / "one"))
    assert len(kept) > 2
    rng = random.Random(6)
    for _ in range(2):
        async with opened(directory, segment_bytes=SEGMENT_BYTES) as store:
            for _ in range(40):
                act(store, rng)
            await store.load_checkpoint("one")
            assert known(store.ledger) == before
            for _ in range(200):
                act(store, rng)
            await store.snapshot()
            await store.compact()
            assert min(set(list_segments(directory)) - kept) > max(kept)
            after = known(store.ledger)
        recovered, recovery = recover(directory, SIZES, "x")
        assert (known(recovered), recovery.problems) == (after, [])
        assert verify_checkpoint(directory, "one") == []


async def test_a_log_that_begins_beside_checkpoints_may_end_anywhere(tmp_path: Path) -> None:
    """Killed before its first snapshot, with any part of it written."""
    directory, before = await moved(tmp_path)
    moments = [known(recover(directory, SIZES, "x")[0])]
    async with opened(directory, segment_bytes=SEGMENT_BYTES) as store:
        rng = random.Random(7)
        for _ in range(10):
            act(store, rng)
            moments.append(known(store.ledger))
        await store.load_checkpoint("one")
        moments.append(before)
        number = store.recovery.next_segment
        data = segment_path(directory, number).read_bytes()
    (directory / "whole").mkdir()
    shutil.copytree(directory / "checkpoints", directory / "whole" / "checkpoints")
    for linked in set(list_segments(directory / "checkpoints" / "one")):
        shutil.copy(segment_path(directory, linked), directory / "whole")
    seen = set()
    for size in (*range(40), *range(40, len(data), 97), len(data)):
        copy = shutil.copytree(directory / "whole", directory / "copy")
        segment_path(copy, number).write_bytes(data[:size])
        recovered, _ = recover(copy, SIZES, "x")
        assert known(recovered) in moments
        seen.add(moments.index(known(recovered)))
        shutil.rmtree(copy)
    assert {0, len(moments) - 1} <= seen


async def test_a_checkpoint_of_another_state_is_refused_and_nothing_of_either_changes(tmp_path: Path) -> None:
    """Also where its segments have numbers that the log has not come to yet."""
    other, _ = await moved(tmp_path)
    directory = tmp_path / "state"
    directory.mkdir()
    async with opened(directory, segment_bytes=SEGMENT_BYTES) as store:
        shutil.copytree(other / "checkpoints", directory / "checkpoints")
        before = known(store.ledger)
        with pytest.raises(CheckpointError, match="only the folder with the checkpoints"):
            await store.load_checkpoint("one")
        assert known(store.ledger) == before
        rng = random.Random(8)
        for _ in range(200):
            act(store, rng)
        await store.written()
        with pytest.raises(CheckpointError, match="belongs to another state"):
            await store.load_checkpoint("one")
    assert verify_checkpoint(directory, "one") == []
