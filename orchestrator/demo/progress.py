"""What a trainer recorded about its steps, and figures derived from it.

Invariants:

* A step counts once, however often it was recorded: a killed trainer may train on a batch again, with the same result.
* Standard library only; nothing here waits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

__all__ = ["WINDOW", "Curve", "ProgressFile", "Restart", "Run", "Step"]

WINDOW: Final = 20
"""Steps that a smoothed value averages over, which leaves 3 to 4% of noise at a reward of one half."""

LEARNED: Final = 0.9
"""Mean reward, over ``WINDOW`` steps, from which a source counts as learned."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step as the trainer recorded it.

    ``rewards`` has the sources that were in the batch. ``time`` is Unix time in s. ``samples`` counts the batch's
    samples; ``continued`` of them have tokens of several policy versions. ``gap`` is the mean distance between the
    trainer's own log-probabilities and the engine's.
    """

    step: int
    time: float
    weights: dict[str, float]
    counts: dict[str, int]
    rewards: dict[str, float]
    samples: int
    continued: int
    gap: float

    @classmethod
    def parse(cls, line: str) -> Step:
        """One line of ``progress.jsonl``."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{key: values[key] for key in cls.__slots__})


class ProgressFile:
    """Reads a growing ``progress.jsonl``; :meth:`read` is cheap when nothing was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._by_step: dict[int, Step] = {}

    def read(self) -> list[Step]:
        """All steps so far, in order; a line that is still being written is left for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            step = Step.parse(line)
            self._by_step[step.step] = step
        return [self._by_step[number] for number in sorted(self._by_step)]


@dataclass(frozen=True, slots=True)
class Curve:
    """One value over steps; ``steps`` are those that have one."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, window: int = WINDOW) -> Curve:
        """Each value the mean of the ``window`` values up to it, or of all where there are fewer."""
        windows = (self.values[max(0, end - window) : end] for end in range(1, len(self.values) + 1))
        return Curve(self.steps, tuple(map(fmean, windows)))

    @property
    def last(self) -> float | None:
        """The mean of the last ``WINDOW`` values; ``None`` without any."""
        return fmean(self.values[-WINDOW:]) if self.values else None


@dataclass(frozen=True, slots=True)
class Restart:
    """The process ``name`` was restarted after ``step`` steps."""

    step: int
    name: str


@dataclass(frozen=True, slots=True)
class Run:
    """The steps of one run under one schedule and seed; ``restarts`` count since it was started or continued."""

    schedule: str
    seed: int
    sources: tuple[str, ...]
    steps: Sequence[Step]
    seconds: float = 0.0
    restarts: Sequence[Restart] = ()

    def rewards(self, source: str) -> Curve:
        """Mean rewards of a source, for the steps that it was in."""
        found = [(step.step, step.rewards[source]) for step in self.steps if source in step.rewards]
        return Curve(tuple(step for step, _ in found), tuple(reward for _, reward in found))

    def asked(self, source: str) -> Curve:
        """Its share of each batch according to the weights."""
        return Curve(tuple(s.step for s in self.steps), tuple(s.weights[source] for s in self.steps))

    def received(self, source: str) -> Curve:
        """Its share of the groups in each batch."""
        shares = tuple(step.counts[source] / sum(step.counts.values()) for step in self.steps)
        return Curve(tuple(step.step for step in self.steps), shares)

    def groups_asked(self, source: str) -> float:
        """The sum of batch size times weight."""
        return sum(sum(step.counts.values()) * step.weights[source] for step in self.steps)

    def groups_received(self, source: str) -> int:
        """Its groups in all batches."""
        return sum(step.counts[source] for step in self.steps)

    def learned_at(self, source: str) -> int | None:
        """The first step whose smoothed reward, of a whole window, is ``LEARNED`` or more."""
        curve = self.rewards(source).smoothed()
        whole = list(zip(curve.steps, curve.values, strict=True))[WINDOW - 1 :]
        return next((step for step, value in whole if value >= LEARNED), None)

    @property
    def continued(self) -> int:
        """Samples with tokens of several policy versions."""
        return sum(step.continued for step in self.steps)

    @property
    def gap(self) -> float:
        """The mean ``gap``."""
        return fmean(step.gap for step in self.steps) if self.steps else 0.0
