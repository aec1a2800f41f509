"""Tasks of the package reasoning-gym: their entries, made where they are needed.

Invariants:

* An entry is a function of (task, seed, size, options, index) and of nothing else: not of the process, of the entries
  made before it, or of the time. Some tasks go through sets of texts, so this holds where ``HASH_SEED`` is in the
  environment; some draw from the global generator, which is seeded for each entry.
* The package is imported when the first entry is made, which is done in processes of their own only: it may hang there.
"""

from __future__ import annotations

import difflib
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["HASH_SEED", "INSTALL_HINT", "PREFIX", "BadTask", "Entries", "TaskSpec"]

PREFIX: Final = "reasoning_gym:"
"""What the path of a prompt source begins with that is a task."""

HASH_SEED: Final[Mapping[str, str]] = {"PYTHONHASHSEED": "0"}
"""For the environment of processes in which entries are made; 6 of the 106 tasks of version 0.1.25 need it."""

INSTALL_HINT: Final = "needs the package reasoning-gym: pip install 'rollout-orchestrator[rewards]'"

KEPT_ENTRIES: Final = 64
"""The samples of a group are scored one after the other; making some entries takes a second."""


class BadTask(ValueError):
    """There is no such task, or not with these options."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """Which entries: of ``task`` with its own ``options``; ``size`` of them, drawn by ``seed``."""

    task: str
    seed: int
    size: int
    options: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For pipes and metadata."""
        return {"task": self.task, "seed": self.seed, "size": self.size, "options": self.options}


class Entries:
    """The entries of one task.

    Raises:
        BadTask: see there; the message says what would be right.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._spec = spec
        self.dataset = _dataset(spec)
        self._kept: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def entry(self, index: int) -> dict[str, Any]:
        """The entry of that index, from 0, as the task makes it: ``question``, ``answer``, ``metadata``."""
        entry = self._kept.pop(index, None)
        if entry is None:
            random.seed(f"{self._spec.seed} {index}")
            entry = self.dataset[index]
            while len(self._kept) >= KEPT_ENTRIES:
                self._kept.popitem(last=False)
        self._kept[index] = entry
        return entry


def _dataset(spec: TaskSpec) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if spec.task not in DATASETS:
        near = difflib.get_close_matches(spec.task, DATASETS, n=1)
        raise BadTask(f"reasoning-gym has no task {spec.task!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return reasoning_gym.create_dataset(spec.task, seed=spec.seed, size=spec.size, **spec.options)
    except TypeError as error:
        known = [name for name in DATASETS[spec.task][1].__dataclass_fields__ if name not in ("seed", "size")]
        raise BadTask(
            f"the task {spec.task} does not accept these options: {error}; it has {', '.join(known)}"
        ) from error
    except (AssertionError, ValueError) as error:
        raise BadTask(f"the task {spec.task} rejects its options: {error}") from error
