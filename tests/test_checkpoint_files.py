"""The files of checkpoints: whole or not there, whatever instant a crash took."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import CheckpointError
from orchestrator.state import list_checkpoints, remove_checkpoint, verify_checkpoint
from orchestrator.state.checkpoints import read_checkpoint
from orchestrator.state.recovery import recover

from .state_histories import SIZES, opened


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
