"""Warnings that a client could cause thousands of: one line a second of each kind, with the number of those left out.

Invariants:

* A hostile client does not fill the disk with log lines, and does not hide other kinds of warnings.
"""

from __future__ import annotations

import time
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

__all__ = ["SparseLog"]

INTERVAL_S: Final = 1.0
"""Between two lines of a kind."""


class SparseLog:
    """See the module's invariants.

    Args:
        log: where the lines go.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def debug(self, message: str, **fields: Any) -> None:
        """Every line of no importance."""
        self._log.debug(message, **fields)

    def exception(self, message: str) -> None:
        """The exception that is being handled, with its traceback."""
        self._log.exception(message)

    def warning(self, kind: str, message: str) -> None:
        """One line, unless one of this kind was written just now. Kinds are few and fixed."""
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next[kind] = now + INTERVAL_S
        left_out = self._left_out.pop(kind, 0)
        self._log.warning(f"{message} ({left_out} similar lines were left out)" if left_out else message)
