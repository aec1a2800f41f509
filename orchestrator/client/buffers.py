"""Memory for payloads, used again only when nothing refers to it any more.

A page that the process touches for the first time costs ten times a warm one, and a batch is megabytes: so payloads are
received into memory that held an earlier batch. That must never change an array which the user still holds.

Invariants:

* A buffer is an owning numpy array. Every view of it, however indirect (columns, slices, memoryviews, torch tensors
  made by ``torch.from_numpy``), holds a reference to that array. CPython counts references exactly, so a buffer whose
  only reference is the pool's own is in nobody's hands, and only such a buffer is used again.
* What is in somebody's hands stays theirs for as long as they keep it; the pool allocates anew meanwhile, and forgets
  buffers beyond ``MAX_BUFFERS`` (their memory is freed with their last view).
* Where references are not counted so (PyPy, free-threaded builds), nothing is ever used again.
* A bare address (``array.ctypes.data``, ``tensor.data_ptr()``) is not a reference: keep the array while it is used.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np

__all__ = ["BufferPool", "Bytes"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""A one-dimensional array of bytes."""

MAX_BUFFERS: Final = 4
"""The batch in hand, the next one, and two that a slow data loader may still hold."""

GRANULE_BYTES: Final = 1 << 20
"""1 MiB: batches of one run differ by little, so sizes are rounded up for the next one to fit."""


def _counts_references() -> bool:
    gil_enabled = getattr(sys, "_is_gil_enabled", None)  # 3.13 and newer
    return sys.implementation.name == "cpython" and (gil_enabled is None or bool(gil_enabled()))


class BufferPool:
    """See the module's invariants; belongs to one client."""

    def __init__(self) -> None:
        self._buffers: list[Bytes] = []
        self._reuses = _counts_references()
        self._lone_count = self._count_of_lone_buffer()

    def _count_of_lone_buffer(self) -> int:
        """What ``sys.getrefcount`` says of an array that one list holds (the call itself counts; versions differ)."""
        buffers = [np.empty(0, np.uint8)]
        return sys.getrefcount(buffers[0]) if self._reuses else -1

    def __len__(self) -> int:
        return len(self._buffers)

    def _is_free(self, i: int) -> bool:
        return self._reuses and sys.getrefcount(self._buffers[i]) == self._lone_count

    def take(self, size: int) -> Bytes:
        """An array [size] of bytes with arbitrary content, in nobody else's hands, aligned to 8 bytes or more."""
        free = [i for i in range(len(self._buffers)) if self._is_free(i)]
        fitting = [i for i in free if self._buffers[i].nbytes >= size]
        if fitting:
            best = min(fitting, key=lambda i: self._buffers[i].nbytes)
            return self._buffers[best][:size]
        fresh = np.empty(-(-max(size, 1) // GRANULE_BYTES) * GRANULE_BYTES, np.uint8)
        if self._reuses:
            self._keep(fresh, free)
        return fresh[:size]

    def _keep(self, fresh: Bytes, free: list[int]) -> None:
        """Remember a buffer, in place of those that have become too small, or of the oldest."""
        self._buffers = [buffer for i, buffer in enumerate(self._buffers) if i not in free]
        self._buffers = [*self._buffers, fresh][-MAX_BUFFERS:]
