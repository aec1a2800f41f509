"""The requests under way: so that they can be cut, and so that it is known when there are none.

Invariants:

* A flight ends for one of three reasons: by itself, by its scope's deadline, or cut by us (``was_interrupted``,
  ``is_stopped``).
* ``cuts`` counts interruptions, so that a sample that was between two requests can tell that it missed one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from orchestrator.broadcast import Broadcast

__all__ = ["Flight", "Flights"]


@dataclass(slots=True, eq=False)
class Flight:
    """One request; its scope ends it. ``was_interrupted``: for all of them; ``is_stopped``: its text has ended."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    was_interrupted: bool = False
    is_stopped: bool = False

    def stop(self) -> None:
        """End it: a stop text is complete."""
        self.is_stopped = True
        self.scope.cancel()


class Flights:
    """The requests under way.

    Args:
        changed: notified when one ends.
    """

    def __init__(self, changed: Broadcast) -> None:
        self._flights: set[Flight] = set()
        self._changed = changed
        self.cuts = 0

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self) -> Flight:
        """A request begins."""
        flight = Flight()
        self._flights.add(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """A request has ended."""
        self._flights.discard(flight)
        self._changed.notify()

    def interrupt(self) -> int:
        """End all of them; returns how many."""
        self.cuts += 1
        for flight in self._flights:
            flight.was_interrupted = True
            flight.scope.cancel()
        return len(self._flights)

    async def quiet(self) -> None:
        """Return when there are none; the caller sets a deadline."""
        while self._flights:
            await self._changed.next().wait()
