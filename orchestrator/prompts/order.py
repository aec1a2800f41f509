"""The order in which the prompts of a source come.

Invariants:

* The order is a function of (seed, source name, epoch, number of rows) and of nothing else: not of the machine, the
  process, the position at which somebody started to ask, or the version of numpy.
* Every row comes exactly once in an epoch. Without shuffling the order is the order of the file.
* At most two epochs' permutations are in memory (4 bytes a row each): the one that is run and the one begun ahead.

How: one PCG64 stream per (seed, CRC-32 of the name, epoch) gives every row a 64-bit key, and the rows are sorted by
their keys (ties, of which there is one in 2**64 pairs, by row). numpy promises that the raw output of PCG64 and the
mixing of ``SeedSequence`` never change; of ``Generator.permutation`` it does not (NEP 19), and an order that changed
with an upgrade in the middle of a run would repeat some prompts and skip others.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import numpy as np

__all__ = ["MAX_ROWS", "PromptOrder"]

MAX_ROWS: Final = 1 << 32
"""Rows are kept as unsigned 32-bit numbers."""

KEPT_EPOCHS: Final = 2
"""Look-ahead crosses from one epoch into the next, never into a third: a source shorter than that is cheap to redo."""


class PromptOrder:
    """The permutations of one source.

    Args:
        seed: the run's seed, 0 or more.
        name: the source's name; sources of one run are shuffled independently of each other.
        rows: number of rows, 1 to ``MAX_ROWS``.
        shuffle: ``False`` for the order of the file in every epoch.

    Raises:
        ValueError: a seed below 0 or a number of rows out of range.
    """

    def __init__(self, *, seed: int, name: str, rows: int, shuffle: bool) -> None:
        if seed < 0:
            raise ValueError(f"the seed is {seed}, but must be at least 0")
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"{rows} rows, but must be 1 to {MAX_ROWS}")
        self._entropy = (seed, zlib.crc32(name.encode()))
        self._rows = rows
        self._shuffle = shuffle
        self._kept: dict[int, np.ndarray[Any, np.dtype[np.uint32]]] = {}

    def row_at(self, epoch: int, position: int) -> int:
        """The row at ``position`` of ``epoch``, both from 0; O(1), but for O(n log n) once an epoch.

        Raises:
            IndexError: there is no such position or epoch.
        """
        if epoch < 0 or not 0 <= position < self._rows:
            raise IndexError(f"no position {position} in epoch {epoch} of {self._rows} rows")
        if not self._shuffle:
            return position
        permutation = self._kept.pop(epoch, None)
        if permutation is None:
            permutation = self._permute(epoch)
            while len(self._kept) >= KEPT_EPOCHS:
                del self._kept[next(iter(self._kept))]  # the one that was not asked for longest
        self._kept[epoch] = permutation
        return int(permutation[position])

    def _permute(self, epoch: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        keys = np.random.PCG64(np.random.SeedSequence((*self._entropy, epoch))).random_raw(self._rows)
        return np.argsort(keys, kind="stable").astype(np.uint32)
