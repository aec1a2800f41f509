"""How the client waits: the one thing in which its blocking and its asynchronous form differ.

Invariants:

* Everything that talks to the daemon is written once, as coroutines that wait through a :class:`Waiter` only.
* The waiter of the blocking client never suspends: it blocks inside. A coroutine that waits through it runs to its end
  in a single step (:func:`run_now`), without an event loop.
* Every wait has a deadline, a value of ``time.monotonic()``.
* Standard library only.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

__all__ = ["BlockingWaiter", "Waiter", "run_now"]

T = TypeVar("T")


class Waiter(Protocol):
    """What the client needs of its surroundings in order to wait."""

    async def readable(self, sock: socket.socket, deadline: float) -> None:
        """Return when ``sock`` can be read, or was closed meanwhile.

        Raises:
            TimeoutError: neither before the deadline.
        """
        ...

    async def writable(self, sock: socket.socket, deadline: float) -> None:
        """Return when ``sock`` can be written; raises like :meth:`readable`."""
        ...

    async def turn(self, deadline: float) -> None:
        """Return when another task's read has ended.

        Raises:
            TimeoutError: not before the deadline.
        """
        ...

    def notify(self) -> None:
        """A read has ended: wake whoever waits for a turn."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds; 0 lets others run."""
        ...

    def closing(self, sock: socket.socket) -> None:
        """``sock`` is about to be closed: wake whoever waits for it."""
        ...


class BlockingWaiter:
    """Waits by blocking the thread."""

    async def readable(self, sock: socket.socket, deadline: float) -> None:
        """See :class:`Waiter`."""
        self._poll(sock, select.POLLIN, deadline)

    async def writable(self, sock: socket.socket, deadline: float) -> None:
        """See :class:`Waiter`."""
        self._poll(sock, select.POLLOUT, deadline)

    def _poll(self, sock: socket.socket, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(sock, event)
        if not poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
            raise TimeoutError

    async def turn(self, deadline: float) -> None:
        """See :class:`Waiter`; nobody else reads, unless two threads share a client.

        Raises:
            RuntimeError: two threads use one client.
        """
        raise RuntimeError("a RolloutClient can be used by one thread only: open one client per thread")

    def notify(self) -> None:
        """See :class:`Waiter`."""

    async def sleep(self, seconds: float) -> None:
        """See :class:`Waiter`."""
        if seconds > 0:
            threading.Event().wait(seconds)

    def closing(self, sock: socket.socket) -> None:
        """See :class:`Waiter`."""


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never suspends.

    Raises:
        RuntimeError: it suspended, so it waited for something else than a :class:`BlockingWaiter`.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise RuntimeError("the coroutine suspended where only blocking waits are possible")
