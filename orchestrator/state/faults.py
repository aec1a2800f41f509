"""What is wrong with the disk now, and the log lines that say so.

Invariants:

* A fault lasts from the first failure of an operation to its next success, and never longer.
* The first failure and the recovery are one log line each; the attempts between them are silent.
* Whatever can be said to the operator is said: what failed, the error's name, what to do.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

__all__ = ["DiskFaults", "Operation"]


class Operation(StrEnum):
    """What can fail; the value completes "cannot …"."""

    WRITE = "write the log"
    SYNC = "sync the log"
    SNAPSHOT = "write a snapshot"
    REMOVE = "remove old files"
    RESERVE = "reserve space, for which launching waits,"


_FULL: Final = "make space on this disk, or let the trainer acknowledge batches"
_BROKEN: Final = "the disk fails: see the kernel's log, and copy the state directory to another disk"
_ADVICE: Final = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "raise the quota or make space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: _BROKEN,
    errno.EROFS: f"it is mounted read-only. This usually means that {_BROKEN}",
    errno.EACCES: "give the daemon's user write permission there",
    errno.EPERM: "give the daemon's user write permission there",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
    errno.ENOENT: "the directory was moved or removed while the daemon was running: restore it",
}


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


class DiskFaults:
    """See the module's invariants.

    Args:
        directory: of the state, for the messages.
        log: where faults are logged; without one they are only in :attr:`current`.
    """

    def __init__(self, directory: Path, log: FilteringBoundLogger | None = None) -> None:
        self._directory = directory
        self._log = log
        self._messages: dict[Operation, str] = {}
        self._since = 0.0

    @property
    def current(self) -> str | None:
        """The oldest of the faults that last, in a sentence; ``None`` if nothing is wrong."""
        return next(iter(self._messages.values()), None)

    @contextmanager
    def watching(self, operation: Operation) -> Iterator[None]:
        """Note how the operation in the block ends; an ``OSError`` is passed on."""
        try:
            yield
        except OSError as error:
            self.failed(operation, error)
            raise
        self.passed(operation)

    def failed(self, operation: Operation, error: OSError) -> None:
        """The operation failed, and will be tried again."""
        advice = _ADVICE.get(error.errno or 0, "see the error's name")
        message = f"cannot {operation} in {self._directory}: {error.strerror or error} ({_name(error)}): {advice}"
        if not self._messages:
            self._since = time.monotonic()
        is_new = self._messages.get(operation) != message
        self._messages[operation] = message
        if is_new and self._log is not None:
            self._log.error(f"{message}. The daemon retries until it succeeds; nothing is lost")

    def passed(self, operation: Operation) -> None:
        """The operation succeeded."""
        if self._messages.pop(operation, None) is not None and not self._messages and self._log is not None:
            self._log.warning(
                f"the state in {self._directory} can be written again, after {time.monotonic() - self._since:.1f} s"
            )
