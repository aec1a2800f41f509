"""Reading the archive, for ``orchestrator show`` and the page; no daemon is needed.

Invariants:

* Everything here blocks: call it in a worker thread where there is a loop.
* Groups are read one after the other; what is kept of them is bounded by whoever asks.
* Nothing that is read is trusted: a file that is not as it was written is a typed error.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from orchestrator.errors import ArchiveError

from .names import ArchivedStep, list_steps

__all__ = ["Excerpt", "find_step", "read_groups", "read_samples"]


_GROUP_KEYS: Final = frozenset(
    ("step", "policy_version", "source", "weight", "group_index", "prompt_index", "epoch", "prompt", "label", "samples")
)
_SAMPLE_KEYS: Final = frozenset(("index", "status", "reward", "tokens", "versions", "response"))
"""What is shown, and so has to be there."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One sample with its group; both are as the archive has them, ``group`` without its samples."""

    group: dict[str, Any]
    sample: dict[str, Any]

    @property
    def reward(self) -> float:
        """The sample's."""
        return float(self.sample["reward"])


def find_step(directory: Path, step: int | None, history: str | None = None) -> tuple[ArchivedStep, list[ArchivedStep]]:
    """The file of a step, and the other files of the same one: a step that was trained on again has several.

    Args:
        directory: of the archive.
        step: ``None``: the one that was written last.
        history: the one to look in; ``None``: the newest that has the step.

    Raises:
        ArchiveError: there is none; the message says which steps there are.
    """
    try:
        files = list_steps(directory)
    except OSError as error:
        raise ArchiveError(f"cannot read the archive {directory}: {error.strerror or error}") from error
    if not files:
        raise ArchiveError(f"{directory} has no archived steps; see archive.path in the config")
    if step is None:
        step = files[-1].step
    found = [file for file in files if file.step == step]
    chosen = [file for file in found if history in (None, file.history)]
    if not found:
        steps = sorted({file.step for file in files})
        raise ArchiveError(
            f"step {step} is not in the archive {directory}; it has {len(steps)} steps, from {steps[0]} to {steps[-1]}"
        )
    if not chosen:
        others = ", ".join(file.history for file in found)
        raise ArchiveError(f"step {step} has no history {history!r}; it has {others}")
    return chosen[-1], [file for file in found if file != chosen[-1]]


def read_groups(file: ArchivedStep, source: str | None = None) -> Iterator[dict[str, Any]]:
    """The groups of a step, of one source or of all.

    Raises:
        ArchiveError: the file cannot be read.
    """
    try:
        for group in _records(file):
            _check(group)
            if source in (None, group["source"]):
                yield group
    except ImportError as error:
        raise ArchiveError(
            f"{file.path} is Parquet, which needs pyarrow: pip install 'rollout-orchestrator[prompts]'"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"cannot read {file.path}: {error}") from error


def _check(group: Any) -> None:
    """Raise ``ValueError`` where something that is shown is missing."""
    missing = set(_GROUP_KEYS - set(group) if isinstance(group, dict) else _GROUP_KEYS)
    for sample in [] if missing else group["samples"]:
        missing |= _SAMPLE_KEYS - set(sample)
    if missing:
        raise ValueError(f"a group has no {', '.join(sorted(missing))}")


def _records(file: ArchivedStep) -> Iterator[dict[str, Any]]:
    if file.format == "parquet":
        from .parquet import iter_records

        yield from iter_records(file.path)
        return
    with file.path.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)


def read_samples(file: ArchivedStep, *, source: str | None = None, worst: int) -> list[Excerpt]:
    """The samples of lowest reward, the lowest first; at most ``worst``. Raises as :func:`read_groups`."""
    samples = (
        Excerpt({key: value for key, value in group.items() if key != "samples"}, sample)
        for group in read_groups(file, source)
        for sample in group["samples"]
    )
    return heapq.nsmallest(worst, samples, key=lambda excerpt: excerpt.reward)
