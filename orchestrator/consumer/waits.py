"""Who waits for a batch: since when, and what for.

Invariants:

* A wait for the engines begins when the first ``get_batch`` finds a batch of a step that cannot be formed, and ends
  when that batch forms; asking again with a short deadline does not begin it anew.
* A wait for the trainer itself (it holds its leases, another rank lags) is kept apart: that time is not the engines'.
* No tasks: whoever watches is told by ``begun``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from orchestrator.core.mixture.outlook import Shortage

__all__ = ["Wait", "Waiting", "Waits"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a rank gets nothing now although the sources may have enough: the trainer itself is in the way.

    ``sentence`` says so; ``held_step`` is the step whose batch has been held the longest, since ``held_since`` on the
    monotonic clock.
    """

    sentence: str
    held_step: int | None = None
    held_since: float = 0.0

    def reason(self, now: float) -> str:
        """The sentence, with how long the oldest batch has been held."""
        if self.held_step is None:
            return self.sentence
        return f"{self.sentence}; step {self.held_step} has been held for {now - self.held_since:.0f} s"


@dataclass(slots=True)
class Wait:
    """One kind of wait: for the batch of ``step``, ``since`` a moment of the loop's clock, by ``count`` requests now.

    ``why`` is what the newest request found; ``is_told``: the log has it. ``begun`` is set when another batch is waited
    for, and ``watched`` is then cancelled: what it encloses is about the one before.
    """

    step: int = -1
    since: float = 0.0
    count: int = 0
    why: Waiting | Shortage | None = None
    is_told: bool = False
    begun: anyio.Event = field(default_factory=anyio.Event)
    watched: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def begin(self, step: int, why: Waiting | Shortage) -> None:
        """Somebody waits for the batch of this step."""
        self.why = why
        if self.step != step:
            self.step, self.since, self.is_told = step, anyio.current_time(), False
            self.begun.set()
            self.watched.cancel()


class Waits:
    """See the module's invariants; ``for_engines`` and ``for_trainer`` are the two kinds."""

    def __init__(self) -> None:
        self.for_engines = Wait()
        self.for_trainer = Wait()

    @contextmanager
    def waiting(self, step: int, why: Waiting | Shortage) -> Iterator[None]:
        """Somebody waits for the batch of this step, for that reason."""
        wait = self.for_engines if isinstance(why, Shortage) else self.for_trainer
        if wait is self.for_trainer and not wait.count and wait.why != why:
            wait.step = -1  # the trainer was in its own way before; this is another time, by another lease or rank
        wait.begin(step, why)
        wait.count += 1
        try:
            yield
        finally:
            wait.count -= 1

    def waited_s(self, step: int) -> float:
        """Seconds for which the batch of this step has been waited for, or was when it formed; 0 if it was there."""
        return anyio.current_time() - self.for_engines.since if self.for_engines.step == step else 0.0
