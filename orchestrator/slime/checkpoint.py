"""Checkpoint files of the data source: one JSON file for each rollout id.

Invariants:

* A checkpoint is complete or absent: written to a temporary name, synced, renamed, directory synced.
* Saving a value that JSON cannot represent is an error; nothing is left out. Loading executes nothing.
* A missing checkpoint and an unreadable one are different errors.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import CorruptState, StateError

__all__ = ["FORMAT", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT: Final = 1

_NAME: Final = re.compile(r"data_source_state_(-?\d+)\.json")


def _directory(root: Path) -> Path:
    """The directory in which slime's own data source has its file."""
    return root / "rollout"


def _path(root: Path, rollout_id: int) -> Path:
    return _directory(root) / f"data_source_state_{rollout_id}.json"


def latest_checkpoint(root: Path) -> int | None:
    """The largest rollout id that has a checkpoint; ``None`` if there is none."""
    names = (path.name for path in _directory(root).glob("data_source_state_*.json"))
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=None)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch, and enumerations, as JSON values."""
    for method in ("tolist", "item"):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert()
    if hasattr(value, "value"):
        return value.value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {str(value)[:60]}")


def save_checkpoint(root: Path, rollout_id: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint; an existing one of the same id is replaced.

    Raises:
        StateError: a sample has a value that JSON cannot represent, or the disk failed; older ones are untouched.
    """
    path = _path(root, rollout_id)
    try:
        text = json.dumps({"format": FORMAT, **state}, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise StateError(f"{path}: the data source's state cannot be saved: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
        _sync_directory(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(root: Path, rollout_id: int) -> dict[str, Any] | None:
    """Read a checkpoint; ``None`` if there is none.

    Raises:
        CorruptState: it is not a checkpoint of a format that this version reads.
        StateError: it cannot be read.
    """
    path = _path(root, rollout_id)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CorruptState(f"{path} is not a checkpoint of the data source: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CorruptState(f"{path} is not a checkpoint of the data source in format {FORMAT}")
    return state
