"""A broadcast: any number of tasks wait for "something changed", and look for themselves.

Invariants:

* A waiter that takes :meth:`Broadcast.next` *before* it looks, and waits after, misses nothing.
* Notifying costs next to nothing when nobody waits.
"""

from __future__ import annotations

import anyio

__all__ = ["Broadcast"]


class Broadcast:
    """Wakes everyone who waits, once a notification."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def next(self) -> anyio.Event:
        """The event that the next notification sets."""
        if self._event is None:
            self._event = anyio.Event()
        return self._event

    def notify(self) -> None:
        """Wake everyone who waits."""
        if self._event is not None:
            event, self._event = self._event, None
            event.set()
