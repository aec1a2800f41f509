"""Who may send a request to which engine: slots, and the queue for them.

Invariants:

* No engine has more requests than its ``max_in_flight``; none goes to one that is down, draining, updating or outdated,
  one at a time to one on trial, and none at all while dispatch is closed.
* Continuations come before fresh prompts: their tokens are already paid for. Within each kind it is first come, first
  served.
* Among engines with room the one asked for is taken (it holds the sample's prefix), else the least loaded.
* An engine that just failed a sample is avoided by it while another one is up, even if that one is full: an engine that
  fails at once is always the least loaded one and would otherwise be given everything.
* No more than ``A_TURN`` slots are given in one turn of the loop, however many are free.
* A waiter that is cancelled leaves the queue, and gives back a slot that it was just given.
* Whoever returns from :meth:`Slots.acquire` may send a request as long as it awaits nothing before: a slot that was
  given before dispatch closed, or before its engine was taken from work, is worth nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .member import Member

__all__ = ["A_TURN", "Slots"]

A_TURN: Final = 32
"""Slots given in one turn of the loop: beginning a request takes a fraction of a millisecond, and a batch that is taken
out has hundreds begun at once; what arrives meanwhile is read between the turns."""


@dataclass(slots=True, eq=False)
class _Waiter:
    preferred: Member | None
    avoided: Member | None
    member: Member | None = None
    given: asyncio.Future[None] | None = None
    """What it waits for, if it was not given a slot at once, as most are."""


class Slots:
    """See the module's invariants."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._continued: deque[_Waiter] = deque()
        self._fresh: deque[_Waiter] = deque()
        self._given = 0  # in this turn of the loop
        self.is_open = True

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._continued) + len(self._fresh)

    async def acquire(
        self, *, preferred: Member | None = None, avoided: Member | None = None, is_continued: bool = False
    ) -> Member:
        """Wait for a slot; the caller gives it back by :meth:`release`."""
        queue = self._continued if is_continued else self._fresh
        waiter = _Waiter(preferred, avoided)
        queue.append(waiter)
        while True:
            self.dispatch()
            try:
                if waiter.member is None:
                    waiter.given = asyncio.get_running_loop().create_future()
                    await waiter.given
            except BaseException:
                if waiter.member is not None:
                    self.release(waiter.member)
                else:
                    queue.remove(waiter)
                raise
            assert waiter.member is not None
            if self.is_open and waiter.member.may_work:
                return waiter.member
            # Since it was given, dispatch was closed or the engine may not work any more.
            member, waiter = waiter.member, _Waiter(preferred, avoided)
            queue.appendleft(waiter)
            self.release(member)

    def release(self, member: Member) -> None:
        """A request ended."""
        member.left()
        self.dispatch()

    def dispatch(self) -> None:
        """Give free slots to those who wait.

        To be called when dispatch opened, and when an engine may take work that could not, or the other way round.
        """
        if not self.is_open or self._given >= A_TURN:
            return
        free = [member for member in self._members if member.room]
        for queue in (self._continued, self._fresh):
            passed_over: list[_Waiter] = []
            while queue and free and self._given < A_TURN:
                waiter = queue.popleft()
                member = self._choose(waiter, free)
                if member is None:
                    passed_over.append(waiter)
                    continue
                member.taken()
                waiter.member = member
                if waiter.given is not None and not waiter.given.done():
                    waiter.given.set_result(None)
                self._count_given()
                if not member.room:
                    free.remove(member)
            queue.extendleft(reversed(passed_over))

    def _count_given(self) -> None:
        """Go on in the next turn of the loop, if this one has begun as many requests as it may."""
        if self._given == 0:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._given += 1

    def _next_turn(self) -> None:
        self._given = 0
        self.dispatch()

    def _choose(self, waiter: _Waiter, free: Sequence[Member]) -> Member | None:
        """The engine for a waiter; ``None`` if it should wait for another one."""
        if waiter.preferred in free:
            return waiter.preferred
        others = [member for member in free if member is not waiter.avoided]
        if others:
            return min(others, key=lambda member: member.load)
        has_choice = any(member.is_at_work and member is not waiter.avoided for member in self._members)
        return None if has_choice else waiter.avoided
