"""The archive's files: their names, their order, which of them are kept.

A file is called ``step-00000012.1f2e3d4c.jsonl``: the step, the history that it is of (another one begins when a
checkpoint is loaded, so that a step that is trained on again has a file beside the first one), the format.

Invariants:

* A file of such a name is whole: it is written under another name, synced, and renamed.
* The order of files is that in which they were written (their modification times), then that of steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["FORMATS", "ArchivedStep", "list_steps", "remove_older", "remove_unfinished", "step_path"]

FORMATS: Final = ("jsonl", "parquet")
UNFINISHED: Final = ".unfinished"

_NAME = re.compile(r"step-(\d{8,19})\.([A-Za-z0-9]{1,64})\.(jsonl|parquet)")


class ArchivedStep(NamedTuple):
    """One file: when it was written (ns since 1970), the step, the history, the format, the path."""

    written_ns: int
    step: int
    history: str
    format: str
    path: Path


def step_path(directory: Path, step: int, history: str, format_: str) -> Path:
    """The file of a batch."""
    return directory / f"step-{step:08d}.{history}.{format_}"


def list_steps(directory: Path) -> list[ArchivedStep]:
    """All files of the archive, the oldest first; none where the directory is not there. Blocks.

    Raises:
        OSError: the directory cannot be read.
    """
    found = []
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    for name in names:
        if (match := _NAME.fullmatch(name)) is None:
            continue
        with suppress(FileNotFoundError):  # it was let go of just now
            path = directory / name
            found.append(ArchivedStep(path.stat().st_mtime_ns, int(match[1]), match[2], match[3], path))
    return sorted(found)


def remove_older(directory: Path, keep: int) -> int:
    """Remove all but the ``keep`` files that were written last; how many were removed. Blocks; raises ``OSError``."""
    older = list_steps(directory)[:-keep]
    _remove(step.path for step in older)
    return len(older)


def remove_unfinished(directory: Path) -> None:
    """Remove what a crash left half written. Blocks; raises ``OSError``."""
    with suppress(FileNotFoundError):
        _remove(directory / name for name in os.listdir(directory) if name.endswith(UNFINISHED))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
