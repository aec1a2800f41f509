"""What was started again while a run went on, and at which step.

Invariants:

* Facts in, a list out: nothing is asked and nothing waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .progress import Restart

__all__ = ["RestartWatch"]

ONE_DEATH_STEPS: Final = 10
"""Requests of one engine that died fail one after the other, within two seconds or so."""


class RestartWatch:
    """To be shown counts and statuses as they come; ``found`` is what follows from them."""

    def __init__(self) -> None:
        self.found: list[Restart] = []
        self._counts: dict[str, int] = {}
        self._failed = 0

    def look(self, step: int, counts: Mapping[str, int], status: Mapping[str, Any] | None) -> None:
        """Compare with the last look.

        Args:
            step: how many steps there are.
            counts: how often each process was started again.
            status: of the daemon; ``None`` while it cannot be asked.
        """
        for name, count in counts.items():
            if count > self._counts.get(name, 0):
                self.found.append(Restart(step, name))
        self._counts = dict(counts)
        if status is None:
            return
        failed = sum(engine["failed"] for engine in status["engines"])  # from 0 again in every daemon
        if failed > self._failed and not self._is_known(step):
            self.found.append(Restart(step, "engine"))
        self._failed = failed

    def _is_known(self, step: int) -> bool:
        """Whether this is the same death as before."""
        last = max((restart.step for restart in self.found if restart.name == "engine"), default=-ONE_DEATH_STEPS)
        return step - last < ONE_DEATH_STEPS
