"""The last log lines, for the page and for ``status``.

Invariants:

* A bounded number of lines of bounded length. Lines of steps and of the journal are left out: they would crowd out the
  rest.
* Events pass through unchanged.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Final

from structlog.typing import EventDict

from .record_lines import JOURNAL

__all__ = ["MAX_EVENTS", "RecentEvents"]

MAX_EVENTS: Final = 100
"""A screen or two; the log has the rest."""

MAX_CHARACTERS: Final = 500
"""Longest message kept: 100 of them stay below 64 KiB."""


class RecentEvents:
    """A structlog processor that remembers events; they may come from any thread."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.RLock()  # a finaliser of the garbage collector may log while this thread holds it

    def __call__(self, logger: Any, method: str, event: EventDict) -> EventDict:
        """Remember a line."""
        dataset = str(event.get("dataset", "orchestrator"))
        if method != "debug" and not dataset.startswith(("step", JOURNAL)):
            message = str(event.get("event", "")).encode("utf-8", "backslashreplace").decode()
            source = event.get("source")
            noted = {
                "time": round(time.time(), 3),
                "level": method,
                "dataset": dataset,
                "source": source if isinstance(source, str) else None,
                "message": message if len(message) <= MAX_CHARACTERS else message[: MAX_CHARACTERS - 1] + "…",
            }
            with self._lock:
                self._events.append(noted)
        return event

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest, oldest first: ``time`` (seconds since 1970), ``level``, ``dataset``, ``source``, ``message``."""
        with self._lock:
            return list(self._events)[-count:] if count > 0 else []
