"""Space that is kept free on the disk for the moment when it is full.

Invariants:

* A full disk does not stop what is small and urgent: the reserve is given up, and batches, acknowledgements and the
  snapshots that let old segments go are written into its place.
* While it is given up nothing new is launched, so that its space lasts; it is made again as soon as there is room for
  it twice over.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import aiofiles.os
import anyio

from orchestrator.core.ledger.ledger import Ledger

from .faults import DiskFaults, Operation

__all__ = ["NO_ROOM", "Reserve", "in_flight_bytes"]

LEAST_BYTES: Final = 16 << 20
"""16 MiB: tens of thousands of batches and acknowledgements. What is in flight comes on top of it."""

LARGEST_SHARE: Final = 8
"""Of a small file system no more than an eighth."""

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """See the module's invariants.

    Args:
        directory: the state directory.
        faults: told while the reserve cannot be kept.
    """

    def __init__(self, directory: Path, faults: DiskFaults) -> None:
        self._path = directory / "reserve"
        self._faults = faults
        self._lock = anyio.Lock()
        self.is_kept = True
        """Whether it is there, as far as is known; false means that the disk is full."""

    async def keep(self, more_bytes: int) -> None:
        """Make it, if it is not there and there is room; or larger, if it is too small.

        Args:
            more_bytes: what the groups in flight will take when they are finished.
        """
        async with self._lock:
            try:
                with self._faults.watching(Operation.RESERVE):
                    await _make(self._path, more_bytes)
            except OSError:
                self.is_kept = False
            else:
                self.is_kept = True

    async def give_up(self) -> bool:
        """Make room; whether there was something to give up."""
        async with self._lock:  # a `keep` that looked before and answers after would have it there still
            was_kept, self.is_kept = self.is_kept, False
            with suppress(OSError):
                await aiofiles.os.unlink(self._path)
            if was_kept:
                self._faults.failed(Operation.RESERVE, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return was_kept


def in_flight_bytes(ledger: Ledger) -> int:
    """What the groups in flight will take, if they are like those that are buffered."""
    states = ledger.sources.values()
    return sum(len(state.in_flight) * state.ready_bytes // len(state.ready) for state in states if state.ready)


@aiofiles.os.wrap
def _make(path: Path, more_bytes: int) -> None:
    has = path.stat().st_size if path.exists() else 0
    system = os.statvfs(path.parent)
    size = min(LEAST_BYTES + more_bytes, system.f_blocks * system.f_frsize // LARGEST_SHARE)
    if has >= size:
        return
    if system.f_bavail * system.f_frsize < 2 * (size - has):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.ftruncate(fd, has)
        raise
    finally:
        os.close(fd)
