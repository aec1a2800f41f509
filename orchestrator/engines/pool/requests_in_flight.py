"""The requests under way: so that they can be cut, moved, and so that it is known when there are none.

Invariants:

* A request ends for one of these reasons: by itself, by its scope's deadline, or cut by us (``was_interrupted``,
  ``is_stopped``, ``is_late``).
* ``cuts`` counts interruptions of everything, so that a sample that was between two requests can tell that it missed
  one.
* A request that may move and has not been heard of is in ``_silent``, the oldest first.
* An engine's silence is the time for which requests were at it and nothing came of any of them, summed over requests
  that were cut: an engine that says nothing is found although each of its requests is cut before it counts as stalled.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio

from orchestrator.concurrency.broadcast import Broadcast

from .lateness import late_after
from .member import Member

__all__ = ["RequestInFlight", "RequestsInFlight"]

STALL_SLACK: Final = 1 / 16
"""A stall is found so much later at most, as a share of what counts as one: a timer need not be set at each event."""


@dataclass(slots=True, eq=False)
class RequestInFlight:
    """One request at one engine; its scope ends it.

    ``last_moment`` and ``stall_s`` are its deadlines, in seconds of the loop's clock; while it ``is_held`` it has none.
    ``was_interrupted``: cut by us, the sample goes on later; ``is_stopped``: its text has ended; ``is_late``: it goes
    elsewhere, its first token being late. ``touched``: when it last said something, or began; ``clock``: the loop's.
    """

    member: Member
    began: float
    last_moment: float
    stall_s: float
    clock: Callable[[], float]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    was_interrupted: bool = field(default=False, init=False)
    is_stopped: bool = field(default=False, init=False)
    is_late: bool = field(default=False, init=False)
    is_heard: bool = field(default=False, init=False)
    is_held: bool = field(default=False, init=False)
    touched: float = field(default=0.0, init=False)

    def touch(self) -> None:
        """It is at work: the time without a token begins anew."""
        self.touched = self.clock()
        if self.is_held:
            self.scope.deadline = math.inf
            return
        stalls = self.touched + self.stall_s
        latest = min(self.last_moment, stalls + STALL_SLACK * self.stall_s)
        if not min(self.last_moment, stalls) <= self.scope.deadline <= latest:
            self.scope.deadline = latest

    def stop(self) -> None:
        """End it: a stop text is complete."""
        self.is_stopped = True
        self.scope.cancel()


class RequestsInFlight:
    """The requests under way.

    Args:
        changed: notified when one ends.
    """

    def __init__(self, changed: Broadcast) -> None:
        self._requests: set[RequestInFlight] = set()
        self._silent: dict[RequestInFlight, None] = {}
        self._changed = changed
        self.cuts = 0

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, member: Member, *, timeout_s: float, stall_s: float, may_move: bool) -> RequestInFlight:
        """A request begins; ``may_move``: it may go elsewhere if its first token is late."""
        clock = asyncio.get_running_loop().time
        now = clock()
        request = RequestInFlight(member, now, now + timeout_s, stall_s, clock=clock)
        request.touch()
        self._requests.add(request)
        if may_move:
            self._silent[request] = None
        return request

    def heard(self, request: RequestInFlight, *, of_tokens: bool) -> None:
        """Something came for a request; if tokens came first, their time is measured."""
        request.member.silent_s = 0.0
        if request.is_heard:
            return
        request.is_heard = True
        self._silent.pop(request, None)
        if of_tokens:
            request.member.first_token.add(request.clock() - request.began)
            request.member.health.first_token_in_time()

    def end(self, request: RequestInFlight) -> None:
        """A request has ended."""
        self._requests.discard(request)
        self._silent.pop(request, None)
        self._changed.notify()

    # -- cutting -------------------------------------------------------------------------------------------------------

    def interrupt(self, member: Member | None = None) -> int:
        """End all of them, or those of one engine; returns how many."""
        if member is None:
            self.cuts += 1
        cut = [request for request in self._requests if member in (None, request.member)]
        self._add_up_silence(cut)
        for request in cut:
            request.was_interrupted = True
            request.scope.cancel()
        return len(cut)

    def _add_up_silence(self, cut: Sequence[RequestInFlight]) -> None:
        """For how long each engine said nothing at all on what is cut now; being held is a good reason to."""
        now = anyio.current_time()
        silent: dict[Member, float] = {}
        for request in cut:
            silence = 0.0 if request.is_held else now - request.touched
            silent[request.member] = min(silent.get(request.member, math.inf), silence)
        for member, seconds in silent.items():
            member.silent_s += seconds

    def move_late(self, others: Callable[[Member], Sequence[Member]]) -> int:
        """End those whose first token is late while another engine has room for them; returns how many.

        Args:
            others: the engines with room for a request that is at this one.
        """
        now, moved = anyio.current_time(), 0
        limits: dict[Member, float | None] = {}
        room = 0
        for request in list(self._silent):
            if request.member not in limits:
                rivals = others(request.member)
                limits[request.member] = late_after(rival.first_token for rival in rivals)
                room = max(room, sum(rival.room for rival in rivals))
            limit = limits[request.member]
            if moved < room and limit is not None and now - request.began >= limit:
                request.is_late = True
                request.scope.cancel()
                del self._silent[request]
                moved += 1
        return moved

    def hold_clocks(self, member: Member) -> None:
        """Let the requests of an engine be silent: there is a good reason."""
        for request in self._requests:
            if request.member is member:
                request.is_held = True
                request.touch()

    def restart_clocks(self, member: Member) -> None:
        """Hold the requests of an engine to their deadlines again, which :meth:`hold_clocks` took off."""
        for request in self._requests:
            if request.member is member and request.is_held:
                request.is_held = False
                request.touch()

    async def quiet(self, member: Member | None = None) -> None:
        """Return when there are none, or none at one engine; the caller sets a deadline."""
        while any(member in (None, request.member) for request in self._requests):
            await self._changed.next().wait()
