"""The client for a program with an event loop (asyncio or trio): :class:`~.core.ClientCore`, waiting through anyio.

Invariants:

* Loaded only when ``AsyncRolloutClient`` is asked for: the blocking client works without anyio.
* Tasks may share a client: requests run side by side, and one task reads for all. Cancelling a task gives its request
  up and leaves the connection intact.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio

from .batch import Batch
from .core import ClientCore

__all__ = ["AsyncRolloutClient"]


class _AnyioWaiter:
    """Waits in the event loop."""

    def __init__(self) -> None:
        self._turn = anyio.Event()

    async def readable(self, sock: socket.socket, deadline: float) -> None:
        try:
            with anyio.fail_after(deadline - time.monotonic()):
                await anyio.wait_readable(sock)
        except anyio.ClosedResourceError:
            return  # the caller looks

    async def writable(self, sock: socket.socket, deadline: float) -> None:
        try:
            with anyio.fail_after(deadline - time.monotonic()):
                await anyio.wait_writable(sock)
        except anyio.ClosedResourceError:
            return

    async def turn(self, deadline: float) -> None:
        with anyio.fail_after(deadline - time.monotonic()):
            await self._turn.wait()

    def notify(self) -> None:
        self._turn.set()
        self._turn = anyio.Event()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    def closing(self, sock: socket.socket) -> None:
        anyio.notify_closing(sock)


class AsyncRolloutClient(ClientCore):
    """Takes batches from a daemon, in an event loop; the methods are those of ``RolloutClient``, as coroutines.

    Args:
        socket_path: the daemon's Unix socket; default ``$ORCHESTRATOR_SOCKET``, then ``run/orchestrator.sock``.
        rank: which share of each batch to take, from 0.
        world_size: how many ranks take shares.
        client: a name for the daemon's log.
        takeover: on the first connection, close another live connection that holds this rank.
        connect_timeout_s: how long to wait for a daemon that does not listen yet.
    """

    def __init__(
        self,
        socket_path: str | Path | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        client: str = "trainer",
        takeover: bool = False,
        connect_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(
            _AnyioWaiter(),
            socket_path,
            rank=rank,
            world_size=world_size,
            client=client,
            takeover=takeover,
            connect_timeout_s=connect_timeout_s,
        )

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def batches(
        self,
        *,
        timeout_s: float | None = None,
        prefetch: bool = False,
        reconnect_s: float = 60.0,
        on_wait: Callable[[dict[str, Any]], None] | None = None,
    ) -> AsyncIterator[Batch]:
        """See :meth:`RolloutClient.batches`; one loop at a time."""
        loop = await self._new_loop(timeout_s=timeout_s, prefetch=prefetch, reconnect_s=reconnect_s, on_wait=on_wait)
        while (batch := await loop.next()) is not None:
            yield batch
            del batch
