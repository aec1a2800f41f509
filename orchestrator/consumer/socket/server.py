"""The Unix socket of the consumer API.

Invariants:

* The state lock is held before this is reached; a foreign listener at the path is an error (see ``listener``).
* At most ``max_connections`` connections are served at a time (see ``peer`` for who makes room), at most
  ``MAX_LEAVING`` more are on their way out, and what is beyond that is closed without a word.
* Every connection is a task of the server's task group. What a client holds is free the moment its connection ends.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from pathlib import Path
from typing import Final, Protocol

import anyio
from anyio.abc import TaskGroup, TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.consumer.handout import Holder
from orchestrator.errors import NotAllowed, OrchestratorError

from .connection import READER_LIMIT_BYTES, Connection, Requests
from .listener import PRIVATE_MODE, SHARED_MODE, listen
from .peer import check_user, evicted, peer_of, refused, to_make_room, turn_away
from .sparse_log import SparseLog

__all__ = ["ConsumerServer", "Service"]

ACCEPT_RETRY_S: Final = 0.5
"""Until the next try after the system had no descriptor or memory for a connection; its peer waits meanwhile."""

EVICTION_PAUSE_S: Final = 0.002
"""After a connection was closed for another: who connects again and again gets a part of the loop's time, not all."""

SEND_BUFFER_BYTES: Final = 256 << 10
"""256 KiB, which Linux doubles (unless ``net.core.wmem_max`` is less): a batch of some megabytes takes half as many
turns between daemon and trainer as with what the system gives. More would save little, and a client that reads slowly
shows its progress only when three quarters of this are free again."""

MAX_LEAVING: Final = 64
"""Connections that are being told why they are closed, for a second at most each."""

MAX_LONG_HEADERS: Final = 16
"""Headers above the reader's limit that are received at a time: 16 MiB at most, whatever all clients send."""

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})


class Service(Requests, Protocol):
    """What the connections are served by."""

    def opened(self, connection: Connection) -> None:
        """A client connected."""
        ...

    def closed(self, connection: Connection) -> None:
        """A client went."""
        ...

    def holds_nothing(self, connection: Connection) -> bool:
        """Whether closing the connection costs its client no more than connecting again."""
        ...


class ConsumerServer:
    """See the module's invariants.

    Args:
        path: of the socket; at most 107 bytes (Linux).
        service: the methods.
        max_connections: at a time.
        allow_uids: users whose processes may connect; ``None``: the daemon's own, and root.
        log: for connections.
    """

    def __init__(
        self,
        path: Path,
        service: Service,
        *,
        max_connections: int,
        allow_uids: frozenset[int] | None = None,
        log: FilteringBoundLogger,
    ) -> None:
        self._path = path
        self._service = service
        self._max_connections = max_connections
        ours = frozenset({os.geteuid(), 0})
        self._allow_uids = ours if allow_uids is None else allow_uids
        self._mode = PRIVATE_MODE if self._allow_uids <= ours else SHARED_MODE
        self._log = SparseLog(log)
        self._long_headers = anyio.CapacityLimiter(MAX_LONG_HEADERS)
        self._numbers = itertools.count(1)
        self._served: dict[int, Connection] = {}  # by number, in the order in which they came
        self._leaving = 0

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Accept connections until cancelled; ready when the socket is bound."""
        listener = await listen(self._path, mode=self._mode)
        try:
            async with anyio.create_task_group() as tasks:
                task_status.started()
                while True:
                    await self._receive(await self._accept(listener.socket), tasks)
        finally:
            listener.close()

    async def _accept(self, listener: socket.socket) -> socket.socket:
        """The next connection; a shortage of descriptors delays it and ends nothing."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return (await loop.sock_accept(listener))[0]
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                self._log.warning("shortage", f"cannot accept a connection, will retry: {error.strerror}")
                self._make_room()
                await anyio.sleep(ACCEPT_RETRY_S)

    async def _receive(self, sock: socket.socket, tasks: TaskGroup) -> None:
        """Begin to serve a new connection, or to turn it away."""
        peer = peer_of(sock)
        try:
            check_user(peer, self._allow_uids)
            if (is_full := len(self._served) >= self._max_connections) and not self._make_room():
                raise refused(self._max_connections)
        except OrchestratorError as error:
            kind = "not allowed" if isinstance(error, NotAllowed) else "refused"
            self._log.warning(kind, f"process {peer.pid} was refused: {error}")
            if self._leaving < MAX_LEAVING:
                tasks.start_soon(self._turn_away, sock, error)
            else:
                sock.close()
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=READER_LIMIT_BYTES)
        connection = Connection(
            Holder(next(self._numbers), peer.pid),
            sock,
            reader,
            writer,
            requests=self._service,
            long_headers=self._long_headers,
            log=self._log,
        )
        self._served[connection.holder.connection] = connection
        self._service.opened(connection)
        tasks.start_soon(self._serve, connection)
        if is_full:
            await anyio.sleep(EVICTION_PAUSE_S)

    def _make_room(self) -> bool:
        """Close the connection that can be spared best, if one can; whether there is room now."""
        connection = to_make_room(self._served.values(), self._service.holds_nothing)
        if connection is None or self._leaving >= MAX_LEAVING:
            return False
        self._log.warning("evicted", f"closing the connection of process {connection.holder.pid} for a new one")
        self._leave(connection)
        connection.close(evicted(self._max_connections))
        return True

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.serve()
        finally:
            self._leave(connection)
            self._service.closed(connection)
            await connection.hang_up()
            self._leaving -= 1

    def _leave(self, connection: Connection) -> None:
        """Its place is free."""
        if self._served.pop(connection.holder.connection, None) is not None:
            self._leaving += 1

    async def _turn_away(self, sock: socket.socket, why: OrchestratorError) -> None:
        self._leaving += 1
        try:
            await turn_away(sock, why)
        finally:
            self._leaving -= 1
