"""Whether an engine is used: a pure state machine over what its probes and requests report.

Invariants:

* An engine is ``up`` only after a probe succeeded; after ``MAX_CONSECUTIVE_FAILURES`` failed requests in a row, or one
  failed probe, it is ``down`` until a probe succeeds again.
* No clock and no I/O: the pool reports facts and asks for the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["Health"]

MAX_CONSECUTIVE_FAILURES: Final = 3
"""One failure may be the request's own bad luck; three in a row are the engine's."""


@dataclass(slots=True)
class Health:
    """The health of one engine. ``last_error`` is the newest failure in words."""

    is_up: bool = False
    failures_in_a_row: int = 0
    last_error: str | None = None

    @property
    def state(self) -> str:
        """``up`` or ``down``."""
        return "up" if self.is_up else "down"

    def probe_succeeded(self) -> bool:
        """A probe succeeded; whether the engine was down before."""
        was_down, self.is_up = not self.is_up, True
        if was_down:
            self.failures_in_a_row = 0
        return was_down

    def probe_failed(self, message: str) -> bool:
        """A probe failed; whether the engine was up before."""
        was_up, self.is_up = self.is_up, False
        self.last_error = message
        return was_up

    def request_succeeded(self) -> None:
        """A request ended as it should, or was interrupted by us."""
        self.failures_in_a_row = 0

    def request_failed(self, message: str) -> bool:
        """A request failed by the engine's fault; whether that took the engine down."""
        self.failures_in_a_row += 1
        self.last_error = message
        if self.is_up and self.failures_in_a_row >= MAX_CONSECUTIVE_FAILURES:
            self.is_up = False
            return True
        return False
