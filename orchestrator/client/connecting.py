"""Getting and keeping a connection to the daemon.

Invariants:

* One connection at a time, made when first needed; whoever needs it while it is being made waits for that one.
* A daemon that does not listen yet, or has no room, is waited for, up to a deadline; nothing else is tried again.
* A rank is taken over on the first connection only: two that take over from each other would never end.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import ConnectionLost, TooManyConnections

from .buffers import BufferPool
from .files import CAN_READ_FILES
from .waiting import Waiter
from .wire import ANSWER_MARGIN_S, Wire

__all__ = ["Connecting"]

PROTOCOL: Final = 1
DEFAULT_SOCKET: Final = "run/orchestrator.sock"
SOCKET_VARIABLE: Final = "ORCHESTRATOR_SOCKET"

FIRST_RETRY_S: Final = 0.02
LAST_RETRY_S: Final = 1.0
"""Connecting is tried again after 20 ms, then after twice as long each time, up to a second."""

_MAY_COME: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN})
"""No socket yet, nobody listens yet, too many wait to be accepted."""


class Connecting:
    """The part of the client that owns the connection; see the module's invariants.

    Args:
        waiter: how to wait.
        socket_path: the daemon's Unix socket; default ``$ORCHESTRATOR_SOCKET``, then ``run/orchestrator.sock``.
        rank: which share of each batch to take, from 0.
        world_size: how many ranks take shares.
        client: a name for the daemon's log.
        takeover: on the first connection, close another live connection that holds this rank.
        connect_timeout_s: how long to wait for a daemon that does not listen yet.
    """

    def __init__(
        self,
        waiter: Waiter,
        socket_path: str | Path | None,
        *,
        rank: int,
        world_size: int,
        client: str,
        takeover: bool,
        connect_timeout_s: float,
    ) -> None:
        self.socket_path = str(socket_path or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)
        self.rank = rank
        self.world_size = world_size
        self._waiter = waiter
        self._client = client
        self._takes_over = takeover
        self._connect_timeout_s = connect_timeout_s
        self._pool = BufferPool()
        self._wire: Wire | None = None
        self._is_connecting = False

    async def connect(self, timeout_s: float | None = None) -> None:
        """Connect and say hello, unless connected; tries again until ``timeout_s`` is over.

        Raises:
            ConnectionLost: nobody listens, or the connection broke at once.
            TooManyConnections: the daemon has no room.
            NotAllowed: this process's user may not use the socket.
        """
        await self._connected(self._connect_timeout_s if timeout_s is None else timeout_s)

    def close(self) -> None:
        """Close the connection; batches that were not acknowledged are handed out again."""
        if self._wire is not None:
            self._wire.close()

    async def _connected(self, timeout_s: float) -> Wire:
        deadline = time.monotonic() + timeout_s
        while self._is_connecting:
            await self._waiter.turn(deadline + ANSWER_MARGIN_S)
        if self._wire is not None and self._wire.is_open:
            return self._wire
        self._is_connecting = True
        try:
            self._wire = await self._connect_until(deadline)
        finally:
            self._is_connecting = False
            self._waiter.notify()
        return self._wire

    async def _connect_until(self, deadline: float) -> Wire:
        pause = FIRST_RETRY_S
        while True:
            try:
                return await self._greeted(Wire(self._dial(), self._waiter, self._pool))
            except (ConnectionLost, TooManyConnections) as error:
                if not error.data.get("may_come", True) or time.monotonic() + pause > deadline:
                    raise
            await self._waiter.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S)

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(self.socket_path)
        except OSError as error:
            sock.close()
            raise ConnectionLost(
                f"cannot connect to {self.socket_path} ({error.strerror or error}): start `orchestrator run`, or name"
                f" its socket (--socket, RolloutClient(socket_path), ${SOCKET_VARIABLE})",
                data={"may_come": error.errno in _MAY_COME},
            ) from error
        return sock

    async def _greeted(self, wire: Wire) -> Wire:
        try:
            params: dict[str, Any] = {"rank": self.rank, "takeover": True} if self._takes_over else {}
            result = await self._hello_over(wire, params)
        except BaseException:
            wire.close()
            raise
        self._takes_over = False
        wire.reads_files = CAN_READ_FILES and result.get("by_file") is True  # an older daemon refuses the parameter
        return wire

    async def _hello_over(self, wire: Wire, params: dict[str, Any]) -> dict[str, Any]:
        request = await wire.start("hello", {"client": self._client, "protocol": PROTOCOL, **params})
        result = (await wire.answer(request, time.monotonic() + ANSWER_MARGIN_S)).result
        limit = result.get("max_payload")
        if type(limit) is int and limit >= 0:
            wire.limit_payload(limit)
        return result

    async def _call(self, method: str, params: dict[str, Any], timeout_s: float = 0.0) -> dict[str, Any]:
        wire = await self._connected(self._connect_timeout_s)
        request = await wire.start(method, params)
        return (await wire.answer(request, time.monotonic() + timeout_s + ANSWER_MARGIN_S)).result
