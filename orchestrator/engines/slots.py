"""Who may send a request to which engine: slots, and the queue for them.

Invariants:

* No engine has more requests than its ``max_in_flight``; none that is down, and none at all while dispatch is closed.
* Continuations come before fresh prompts: their tokens are already paid for. Within each kind it is first come, first
  served.
* Among engines with room the one asked for is taken (it holds the sample's prefix), else the least loaded.
* A waiter that is cancelled leaves the queue, and gives back a slot that it was just given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from .health import Health
from .port import Engine, EngineInfo

__all__ = ["Member", "Slots"]


@dataclass(slots=True, eq=False)
class Member:
    """One engine of the pool with its health and counts."""

    engine: Engine
    health: Health = field(default_factory=Health)
    info: EngineInfo | None = None
    in_flight: int = 0
    completed: int = 0
    failed: int = 0
    stalled: int = 0
    interrupted: int = 0
    tokens: int = 0

    @property
    def has_room(self) -> bool:
        """Whether a request may be sent now."""
        return self.health.is_up and self.in_flight < self.engine.max_in_flight

    @property
    def load(self) -> float:
        """Share of the slots in use."""
        return self.in_flight / self.engine.max_in_flight


@dataclass(slots=True, eq=False)
class _Waiter:
    preferred: Member | None
    event: anyio.Event = field(default_factory=anyio.Event)
    member: Member | None = None


class Slots:
    """See the module's invariants."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._continued: deque[_Waiter] = deque()
        self._fresh: deque[_Waiter] = deque()
        self.is_open = True

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._continued) + len(self._fresh)

    async def acquire(self, preferred: Member | None, *, is_continued: bool) -> Member:
        """Wait for a slot; the caller gives it back by :meth:`release`."""
        queue = self._continued if is_continued else self._fresh
        waiter = _Waiter(preferred)
        queue.append(waiter)
        self.dispatch()
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.member is not None:
                self.release(waiter.member)
            else:
                queue.remove(waiter)
            raise
        assert waiter.member is not None
        return waiter.member

    def release(self, member: Member) -> None:
        """A request ended."""
        member.in_flight -= 1
        self.dispatch()

    def dispatch(self) -> None:
        """Give free slots to those who wait; to be called when an engine came up or dispatch was opened."""
        while self.is_open and self.waiting:
            free = [member for member in self._members if member.has_room]
            if not free:
                return
            waiter = (self._continued or self._fresh).popleft()
            preferred = waiter.preferred
            member = preferred if preferred in free else min(free, key=lambda m: m.load)
            assert member is not None
            member.in_flight += 1
            waiter.member = member
            waiter.event.set()
