"""How late an event loop is, counted where other processes can read it."""

from __future__ import annotations

import asyncio
import mmap
import time
from typing import Final

import numpy as np

BUCKETS: Final = 4096
"""Of a millisecond each; the last one holds all that was later."""

TURN_S: Final = 0.005
"""Rarely enough to cost the loop next to nothing: it is part of what is measured."""


class Shared:
    """Counters in memory that a forked process shares: what was read, and turns of a loop by their lateness."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * (BUCKETS + 2))
        self._counts = np.frombuffer(self._memory, np.int64)
        self._cells = memoryview(self._memory).cast("q")  # of which one is counted up faster

    def add_read(self, count: int) -> None:
        self._cells[BUCKETS + 1] += count

    @property
    def read(self) -> int:
        """Bytes."""
        return int(self._counts[BUCKETS + 1])

    def add_ended(self) -> None:
        self._counts[BUCKETS] += 1

    @property
    def ended(self) -> int:
        return int(self._counts[BUCKETS])

    def add_late(self, seconds: float) -> None:
        self._counts[min(BUCKETS - 1, max(0, int(1000 * seconds)))] += 1

    def late(self) -> np.ndarray:
        """[BUCKETS]: a copy of the turns so far."""
        return self._counts[:BUCKETS].copy()


def p99_ms(turns: np.ndarray) -> float:
    """The lateness that a hundredth of the turns exceeds, in whole milliseconds."""
    sums = np.cumsum(turns)
    return float(np.searchsorted(sums, 0.99 * sums[-1])) if sums[-1] else 0.0


async def watch_lag(shared: Shared) -> None:
    """Count for ever how late this loop is."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(TURN_S)
        shared.add_late(time.perf_counter() - began - TURN_S)
